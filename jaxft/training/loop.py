"""The training loop: the one imperative file. Reads top to bottom."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar, cast

import jax
import numpy as np

from jaxft import checkpoint, tasks
from jaxft.config import RunConfig, to_tree
from jaxft.config.stored import RunMeta, stored_metric, wrong_best
from jaxft.data.batch import Shape
from jaxft.data.loader import stream, to_global
from jaxft.errors import UserError
from jaxft.machine import processes
from jaxft.machine.memory import release_freed
from jaxft.machine.processes.stopping import Stop, stop_on_signal
from jaxft.parallel.sharding import replicated
from jaxft.reporting.sinks import Clock, Silent, Sinks, open_sinks
from jaxft.tasks import Task
from jaxft.tasks.contract import Sums
from jaxft.training.goodput import Goodput, Lap, Profile, lap_of
from jaxft.training.packing import examples_in
from jaxft.training.programs import Kind, Programs
from jaxft.training.resume import changes_said, check_folder, check_goes_on, scores_differ
from jaxft.training.scoring import evaluate
from jaxft.training.setup import Note, Setup, Times, steps_per_epoch
from jaxft.training.state import TrainState
from jaxft.trees import Params

T = TypeVar("T")


@dataclass
class Progress:
    """What the loop knows besides the state; stored with each checkpoint."""

    metric: str | None = None
    """Name of the metric that the best value is of."""
    best_value: float | None = None
    best_step: int | None = None
    bad_evals: int = 0
    """Evaluations in a row without a better value."""
    loss: float = 0.0
    """Sum over the steps since the last line of the log, those with a finite loss."""
    weight: float = 0.0
    """What that sum is to be divided by."""

    def add(self, loss: float, weight: float) -> None:
        """Counts a step. One without a finite loss changed nothing, and is told by the number of skipped steps."""
        if math.isfinite(loss) and math.isfinite(weight):
            self.loss, self.weight = self.loss + loss, self.weight + weight

    def mean(self) -> float:
        """The mean loss since the last call, NaN if no step had a finite one."""
        mean = self.loss / self.weight if self.weight else math.nan
        self.loss = self.weight = 0.0
        return mean


class Watch(Protocol):
    """Someone who compares runs and keeps none of their parameters: a sweep.

    A run that is watched says on the console what it is told to, and stores only what going on after a stop needs.
    """

    def say(self, text: str) -> None:
        """Takes a line that would stand on the console."""
        ...

    def goes_on(self, step: int, scores: Mapping[str, object]) -> bool:
        """Asked after each evaluation: whether the run is worth going on with."""
        ...


class Diverged(UserError):
    """Loss or gradient was not finite for too many steps in a row."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    params: Params
    """The best ones by ``eval.metric``, or the last ones if nothing was evaluated, or the run was watched."""
    metrics: Mapping[str, object]
    """Scores of ``params`` on the held-out rows; none of a run that was interrupted or watched."""
    best_step: int
    interrupted: bool = False
    given_up: bool = False
    """Whoever watched it did not want it to go on."""
    seconds: dict[str, float] = field(default_factory=dict)


def fit(
    setup: Setup, programs: Programs, out: Path, seed: int, note: Note, times: Times, watch: Watch | None = None
) -> Result:
    """Trains one run to its end (or until it is told to stop) and returns its best parameters.

    Args:
      watch: who wants its scores only, not its parameters.

    Raises:
      UserError: the folder holds another run, or training diverged.
    """
    config = setup.config
    out.mkdir(parents=True, exist_ok=True)
    store = checkpoint.Checkpoints(out / "checkpoints", keep=config.checkpoint.keep, verify=config.checkpoint.verify)
    try:
        with jax.set_mesh(setup.mesh):
            return _fit(setup, programs, out, seed, note, times, store, watch)
    finally:
        store.close()


