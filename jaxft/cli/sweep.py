"""``jaxft sweep``: many trials of one run, ranked by their mean over seeds."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from jaxft.cli.console import lasting_output
from jaxft.cli.show_config import split_run_file
from jaxft.config import RunConfig, load_config
from jaxft.errors import UserError
from jaxft.machine import buckets
from jaxft.machine.platform import set_up_jax

if TYPE_CHECKING:  # they import jax, whose import takes seconds
    from jaxft.training.sweep.engine import Outcome
    from jaxft.training.sweep.space import Space

_EPILOG = """\
values that vary:
  optim.learning_rate=1e-5,3e-5,1e-4        these
  train.seed=0..4                           whole numbers, both ends included; each point is run with each seed
  optim.learning_rate=1e-5..1e-3:log        any number between (--search random or tpe)
  optim.learning_rate=1e-5..1e-3:log:5      five of them (--search grid)
whatever has one value is as for jaxft train"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("run_file", nargs="?", help="YAML run file, for instance configs/runs/wordnet8_minilm.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=values", help="for instance optim.learning_rate=1e-5,3e-5")
    parser.add_argument("--search", choices=["grid", "random", "tpe"], default="grid", help="tpe needs jaxft[sweep]")
    parser.add_argument("--points", type=int, metavar="N", help="points that random or tpe try, each with every seed")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the search (train.seed is of the trials)")
    parser.add_argument("--prune", action="store_true", help="give up trials that fall behind (needs jaxft[sweep])")
    parser.add_argument("--out", metavar="FOLDER", help="ledger and results; without: train.out with -sweep at its end")


def run(options: argparse.Namespace) -> int:
    """Runs the trials that are not finished yet, and says which point is best."""
    from jaxft.training.sweep.space import parse_space

    path, assignments = split_run_file(options.run_file, options.overrides)
    usual = load_config(path)
    space = parse_space(assignments, usual.task.name)
    _check_points(options)
    config = load_config(path, space.fixed)
    named = options.out or f"{config.train.out}-sweep"
    if buckets.is_address(named):
        raise UserError(f"{named}: a sweep's ledger lies on a disk; give --out FOLDER")
    out = Path(named)
    with lasting_output("sweep", f"the sweep goes on, its results are in {out}"):
        return _run(options, space, config, out)


def _check_points(options: argparse.Namespace) -> None:
    from jaxft.training.sweep.space import MOST_POINTS

    if options.search == "grid" and options.points is not None:
        raise UserError("--points is for --search random or tpe; a grid has all of its points")
    if options.search != "grid" and options.points is None:
        raise UserError(f"--search {options.search}: say how many points to try, for instance --points 20")
    if options.points is not None and options.points < 1:
        raise UserError(f"--points {options.points}: must be at least 1")
    if options.points is not None and options.points > MOST_POINTS:
        raise UserError(f"--points {options.points}: at most {MOST_POINTS} are possible")


def _run(options: argparse.Namespace, space: Space, config: RunConfig, out: Path) -> int:
    set_up_jax(config.train.compilation_cache)
    from jaxft.machine import processes  # imports jax
    from jaxft.training.sweep.engine import Sweep, run_sweep

    if processes.detect(os.environ) is not None:
        raise UserError("jaxft sweep works in one process (with all of its devices); start a sweep on each machine")
    adviser = None
    if options.search == "tpe" or options.prune:
        from jaxft.training.sweep.tpe import make_optuna

        why = "--search tpe" if options.search == "tpe" else "--prune"
        adviser = make_optuna(space, options.seed, why, options.points if options.search == "tpe" else None)
    sweep = Sweep(config, space, options.search, options.seed, options.points, options.prune, out)
    outcome = run_sweep(sweep, adviser, _say)
    _report(outcome, out)
    return 130 if outcome.interrupted else 0


def _report(outcome: Outcome, out: Path) -> None:
    from jaxft.training.sweep.ranking import table_lines

    if outcome.rows:
        print("", *table_lines(outcome.rows, outcome.metric, outcome.direction), sep="\n")
    if outcome.trials:
        first, last = (size / 2**30 for size in outcome.resident)
        compiled = f"train steps compiled {_count(outcome.compiled, 'time')}"
        print(
            f"\n{_count(outcome.trials, 'trial')}, {_count(outcome.groups, 'program')} of {_count(outcome.shapes, 'batch shape')}: "
            f"{compiled}; memory {first:.3f} GiB after the first trial, {last:.3f} after the last"
        )
    for name in ("results.md", "results.json", "best.yaml"):
        if (out / name).exists():
            print(f"wrote {out / name}")
    if outcome.interrupted:
        print("stopped by a signal; the same command goes on from there", flush=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _say(text: str) -> None:
    print(text, flush=True)
