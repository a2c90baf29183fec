"""One trial: a run of :func:`jaxft.training.loop.fit` whose scores are kept, and nothing else of it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxft import tasks
from jaxft.config import RunConfig, to_yaml
from jaxft.errors import Diverged
from jaxft.files import write_atomic
from jaxft.machine.lock import held
from jaxft.reporting.sinks import read_log
from jaxft.training.loop import fit
from jaxft.training.programs import Programs
from jaxft.training.setup import Setup, Times
from jaxft.training.sweep.ledger import Finished, State
from jaxft.training.sweep.workbench import Group

Course = tuple[tuple[int, float], ...]
"""(step, value of the metric) of each evaluation."""


@dataclass(frozen=True)
class Observer:
    """What a trial's run is watched by."""

    note: Callable[[str], None]
    log: Path
    metric: str
    hopeful: Callable[[Course], bool]

    def say(self, text: str) -> None:
        """Passes on warnings; the rest is in the trial's folder."""
        if text.startswith("warning"):
            self.note(text)

    def goes_on(self, step: int, scores: Mapping[str, object]) -> bool:
        """Whether whoever prunes finds it worth going on with."""
        del scores  # a run that was resumed has earlier ones, in its log
        return self.hopeful(tuple(part for part in course_of(self.log, self.metric) if part[0] <= step))


def run_trial(
    group: Group,
    config: RunConfig,
    out: Path,
    point: int,
    seed: int,
    note: Callable[[str], None],
    hopeful: Callable[[Course], bool] = lambda course: True,
) -> Finished | None:
    """Runs a trial to its end, from the checkpoint in its folder if there is one; None: a signal stopped it.

    Args:
      config: of its point.
      out: the trial's folder.
      note: takes warnings.
      hopeful: asked after each evaluation, with all so far, whether to go on.

    Raises:
      UserError: anything that keeps it from running, but for a loss that is not finite, which is a result.
    """
    setup, programs = group.trial(config, out, seed)
    metric = tasks.metric_of(setup.task, config.eval.metric)
    with held(out, note):
        write_atomic(out / "config.yaml", to_yaml(setup.config))
        return _run_trial(setup, programs, metric, out, point, seed, note, hopeful)


def _run_trial(
    setup: Setup,
    programs: Programs,
    metric: str,
    out: Path,
    point: int,
    seed: int,
    note: Callable[[str], None],
    hopeful: Callable[[Course], bool],
) -> Finished | None:
    watch = Observer(note, out / "log.jsonl", metric, hopeful)
    state: State = "done"
    try:
        result = fit(setup, programs, out, seed, watch.say, Times(), watch)
    except Diverged as error:
        note(f"trial {point}, seed {seed}: diverged: {error}")
        state = "diverged"
    else:
        if result.interrupted:
            return None
        state = "pruned" if result.given_up else "done"
    return _finished(setup, out, metric, point, seed, state)


def _finished(setup: Setup, out: Path, metric: str, point: int, seed: int, state: State) -> Finished:
    course = course_of(out / "log.jsonl", metric)
    best: tuple[int, float] | None = None
    for step, value in course:
        if tasks.is_better(setup.task, metric, value, None if best is None else best[1]):
            best = step, value
    records = [one for one in read_log(out / "log.jsonl") if one["kind"] == "eval"]
    scores = {} if best is None else next(one for one in records if one["step"] == best[0])
    last = max((one["step"] for one in read_log(out / "log.jsonl")), default=0)
    return Finished(
        point=point,
        seed=seed,
        state=state,
        value=None if best is None else best[1],
        best_step=0 if best is None else best[0],
        steps=last,
        metrics={name: value for name, value in scores.items() if name not in ("step", "kind")},
        course=tuple((step, value) for step, value in course if math.isfinite(value)),
        rows=rows_of(setup),
    )


def rows_of(setup: Setup) -> str:
    """Hashes of the training rows and the held-out rows."""
    return f"{setup.train.digest()}/{setup.held_out.digest()}"


def course_of(log: Path, metric: str) -> Course:
    """The metric's values in a run's log."""
    return tuple((one["step"], one[metric]) for one in read_log(log) if one["kind"] == "eval")


def forget_state(out: Path) -> None:
    """Removes the checkpoints of a trial that is finished."""
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