def _fit(
    setup: Setup,
    programs: Programs,
    out: Path,
    seed: int,
    note: Note,
    times: Times,
    store: checkpoint.Checkpoints,
    watch: Watch | None,
) -> Result:
    config = setup.config
    with times.part("weights"):
        state, progress, start = _start(setup, programs, out, seed, note, store)
    batches, total = setup.train_batches(seed), setup.total_steps
    if start < total:
        with times.part("compile"):
            programs.compilation.wait("train", (batches.shape_of(start),))
    for line in programs.compilation.news():
        note(line)
    release_freed()
    note(f"time to first step: {times.text()}")
    meta = run_meta(setup, out, seed)
    rules = setup.model.compute.rules
    seed_array = jax.device_put(np.uint32(seed), replicated(setup.mesh))
    interrupted, given_up, step, lap = False, False, start, lap_of(setup)
    goodput, profile = Goodput(times), Profile(config.train.profile, out / "profile")
    best_metrics: Mapping[str, object] | None = None
    pending: tuple[int, Sums, int, Shape] | None = None

    sinks = _sinks(setup, out, start, watch)
    with sinks, stop_on_signal() as stop:
        sinks.advance(start)
        # A run that has stopped early stays stopped when it is resumed.
        last = start if _out_of_patience(config, progress) else total
        for batch in _timed(stream(batches, start, last, config.data.read_ahead), lap.clock):
            placed = to_global(batch, setup.fields, setup.mesh, rules, batches.batch_size)
            shape = batches.shape_of(step)
            if not _compiled(programs, "train", (shape,), lap, goodput, stop):
                # Told to stop while the program of the next step was being compiled.
                interrupted = True
                if pending is not None:
                    _report_step(setup, sinks, lap, progress, *pending)
                sinks.sync()
                store.wait()
                if step not in store.steps():  # the last evaluation may have stored it, as the best one perhaps
                    store.save(step, state, meta | {"progress": progress.__dict__})
                break
            profile.before(step + 1)
            state, metrics = programs.train[shape](state, placed, seed_array)
            if profile.after(step + 1, metrics):
                sinks.note(f"wrote a trace of steps {config.train.profile} to {out / 'profile'}")
            # One step late: the device is already at work on the next step while the host reads this one's numbers.
            if pending is not None:
                _report_step(setup, sinks, lap, progress, *pending)
            step += 1
            pending = (step, metrics, examples_in(setup.train, batches.rows_of(step - 1)), shape)
            for line in programs.compilation.news():
                sinks.note(line)

            interrupted = stop.after(step)
            evaluated = step % setup.eval_every == 0 or step == total
            due = _checkpoint_due(config, step, evaluated)
            if evaluated or interrupted or due:
                _report_step(setup, sinks, lap, progress, *pending)
                pending = None
                if evaluated:
                    _compiled(programs, "eval", setup.eval_batches().shapes(), lap, goodput)
                with lap.clock.paused():
                    with goodput.part("evaluation"):
                        scores = _evaluate(setup, programs, sinks, state, step, progress.metric) if evaluated else None
                    better = scores is not None and _is_better(setup.task, progress, scores, step)
                    best_metrics = scores if better else best_metrics
                    given_up = watch is not None and scores is not None and not watch.goes_on(step, scores)
                    ended = step == total or given_up or _out_of_patience(config, progress)
                    # Of a run that is watched, what has ended is scores; nobody asks for its state.
                    wanted = due or better or ended if watch is None else due and not ended
                    if wanted or interrupted:
                        sinks.sync()
                        with goodput.part("checkpoint"):
                            store.save(step, state, meta | {"progress": progress.__dict__}, best=better)
            if interrupted or given_up or _out_of_patience(config, progress):
                break
        if not interrupted and not given_up and step < total:
            sinks.note(
                f"stopped early at step {step}: no better {progress.metric} in {progress.bad_evals} evaluations; "
                "the same command with a larger eval.patience goes on"
            )
        profile.close()
        with goodput.part("checkpoint"):
            store.wait()
        if processes.is_first():
            sinks.note(goodput.finish(out, lap.clock.waited))
    if interrupted:
        note(f"stopped by a signal at step {step} of {total}; the state is saved, the same command goes on from there")
    if watch is not None:
        best = step if progress.best_step is None else progress.best_step
        return Result(step, state.best_params, {}, best, interrupted, given_up)
    return _result(setup, programs, state, step, progress, store, interrupted, best_metrics)


def _compiled(
    programs: Programs, kind: Kind, shapes: tuple[Shape, ...], lap: Lap, goodput: Goodput, stop: Stop | None = None
) -> bool:
    """Waits for programs that are still being compiled; False if it was told to stop meanwhile."""
    if all(programs.compilation.ready(kind, shape) for shape in shapes):
        return True
    with lap.clock.paused(), goodput.part("compile"):
        return programs.compilation.wait(kind, shapes, lambda: stop is not None and stop.requested)


def _sinks(setup: Setup, out: Path, start: int, watch: Watch | None) -> Sinks:
    config, total = setup.config, setup.total_steps
    if not processes.is_first():
        return Silent()
    said = {} if watch is None else {"say": watch.say}
    return open_sinks(out, config.log, start_step=start, total_steps=total, run_config=to_tree(config), **said)


def _start(
    setup: Setup, programs: Programs, out: Path, seed: int, note: Note, store: checkpoint.Checkpoints
) -> tuple[TrainState, Progress, int]:
    """A fresh state, or the newest checkpoint's."""
    check_folder(setup, out, seed)
    if not store.steps():
        metric = tasks.metric_of(setup.task, setup.config.eval.metric)
        return programs.init(setup.start_params(seed, note)), Progress(metric), 0
    restored = store.restore(programs.shapes)
    meta = cast(RunMeta, restored.meta)
    check_goes_on(setup, meta, restored.step, seed, out)
    note(f"resuming from step {restored.step}")
    for line in changes_said(setup, meta, restored.step, seed):
        note(line)
    progress = _progress(meta, note)
    reason = scores_differ(setup, meta, seed)
    progress.metric = setup.config.eval.metric or progress.metric
    if reason is not None and progress.best_step is not None:
        _score_best_anew(setup, programs, progress, restored, store)
        note(
            f"{reason}: by them, the best step so far ({progress.best_step}) has {progress.metric} {progress.best_value}"
        )
    return restored.state, progress, restored.step


