"""The training loop: the one imperative file. Reads top to bottom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import numpy as np

from jaxft import checkpoint, tasks
from jaxft.config import RunConfig, to_tree
from jaxft.config.stored import RunMeta
from jaxft.data.batch import HostBatch, Shape
from jaxft.data.loader import Batches, stream, to_global
from jaxft.errors import Diverged, listed
from jaxft.machine import processes
from jaxft.machine.memory import release_freed
from jaxft.machine.processes.stopping import Stop, stop_on_signal
from jaxft.parallel.sharding import replicated
from jaxft.reporting.sinks import Silent, Sinks, open_sinks
from jaxft.tasks.contract import Sums
from jaxft.training.diagnosis import NotFinite, first_operation, not_finite, not_finite_in
from jaxft.training.goodput import Goodput, Lap, Profile, lap_of, timed
from jaxft.training.packing import examples_in
from jaxft.training.programs import Kind, Programs
from jaxft.training.progress import Progress
from jaxft.training.scoring import evaluate, evaluated, samples_of
from jaxft.training.setup import Note, Setup, Times
from jaxft.training.start import run_meta, started
from jaxft.training.state import TrainState
from jaxft.training.watchdog import watched
from jaxft.trees import Params

_LOST = "steps gone back over"
"""What the seconds of steps are called that a run went back over."""


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
    setup: Setup,
    programs: Programs,
    out: Path,
    seed: int,
    note: Note,
    times: Times,
    watch: Watch | None = None,
    *,
    debug_nans: bool = False,
    bucket: checkpoint.RunBucket | None = None,
) -> Result:
    """Trains one run to its end (or until it is told to stop) and returns its best parameters.

    Args:
      watch: who wants its scores only, not its parameters.
      debug_nans: whether the first step that is not finite ends it, and the operation is named that was the first.
      bucket: where the folder's content is put; None: nowhere.

    Raises:
      UserError: the folder holds another run, or training diverged.
    """
    config = setup.config
    out.mkdir(parents=True, exist_ok=True)
    said, folder = config.checkpoint, out / "checkpoints"
    stored, parts = (None, None) if bucket is None else (bucket.sync, bucket.parts)
    kept = {"keep": said.keep, "keep_every": said.keep_every}
    store = checkpoint.Checkpoints(folder, **kept, verify=said.verify, stored=stored, parts=parts)
    try:
        with jax.set_mesh(setup.mesh):
            run = _begun(setup, programs, out, seed, note, times, store, watch)
            run.debug_nans = debug_nans
            with stop_on_signal() as stop:  # whoever asked for a stop is not forgotten where the run goes back
                while (found := run.trained(stop, out)) is not None:
                    left_out = run.goes_back(found, note)
                    lost = times.seconds.get(_LOST, 0.0) + run.goodput.elapsed()
                    times = Times({**times.seconds, _LOST: lost})
                    run = _begun(setup, programs, out, seed, note, times, store, watch, left_out)
            return run.result(note)
    finally:
        store.close()


def _begun(
    setup: Setup,
    programs: Programs,
    out: Path,
    seed: int,
    note: Note,
    times: Times,
    store: checkpoint.Checkpoints,
    watch: Watch | None,
    left_out: list[list[int]] | None = None,
) -> _Run:
    """A run with its state, fresh or restored, and the program of its first step.

    Args:
      left_out: batches that it leaves out, where it went back; None: what the checkpoint says.
    """
    with times.part("weights"):
        state, progress, start = started(setup, programs, out, seed, note, store)
    if left_out is not None:
        progress.left_out = left_out
        state = replace(state, streak=jax.device_put(np.int32(0), state.streak.sharding))
    batches = replace(setup.train_batches(seed), left_out=tuple((step, count) for step, count in progress.left_out))
    if start < setup.total_steps:
        with times.part("compile"):
            programs.compilation.wait("train", (batches.shape_of(start),))
    for line in programs.compilation.news():
        note(line)
    release_freed()
    note(f"time to first step: {times.text()}")
    return _Run(
        setup, programs, batches, store, watch, seed,
        state=state, progress=progress, step=start, meta=run_meta(setup, out, seed), lap=lap_of(setup), goodput=Goodput(times),
        profile=Profile(setup.config.train.profile, out / "profile"), sinks=_sinks(setup, out, start, watch),
    )  # fmt: skip


class _Sent(NamedTuple):
    """A step that the devices work on, or have done, whose numbers the host has not read."""

    step: int
    sums: Sums
    rows: int
    shape: Shape


@dataclass
class _Run:
    """A run under way."""

    setup: Setup
    programs: Programs
    batches: Batches
    store: checkpoint.Checkpoints
    watch: Watch | None
    seed: int
    _: KW_ONLY
    state: TrainState
    progress: Progress
    step: int
    """Steps that have been sent to the devices."""
    meta: RunMeta
    lap: Lap
    goodput: Goodput
    profile: Profile
    sinks: Sinks
    sent: _Sent | None = None
    interrupted: bool = False
    given_up: bool = False
    debug_nans: bool = False
    best_scores: Mapping[str, object] | None = None
    """Scores of the best step, if it was evaluated in this process."""

    def trained(self, stop: Stop, out: Path) -> NotFinite | None:
        """Trains, and waits for what is stored; what was not finite, if that ended it."""
        try:
            with self.sinks, watched(self.lap.clock, self.setup.config.train.watchdog, out):
                self.train(stop)
                self.finish(out)
        except NotFinite as found:
            return found
        return None

    def train(self, stop: Stop) -> None:
        """Trains until the last step, or until someone or something stops it."""
        config, total = self.setup.config, self.setup.total_steps
        self.sinks.advance(self.step)
        # A run that has stopped early stays stopped when it is resumed.
        last = self.step if self._out_of_patience() else total
        seed = jax.device_put(np.uint32(self.seed), replicated(self.setup.mesh))
        for batch in timed(stream(self.batches, self.step, last, config.data.read_ahead), self.lap.clock):
            shape = self.batches.shape_of(self.step)
            if not _compiled(self.programs, "train", (shape,), self.lap, self.goodput, stop):
                self._leave_between_steps()
                break
            self._send(batch, shape, seed)
            for line in self.programs.compilation.news():
                self.sinks.note(line)
            self.interrupted = stop.after(self.step)
            self._look_up()
            if self.interrupted or self.given_up or self._out_of_patience():
                break
        if not self.interrupted and not self.given_up and self.step < total:
            self.sinks.note(
                f"stopped early at step {self.step}: no better {self.progress.metric} in {self.progress.bad_evals} "
                "evaluations; the same command with a larger eval.patience goes on"
            )

    def finish(self, out: Path) -> None:
        """Waits for what is still being written, and says where the time went."""
        self.profile.close()
        with self.lap.clock.paused(), self.goodput.part("checkpoint"):
            self.store.wait()
        if processes.is_first():
            self.sinks.note(self.goodput.finish(out, self.lap.clock.waited))

    def goes_back(self, found: NotFinite, note: Note) -> list[list[int]]:
        """The batches that are left out after going back to the last step from before the numbers were not finite.

        Raises:
          Diverged: the run has gone back often enough.
        """
        most, left_out = self.setup.config.train.rollbacks, self.progress.left_out
        if self.debug_nans:
            raise Diverged(f"{found}{self._blamed(found)}; without --debug-nans the same command goes on") from found
        if self.watch is not None or len(left_out) >= most:
            raise Diverged(f"{found}{self._blamed(found)}; lower optim.learning_rate or look at the data") from found
        self.store.wait()
        stored = self.store.steps()
        # A step that was stored since then has the same parameters: better than none.
        back = max((step for step in stored if step < found.first), default=max(stored, default=0))
        back = processes.first_says(back)  # the first process deletes what others may be listing
        self.store.forget_after(back)
        first, last = back + 1, found.last
        which = f"the batches of steps {first} to {last}" if last > first else f"the batch of step {last}"
        note(f"{found}: going back to step {back}, and leaving out {which} ({len(left_out) + 1} of {most} times)")
        return [*left_out, [back, found.last - back]]

    def _blamed(self, found: NotFinite) -> str:
        """Names what was not finite in the last step, as far as it shows when it is computed again."""
        if found.named or self.watch is not None:  # a sweep tells no more of a trial than that it diverged
            return ""
        setup, number = self.setup, found.last - 1
        rules = setup.model.compute.rules
        if self.debug_nans:
            return f": {first_operation(setup, self.state.params, self.batches[number], self.seed, number)}"
        batch = to_global(self.batches[number], setup.fields, setup.mesh, rules, self.batches.shape_of(number).rows)
        said = not_finite(setup, self.state.params, batch, self.seed, number)
        return f": {said}" if said else ""

    def result(self, note: Note) -> Result:
        """How it ended."""
        step, progress = self.step, self.progress
        if self.interrupted:
            total = self.setup.total_steps
            note(
                f"stopped by a signal at step {step} of {total}; the state is saved, the same command goes on from there"
            )
        best = step if progress.best_step is None else progress.best_step
        if self.interrupted or self.watch is not None:  # whoever sent the signal does not wait for long
            return Result(step, self.state.best_params, {}, best, self.interrupted, self.given_up)
        if best != step:
            self.state = self.store.restore(self.programs.shapes, best).state
        params = self.state.best_params
        # Evaluated in this process already, unless the best step was before a resume.
        return Result(step, params, self.best_scores or evaluate(self.setup, self.programs, params), best)

    def _out_of_patience(self) -> bool:
        return self.progress.out_of(self.setup.config.eval.patience)

    def _send(self, batch: HostBatch, shape: Shape, seed: jax.Array) -> None:
        """Sends a step to the devices, and reads the numbers of the step before."""
        setup, step = self.setup, self.step
        placed = to_global(batch, setup.fields, setup.mesh, setup.model.compute.rules, shape.rows)
        self.profile.before(step + 1)
        processes.at_step(step + 1)
        self.state, sums = self.programs.train[shape](self.state, placed, seed)
        if self.profile.after(step + 1, sums):
            self.sinks.note(f"wrote a trace of steps {setup.config.train.profile} to {self.profile.folder}")
        # One step late: the device is already at work on the next step while the host reads this one's numbers.
        self._read()
        self.step += 1
        self.sent = _Sent(self.step, sums, examples_in(setup.train, self.batches.rows_of(step)), shape)
        if self.debug_nans:  # another step would change the parameters that this one is to be computed again with
            self._read()

    def _read(self) -> None:
        """Reads and reports the numbers of the step that was sent last."""
        sent, self.sent = self.sent, None
        if sent is not None:
            most = 0 if self.debug_nans else self.setup.config.train.max_nonfinite
            _report_step(self.setup, self.sinks, self.lap, self.progress, sent, most)

    def _leave_between_steps(self) -> None:
        """Stores the state of a run that was told to stop while the program of its next step was being compiled."""
        self.interrupted = True
        self._read()
        self.sinks.sync()
        self.store.wait()
        if self.step not in self.store.steps():  # the last evaluation may have stored it, as the best one perhaps
            self._save(best=False)

    def _look_up(self) -> None:
        """Evaluates and stores what is due after a step."""
        step, setup = self.step, self.setup
        evaluated = step % setup.eval_every == 0 or step == setup.total_steps
        due = _checkpoint_due(setup.config, step, evaluated)
        if not (evaluated or self.interrupted or due):
            return
        self._read()
        if evaluated:
            _compiled(self.programs, "eval", setup.eval_batches().shapes(), self.lap, self.goodput)
        with self.lap.clock.paused():
            better = evaluated and self._evaluate()
            ended = step == setup.total_steps or self.given_up or self._out_of_patience()
            # Of a run that is watched, what has ended is scores; nobody asks for its state.
            wanted = due or better or ended if self.watch is None else due and not ended
            if wanted or self.interrupted:
                self.sinks.sync()
                with self.goodput.part("checkpoint"):
                    self._save(best=better)

    def _evaluate(self) -> bool:
        """Scores the held-out rows; whether they are the best so far."""
        with self.goodput.part("evaluation"):
            scores = _evaluate(self.setup, self.programs, self.sinks, self.state, self.step, self.progress.metric)
        better = self.progress.takes(self.setup.task, scores, self.step)
        self.best_scores = scores if better else self.best_scores
        self.given_up = self.watch is not None and not self.watch.goes_on(self.step, scores)
        return better

    def _save(self, *, best: bool) -> None:
        bad = not_finite_in(self.setup, self.state.params)
        if bad:
            raise NotFinite(
                f"step {self.step}: parameters {listed(bad, 3)} are not finite", self.step, self.step, named=True
            )
        said = {"progress": self.progress.__dict__, "log": self.sinks.written()}
        self.store.save(self.step, self.state, {**self.meta, **said}, best=best)


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


def _checkpoint_due(config: RunConfig, step: int, evaluated: bool) -> bool:
    return evaluated if config.checkpoint.every is None else step % config.checkpoint.every == 0


def _report_step(setup: Setup, sinks: Sinks, lap: Lap, progress: Progress, sent: _Sent, most: int) -> None:
    """Fetches one step's numbers, logs them if due, and stops a run that has more than ``most`` steps in a row that are not finite."""
    step, metrics, rows, shape = sent
    values = jax.device_get(metrics)
    lap.add(rows, int(values["tokens"]), shape)
    progress.add(float(values["loss"]), float(values["weight"]))
    sinks.advance(step)
    config = setup.config.train
    if (streak := int(values["streak"])) > most:
        said = f"step {step}: loss or gradient was not finite{f' {streak} steps in a row' if streak > 1 else ''}"
        raise NotFinite(said, step - streak + 1, step)
    if step % config.log_every == 0 or step == setup.total_steps:
        sinks.timing(step, lap.speeds())
        sinks.log(
            step,
            "train",
            {
                "loss": progress.mean(),
                "learning_rate": float(values["learning_rate"]),
                "grad_norm": float(values["grad_norm"]),
                **{name: int(values[name]) for name in ("skipped", "spikes") if name in values},
                "epoch": setup.epochs_before(step),
                **({"left_out": sum(count for _, count in progress.left_out)} if progress.left_out else {}),
            },
        )


def _evaluate(
    setup: Setup, programs: Programs, sinks: Sinks, state: TrainState, step: int, chosen: str | None
) -> Mapping[str, object]:
    """Scores the held-out rows and logs it; ``chosen`` names the metric that the best checkpoint is chosen by."""
    found = evaluated(setup, programs, state.best_params)
    metrics = found.metrics
    if chosen is not None and not np.isfinite(tasks.scalar(metrics, chosen)):
        sinks.note(
            f"warning: {chosen} of the held-out rows is {metrics[chosen]} at step {step}: not taken for the best"
        )
    sinks.log(
        step,
        "eval",
        {name: tasks.scalar(metrics, name) for name in sorted(setup.task.metrics, key=lambda name: name != "loss")},
    )
    sinks.samples(step, samples_of(setup, state.best_params, found))
    return metrics
