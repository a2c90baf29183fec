"""``jaxft show-config``: the resolved configuration, itself a loadable run file; and the learning-rate schedule drawn."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxft.config import RunConfig, load_config, to_yaml
from jaxft.errors import UserError
from jaxft.machine.platform import look_for_no_tpu


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("run_file", nargs="?", help="YAML run file; without one: the defaults")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance optim.learning_rate=1e-4")
    parser.add_argument(
        "--plot-schedule", nargs="?", const="-", metavar="PNG", help="draw the learning rate (and write a PNG)"
    )
    parser.add_argument("--steps", type=int, help="total steps of the drawn schedule, if the run file gives epochs")


def run(options: argparse.Namespace) -> int:
    """Prints the configuration, and the schedule if asked; refuses what ``jaxft train`` would, as far as that needs no data."""
    path, overrides = split_run_file(options.run_file, options.overrides)
    config = load_config(path, overrides)
    look_for_no_tpu()
    from jaxft.training.setup import check_config  # imports jax

    check_config(config)
    steps = _steps_to_plot(options, config) if options.plot_schedule else 0
    print(to_yaml(config), end="")
    if options.plot_schedule:
        from jaxft.reporting.report import schedule_png, schedule_text
        from jaxft.training.optim.schedules import make_schedule

        schedule = make_schedule(config.optim, steps)
        rates = [float(schedule(step)) for step in range(steps)]
        print(schedule_text(rates))
        if options.plot_schedule != "-":
            schedule_png(Path(options.plot_schedule), rates)
            print(f"wrote {options.plot_schedule}")
    return 0


def _steps_to_plot(options: argparse.Namespace, config: RunConfig) -> int:
    target = options.plot_schedule
    steps = config.train.steps if options.steps is None else options.steps
    # The name is optional: a run file that follows the option must not be taken for it, and overwritten.
    if target != "-" and not target.endswith(".png"):
        raise UserError(
            f"--plot-schedule {target}: the name of the picture must end in .png (or put the run file first)"
        )
    if steps is None:
        raise UserError(
            "the run is given in epochs; add --steps N (training rows / train.batch_size per epoch) to draw it"
        )
    if steps < 1:
        raise UserError(f"--steps {steps}: must be at least 1")
    return steps


def split_run_file(first: str | None, rest: list[str]) -> tuple[str | None, list[str]]:
    """(run file or None, overrides): a first argument with "=" is an override already, unless a file has that name."""
    if first is not None and "=" in first and not Path(first).is_file():
        return None, [first, *rest]
    return first, rest