def _progress(meta: RunMeta, note: Note) -> Progress:
    """The progress in a checkpoint; what an earlier version took for the best by mistake is forgotten."""
    progress = Progress(**meta["progress"])
    if progress.metric is None:
        wrong = wrong_best(meta["config"])
        progress = Progress() if wrong else progress
        progress.metric = stored_metric(meta)
        if wrong:
            note(f"warning: {wrong}; from here on the best one is kept")
    return progress


def _score_best_anew(
    setup: Setup, programs: Programs, progress: Progress, restored: checkpoint.Restored, store: checkpoint.Checkpoints
) -> None:
    """Makes the best value one that evaluations from now on can be compared with."""
    best = restored if progress.best_step == restored.step else store.restore(programs.shapes, progress.best_step)
    value = tasks.scalar(evaluate(setup, programs, best.state.best_params), str(progress.metric))
    progress.best_value, progress.bad_evals = value if math.isfinite(value) else None, 0


def run_meta(setup: Setup, out: Path, seed: int) -> RunMeta:
    """What a checkpoint says about itself: enough to go on, and to serve the model without the run's files."""
    source = setup.source
    return {
        "config": to_tree(setup.config),
        "seed": seed,
        "family": setup.family_name,
        "arch": to_tree(setup.model.config),
        "head": setup.model.head,
        "labels": list(setup.targets.labels),
        "train_rows": setup.train.digest(),
        "eval_rows": setup.held_out.digest(),
        "hf_config": {} if source is None else source.hf_config,
        **checkpoint.tokenizer_place(setup.tokenizer.folder, out),
        "tokenizer_digest": setup.tokenizer.digest(),
        "max_length": setup.config.data.max_length,
    }


def _checkpoint_due(config: RunConfig, step: int, evaluated: bool) -> bool:
    return evaluated if config.checkpoint.every is None else step % config.checkpoint.every == 0


def _out_of_patience(config: RunConfig, progress: Progress) -> bool:
    return config.eval.patience is not None and progress.bad_evals >= config.eval.patience


def _report_step(
    setup: Setup, sinks: Sinks, lap: Lap, progress: Progress, step: int, metrics: Sums, rows: int, shape: Shape
) -> None:
    """Fetches one step's numbers, logs them if due, and stops a run that diverges."""
    values = jax.device_get(metrics)
    lap.add(rows, int(values["tokens"]), shape)
    progress.add(float(values["loss"]), float(values["weight"]))
    sinks.advance(step)
    config = setup.config.train
    if int(values["streak"]) > config.max_nonfinite:
        raise Diverged(
            f"step {step}: loss or gradient was not finite {int(values['streak'])} steps in a row; "
            "lower optim.learning_rate or look at the data"
        )
    if step % config.log_every == 0 or step == setup.total_steps:
        sinks.timing(step, lap.speeds())
        sinks.log(
            step,
            "train",
            {
                "loss": progress.mean(),
                "learning_rate": float(values["learning_rate"]),
                "grad_norm": float(values["grad_norm"]),
                "skipped": int(values["skipped"]),
                "epoch": step / steps_per_epoch(setup.config, setup.train),
            },
        )


def _evaluate(
    setup: Setup, programs: Programs, sinks: Sinks, state: TrainState, step: int, chosen: str | None
) -> Mapping[str, object]:
    """Scores the held-out rows and logs it; ``chosen`` names the metric that the best checkpoint is chosen by."""
    metrics = evaluate(setup, programs, state.best_params)
    if chosen is not None and not np.isfinite(tasks.scalar(metrics, chosen)):
        sinks.note(
            f"warning: {chosen} of the held-out rows is {metrics[chosen]} at step {step}: not taken for the best"
        )
    sinks.log(
        step,
        "eval",
        {name: tasks.scalar(metrics, name) for name in sorted(setup.task.metrics, key=lambda name: name != "loss")},
    )
    return metrics


def _is_better(task: Task, progress: Progress, metrics: Mapping[str, object], step: int) -> bool:
    """Whether an evaluation is the best so far; notes it in ``progress``."""
    assert progress.metric is not None
    value = tasks.scalar(metrics, progress.metric)
    better = tasks.is_better(task, progress.metric, value, progress.best_value)
    if better:
        progress.best_value, progress.best_step, progress.bad_evals = value, step, 0
    else:
        progress.bad_evals += 1
    return better


def _result(
    setup: Setup,
    programs: Programs,
    state: TrainState,
    step: int,
    progress: Progress,
    store: checkpoint.Checkpoints,
    interrupted: bool,
    best_metrics: Mapping[str, object] | None,
) -> Result:
    best = step if progress.best_step is None else progress.best_step
    if interrupted:  # whoever sent the signal does not wait for long
        return Result(step, state.best_params, {}, best, interrupted)
    if best != step:
        state = store.restore(programs.shapes, best).state
    params = state.best_params
    # Evaluated in this process already, unless the best step was before a resume.
    return Result(step, params, best_metrics or evaluate(setup, programs, params), best)


def _timed(batches: Iterator[T], clock: Clock) -> Iterator[T]:
    """The same batches; the time spent waiting for each is told to the clock."""
    while True:
        with clock.waiting():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
