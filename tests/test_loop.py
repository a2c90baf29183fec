"""Whole runs on a tiny model: stopping and going on leaves the same bits, the best model is kept, the rest is refused."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from quick_xla import quick_flags
from tiny_run import ARCH, config_of, overrides, write_tokenizer

from jaxft.__main__ import main
from jaxft.checkpoint import Checkpoints
from jaxft.config import RunConfig, to_tree
from jaxft.data.cache import Cache
from jaxft.data.examples import Encoded, Examples, Split, make_split
from jaxft.data.loader import to_global
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.errors import Diverged, UserError
from jaxft.inference import predict
from jaxft.models import initial
from jaxft.parallel.sharding import make_mesh
from jaxft.reporting.sinks import read_log
from jaxft.training import loop, resume, setup
from jaxft.training.caching import build_caches
from jaxft.training.diagnosis import not_finite
from jaxft.training.loop import Result
from jaxft.training.programs import Programs, compile_programs
from jaxft.training.progress import Progress
from jaxft.training.scoring import Evaluation
from jaxft.training.setup import Setup, Times
from jaxft.trees import paths_of

TOTAL = 30


@dataclasses.dataclass(frozen=True)
class Ready:
    """A prepared run with compiled programs; its variants differ in what does not change the programs."""

    setup: Setup
    programs: Programs

    def but(self, **sections: dict[str, Any]) -> Ready:
        config = self.setup.config
        for name, changes in sections.items():
            config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **changes)})
        every = config.eval.every
        assert every is not None
        total = config.train.steps
        assert total is not None
        return Ready(dataclasses.replace(self.setup, config=config, eval_every=every, total_steps=total), self.programs)


@dataclasses.dataclass
class Run:
    """What one call of fit did."""

    result: Result
    batches: list[str]
    """A hash of each batch trained on."""
    notes: list[str]


def in_memory(examples: Examples) -> Split:
    assert isinstance(examples, Split)
    return examples


def prepared(config: RunConfig, devices: int, patch: pytest.MonkeyPatch) -> Ready:
    patch.setattr(setup, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:devices]))
    ready = setup.prepare(config, lambda text: None, Times())
    return Ready(ready, compile_programs(ready, lambda text: None))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="session")
def ready(folder: Path) -> Ready:
    with pytest.MonkeyPatch.context() as patch:
        return prepared(config_of(folder, "eval.every=10"), 1, patch)


@functools.cache
def _initial(model: Any, seed: int) -> Any:
    return jax.tree.map(np.asarray, initial.init_params(model, seed))


def init_params(model: Any, seed: int, shardings: Any = None) -> Any:
    """As the real one, which compiles at each call; a fresh copy, for it will be donated."""
    made = _initial(model, seed)
    return jax.tree.map(np.copy, made) if shardings is None else jax.device_put(made, shardings, may_alias=False)


def digest_of(batch: Mapping[str, Any]) -> str:
    return hashlib.sha256(b"".join(np.asarray(batch[k]).tobytes() for k in sorted(batch))).hexdigest()


class Recorded(dict):
    """Compiled steps that note which batches they see."""

    def __init__(self, programs: Mapping[Any, Any], seen: list[str]) -> None:
        super().__init__({shape: self._noting(program, seen) for shape, program in programs.items()})

    @staticmethod
    def _noting(program: Any, seen: list[str]) -> Any:
        def call(state: Any, batch: Any, seed: Any) -> Any:
            seen.append(digest_of(batch))
            return program(state, batch, seed)

        return call


def fit(ready: Ready, out: Path, seed: int = 0, stop_at: int | None = None) -> Run:
    """Runs to the end, or until a SIGTERM that comes before step ``stop_at`` is taken."""
    seen: list[str] = []
    notes: list[str] = []
    programs = dataclasses.replace(ready.programs, train=Recorded(ready.programs.train, seen))
    real = loop.stream

    def with_signal(batches: Any, start: int, stop: int, read_ahead: int) -> Iterator[Any]:
        for step, batch in enumerate(real(batches, start, stop, read_ahead), start=start):
            if batches.seed is not None and step + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "stream", with_signal)
        patch.setattr(setup, "init_params", init_params)
        result = loop.fit(ready.setup, programs, out, seed, notes.append, Times())
    return Run(result, seen, notes)


def stored(ready: Ready, out: Path, step: int) -> tuple[Any, Any]:
    with Checkpoints(out / "checkpoints", keep=99) as store:
        restored = store.restore(ready.programs.shapes, step)
    return restored.state, restored.meta


def assert_same_end(ready: Ready, a: Path, b: Path, step: int = TOTAL) -> None:
    """The same state to the bit, the same log to the byte, the same idea of what was best."""
    (state, meta), (other, other_meta) = stored(ready, a, step), stored(ready, b, step)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert meta["progress"] == other_meta["progress"]
    assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes()


def assert_same_result(a: Result, b: Result) -> None:
    assert (a.step, a.best_step, a.metrics) == (b.step, b.best_step, b.metrics)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="session")
def begun(ready: Ready, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped at step 11; for copies."""
    out = tmp_path_factory.mktemp("begun") / "out"
    fit(ready, out, stop_at=11)
    return out


@pytest.fixture(scope="session")
def whole(ready: Ready, folder: Path) -> tuple[Run, Path]:
    """A run that never stops."""
    return fit(ready, folder / "whole"), folder / "whole"


def test_a_run_learns_and_logs(whole: tuple[Run, Path]) -> None:
    run, out = whole
    log = read_log(out / "log.jsonl")
    train = [record for record in log if record["kind"] == "train"]
    assert [record["step"] for record in train] == list(range(3, TOTAL + 1, 3))
    assert [record["step"] for record in log if record["kind"] == "eval"] == list(range(10, TOTAL + 1, 10))
    losses = [record["loss"] for record in train]
    assert sum(losses[5:]) < sum(losses[:5])  # single ones are of a few small batches, with dropout
    # 13 steps show all 98 rows once.
    assert [record["epoch"] for record in train] == [record["step"] / 13 for record in train]
    assert len(run.batches) == TOTAL == len(set(run.batches))
    assert run.result.metrics["rows"] == 21


def test_a_test_is_scored_at_the_end_and_changes_nothing(ready: Ready, whole: tuple[Run, Path], tmp_path: Path) -> None:
    """The training rows stand for a test: the held-out scores of a run that holds them out."""
    test = dataclasses.replace(in_memory(ready.setup.train), name="test")
    tested = Ready(dataclasses.replace(ready.setup, test=test), ready.programs)
    run = fit(tested, tmp_path)
    assert_same_end(ready, tmp_path, whole[1])
    assert_same_result(run.result, whole[0].result)
    scores = loop.evaluate(tested.setup, ready.programs, run.result.params, test=True)
    swapped = dataclasses.replace(ready.setup, held_out=test)
    assert scores == loop.evaluate(swapped, ready.programs, run.result.params)
    assert (scores["rows"], run.result.metrics["rows"]) == (98, 21)


@pytest.mark.parametrize("stops", [(7, 8, 20), *(pytest.param(one, marks=pytest.mark.slow) for one in ((1,), (30,)))])
def test_resuming_is_bit_identical(
    ready: Ready, whole: tuple[Run, Path], tmp_path: Path, stops: tuple[int, ...]
) -> None:
    seen: list[str] = []
    for stop in stops:
        run = fit(ready, tmp_path, stop_at=stop)
        assert run.result.interrupted
        assert run.result.step == stop
        assert f"stopped by a signal at step {stop} of {TOTAL}" in run.notes[-1]
        seen += run.batches
    last = fit(ready, tmp_path)
    assert seen + last.batches == whole[0].batches
    assert_same_end(ready, tmp_path, whole[1])
    assert_same_result(last.result, whole[0].result)


@pytest.fixture(scope="module")
def on_caches(ready: Ready, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """The same run, its rows in token caches."""
    config = ready.setup.config
    train, held_out = build_caches(config, tmp_path_factory.mktemp("caches") / "out", lambda text: None)
    data = dataclasses.replace(config.data, train=str(train), eval=str(held_out))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        made = setup.prepare(dataclasses.replace(config, data=data), lambda text: None, Times())
    assert isinstance(made.train, Cache)
    assert isinstance(made.held_out, Cache)
    return Ready(made, ready.programs)


def test_a_run_on_token_caches_is_the_same_run(
    ready: Ready, on_caches: Ready, whole: tuple[Run, Path], tmp_path: Path
) -> None:
    run = fit(on_caches, tmp_path)
    assert run.batches == whole[0].batches
    assert_same_end(ready, tmp_path, whole[1])
    assert_same_result(run.result, whole[0].result)


def test_a_run_goes_on_from_token_caches_as_from_files(
    ready: Ready, on_caches: Ready, whole: tuple[Run, Path], tmp_path: Path
) -> None:
    moved = "the training rows are the same"
    runs = []
    for rows, stop, said in ((ready, 7, False), (on_caches, 16, True), (on_caches, 22, False), (ready, None, True)):
        runs.append(fit(rows, tmp_path, stop_at=stop))
        notes = [note for note in runs[-1].notes if note.startswith("data.train was")]
        assert [note.endswith(moved) for note in notes] == [True] * said
    assert [batch for run in runs for batch in run.batches] == whole[0].batches
    assert_same_end(ready, tmp_path, whole[1])


def test_checkpoints_between_evaluations(ready: Ready, whole: tuple[Run, Path], tmp_path: Path) -> None:
    often = ready.but(checkpoint={"every": 4, "keep": 99})
    fit(often, tmp_path)
    assert_same_end(ready, tmp_path, whole[1])
    with Checkpoints(tmp_path / "checkpoints", keep=99) as store:
        steps = set(store.steps())
        best = store.best()
    # Every fourth, the last, and evaluations that were the best so far; not each evaluation.
    log = read_log(tmp_path / "log.jsonl")
    better, top = set(), -1.0
    for record in log:
        if record["kind"] == "eval" and record["accuracy"] > top:
            better.add(record["step"])
            top = record["accuracy"]
    assert steps == {*range(4, TOTAL, 4), TOTAL} | better
    assert best == max(better) == whole[0].result.best_step
    # A crash loses what came after the newest checkpoint; the log is cut back to it.
    for step in steps:
        if step > 16:
            (tmp_path / "checkpoints" / str(step) / "jaxft.json").unlink()
    resumed = fit(often, tmp_path)
    assert any(note == "resuming from step 16" for note in resumed.notes)
    assert resumed.batches == whole[0].batches[16:]
    assert_same_end(ready, tmp_path, whole[1])


def test_a_finished_run_is_not_run_again(ready: Ready, whole: tuple[Run, Path]) -> None:
    run, out = whole
    before = (out / "log.jsonl").read_bytes()
    again = fit(ready, out)
    assert again.batches == []
    assert (out / "log.jsonl").read_bytes() == before
    assert_same_result(again.result, run.result)


def test_evaluation_is_exact_with_an_uneven_last_batch(ready: Ready, whole: tuple[Run, Path]) -> None:
    params, split = whole[0].result.params, in_memory(ready.setup.held_out)
    assert len(split) % 8 != 0
    logits = []
    for i in range(len(split)):
        tokens, types = split[i]["tokens"], split[i]["types"]
        width = 12 - len(tokens)
        row = [np.pad(x, (0, width))[None] for x in (tokens, np.ones_like(tokens), types)]
        logits.append(_apply(ready.setup.model)(params, *row)[0])
    scores = np.asarray(logits, np.float64)
    logp = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    true, predicted = split.columns["labels"], scores.argmax(1)
    metrics = whole[0].result.metrics
    assert metrics["accuracy"] == (true == predicted).mean()
    assert metrics["loss"] == pytest.approx(-logp[np.arange(len(true)), true].mean(), rel=1e-6)
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (true, predicted), 1)
    assert metrics["confusion"] == confusion.tolist()
    f1 = [2 * confusion[i, i] / (confusion[i].sum() + confusion[:, i].sum()) for i in range(3)]
    assert metrics["macro_f1"] == pytest.approx(np.mean(f1))


@functools.cache
def _apply(model: Any) -> Any:
    return jax.jit(
        lambda p, tokens, mask, types: model.apply({"params": p}, tokens=tokens, mask=mask, types=types).logits
    )


# Values of a metric that is better the lower it is, at steps 2, 4, ...: the best at step 8, and two that are no better.
FALLING = (3.0, float("nan"), 2.0, 1.0, 1.0, float("inf"), 0.5)


def scripted(patch: pytest.MonkeyPatch, metric: str, sign: int, already: int = 0) -> None:
    """Held-out rows are scored as ever, but the value of ``metric`` follows FALLING."""
    real, count = loop.evaluated, iter(range(already, 100))

    def evaluated(setup: Setup, programs: Programs, params: Any) -> Evaluation:
        found = real(setup, programs, params)
        return found._replace(metrics={**found.metrics, metric: sign * FALLING[next(count)]})

    patch.setattr(loop, "evaluated", evaluated)
    patch.setattr(loop, "evaluate", lambda *run: evaluated(*run).metrics)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("metric", ["loss", "accuracy", "macro_f1", "micro_f1"])
def test_early_stopping_and_best_checkpoint(
    ready: Ready, tmp_path: Path, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign, every, best = (1 if metric == "loss" else -1), 2, 8
    stopping = ready.but(eval={"metric": metric, "patience": 2, "every": every})
    with monkeypatch.context() as patch:
        scripted(patch, metric, sign)
        one = fit(stopping, tmp_path / "one")
    log = [record for record in read_log(tmp_path / "one/log.jsonl") if record["kind"] == "eval"]
    np.testing.assert_equal([record[metric] for record in log], [sign * value for value in FALLING[:6]])
    assert one.result.best_step == best
    assert one.result.step == best + 2 * every < TOTAL
    # The parameters are those of the best step, not the last.
    assert one.result.metrics[metric] == sign * 1.0
    state, meta = stored(ready, tmp_path / "one", best)
    assert (meta["progress"]["metric"], meta["progress"]["best_value"]) == (metric, sign * 1.0)
    for a, b in zip(jax.tree.leaves(one.result.params), jax.tree.leaves(state.ema), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    with Checkpoints(tmp_path / "one/checkpoints", keep=99) as store:
        assert store.best() == best
    if metric not in ("loss", "macro_f1"):
        return
    # Patience is counted across a stop between the two bad evaluations.
    with monkeypatch.context() as patch:
        scripted(patch, metric, sign)
        fit(stopping, tmp_path / "two", stop_at=best + every + 1)
    with monkeypatch.context() as patch:
        scripted(patch, metric, sign, already=5)
        two = fit(stopping, tmp_path / "two")
    assert_same_end(ready, tmp_path / "one", tmp_path / "two", one.result.step)
    assert two.result.best_step == best
    # A run that has stopped early stays as it is.
    before = (tmp_path / "two/log.jsonl").read_bytes()
    again = fit(stopping, tmp_path / "two")
    assert again.batches == []
    assert again.result.best_step == best
    assert (tmp_path / "two/log.jsonl").read_bytes() == before
    # Unless there is more patience.
    patient = fit(stopping.but(eval={"patience": 3}), tmp_path / "two")
    assert len(patient.batches) >= every


def test_the_checkpoint_of_the_lowest_loss_is_kept(ready: Ready, tmp_path: Path) -> None:
    run = fit(ready.but(eval={"metric": "loss", "every": 6}), tmp_path)
    losses = {r["step"]: r["loss"] for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "eval"}
    assert run.result.best_step == min(losses, key=lambda step: losses[step])
    assert run.result.metrics["loss"] == min(losses.values()) < max(losses.values())


def earlier(patch: pytest.MonkeyPatch, metric: str, mode: str) -> None:
    """Checkpoints are written as by versions that had ``eval.mode``, of a run whose best value is at step 10."""
    real = Checkpoints.save

    def save(self: Checkpoints, step: int, state: Any, meta: dict[str, Any], *, best: bool = False) -> None:
        evaluation = meta["config"]["eval"] | {"metric": metric, "mode": mode}
        progress = {"best_value": 9.0, "best_step": 10, "bad_evals": 1}
        old = meta | {"config": meta["config"] | {"eval": evaluation}, "progress": progress}
        real(self, step, state, old, best=step == 10)

    patch.setattr(Checkpoints, "save", save)


@pytest.mark.parametrize(("metric", "mode"), [("accuracy", "max"), pytest.param("loss", "min", marks=pytest.mark.slow)])
def test_a_run_of_a_version_with_eval_mode_goes_on(
    ready: Ready, tmp_path: Path, metric: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        earlier(patch, metric, mode)
        fit(ready, tmp_path, stop_at=11)
    resume.check_folder(ready.setup, tmp_path, 0)
    run = fit(ready, tmp_path)  # eval.metric is not set: what the run was begun with stays
    assert not [note for note in run.notes if "warning" in note]
    _, meta = stored(ready, tmp_path, TOTAL)
    assert meta["progress"]["metric"] == metric
    # No accuracy is above 9, and each loss is below.
    assert (meta["progress"]["best_value"] == 9.0) == (metric == "accuracy")


def test_the_worst_checkpoint_of_an_earlier_version_is_not_the_best(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        earlier(patch, "loss", "max")
        fit(ready, tmp_path, stop_at=11)
    run = fit(ready.but(eval={"metric": "loss"}), tmp_path)
    warning = (
        "warning: this run of an earlier version (eval.mode=max) kept the checkpoint of the highest loss, its worst"
    )
    assert [note for note in run.notes if note.startswith(warning)]
    losses = {r["step"]: r["loss"] for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "eval" and r["step"] > 11}
    assert run.result.best_step == min(losses, key=lambda step: losses[step])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"learning_rate": 1e-3}}, "optim.learning_rate was 0.01, now 0.001;"),
        ({"optim": {"beta1": 0.8, "beta2": 0.9}}, "optim.beta1 was 0.9, now 0.8 (and 1 more);"),
        ({"train": {"batch_size": 16}}, "train.batch_size was 8, now 16;"),
        ({"model": {"arch": {}}}, "model.arch was not set, now {} (and 7 more);"),
        ({"data": {"labels": ("a", "b")}}, "data.labels was None, now ['a', 'b'];"),
    ],
)
def test_another_configuration_is_refused(
    ready: Ready, whole: tuple[Run, Path], changes: dict[str, Any], message: str
) -> None:
    before = (whole[1] / "log.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        fit(ready.but(**changes), whole[1])
    assert str(caught.value) == (
        f"{whole[1]} holds a run with another configuration: {message} give the old value to go on with it, or another "
        "train.out to begin anew"
    )
    assert (whole[1] / "log.jsonl").read_bytes() == before


def test_a_run_of_a_version_with_fewer_settings_goes_on(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    now = to_tree(config)
    before = now | {"data": {key: value for key, value in now["data"].items() if key != "packing"}}
    meta: Any = {"config": before, "seed": 0}
    assert list(resume._changes(meta, config, 0)) == []
    packed = dataclasses.replace(config, data=dataclasses.replace(config.data, packing="best_fit"))
    assert list(resume._changes(meta, packed, 0)) == [("data.packing", "'none'", "'best_fit'")]


def test_another_seed_and_resume_never_are_refused(ready: Ready, whole: tuple[Run, Path]) -> None:
    with pytest.raises(UserError, match=r"train\.seed was 0, now 1; give the old value"):
        fit(ready, whole[1], seed=1)
    with pytest.raises(UserError, match=r"already holds checkpoints; set checkpoint\.resume=auto to go on"):
        fit(ready.but(checkpoint={"resume": "never"}), whole[1])


def test_what_does_not_change_the_course_may_change(
    ready: Ready, whole: tuple[Run, Path], begun: Path, tmp_path: Path
) -> None:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    other = ready.but(data={"read_ahead": 1}, checkpoint={"every": 3, "keep": 1}, train={"out": "x", "export": False})
    fit(other, tmp_path)
    assert_same_end(ready, tmp_path, whole[1])


def test_logging_and_evaluation_may_change_too(
    ready: Ready, whole: tuple[Run, Path], begun: Path, tmp_path: Path
) -> None:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    fit(ready.but(train={"log_every": 1, "max_nonfinite": 3}, eval={"every": 8, "patience": 9}), tmp_path)
    steps = [record["step"] for record in read_log(tmp_path / "log.jsonl") if record["kind"] == "train"]
    assert steps == [3, 6, 9, *range(12, TOTAL + 1)]
    (state, _), (same, _) = stored(ready, tmp_path, TOTAL), stored(ready, whole[1], TOTAL)
    assert_same_params(state, same)


def test_the_logged_loss_is_the_mean_over_its_interval(ready: Ready, whole: tuple[Run, Path], tmp_path: Path) -> None:
    fit(ready.but(train={"log_every": 1}), tmp_path)
    each = [record for record in read_log(tmp_path / "log.jsonl") if record["kind"] == "train"]
    assert [record["step"] for record in each] == list(range(1, TOTAL + 1))
    rows = [2 if record["step"] % 13 == 0 else 8 for record in each]  # the last batch of an epoch is a short one
    for record in read_log(whole[1] / "log.jsonl"):
        if record["kind"] == "train":
            span = slice(record["step"] - 3, record["step"])
            losses = [one["loss"] for one in each[span]]
            assert record["loss"] == pytest.approx(np.average(losses, weights=rows[span]), rel=1e-12)
            assert record["grad_norm"] == each[record["step"] - 1]["grad_norm"]


def test_steps_without_a_finite_loss_are_left_out_of_the_mean() -> None:
    progress = Progress()
    for loss, weight in ((3.0, 2.0), (np.nan, 8.0), (np.inf, 8.0), (5.0, 2.0)):
        progress.add(loss, weight)
    assert progress.mean() == 2.0
    assert np.isnan(progress.mean())


def moved_on(ready: Ready, whole: tuple[Run, Path], out: Path) -> Any:
    """A copy of the finished run in ``out``, and what its last checkpoint says of itself."""
    shutil.copytree(whole[1], out, dirs_exist_ok=True)
    return stored(ready, out, TOTAL)[1]


def test_a_finished_run_can_be_made_longer(ready: Ready, whole: tuple[Run, Path], tmp_path: Path) -> None:
    meta = moved_on(ready, whole, tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    longer = ready.but(train={"steps": 40})
    run = fit(longer, tmp_path)
    # 3 steps of warm-up and 27 of decay were to end at 0; of 40 steps, 4 and 36: 10 of 36 are left.
    told = "40 steps in all, not 30: the rate of step 31 is 2.78e-03, was to be 0.00e+00 (optim.schedule=linear)"
    at = run.notes.index(told)
    assert run.notes[at + 1] == "the rates so far were those of the old length, not of the new one"
    assert run.result.step == 40
    assert len(run.batches) == 10
    assert (tmp_path / "log.jsonl").read_bytes().startswith(before)
    after = read_log(tmp_path / "log.jsonl")[len(before.splitlines()) :]
    assert [record["step"] for record in after] == [33, 36, 39, 40, 40]
    # What keeps its past: a constant rate, but only if the warm-up too is as long as before.
    for warmup, kept in ((3, True), (None, False)):
        constant = longer.but(optim={"schedule": "constant", "warmup_steps": warmup})
        line, past = resume.changes_said(constant.setup, meta | {"config": _steps(constant, 30)}, TOTAL, 0)
        assert (past == "the rates so far were those of the new length") == kept
        assert "the rate of step 31 is 1.00e-02, was to be 1.00e-02" in line


def _steps(ready: Ready, steps: int) -> dict[str, Any]:
    tree = to_tree(ready.setup.config)
    return tree | {"train": tree["train"] | {"steps": steps}}


def test_a_run_cannot_become_shorter_than_it_is(ready: Ready, whole: tuple[Run, Path]) -> None:
    message = (
        r"has done 30 steps, it cannot end at 20; set train\.steps=30 or more \(or train\.epochs\) to go on with it"
    )
    with pytest.raises(UserError, match=message):
        fit(ready.but(train={"steps": 20}), whole[1])


def test_a_run_goes_on_after_its_files_moved(
    ready: Ready, whole: tuple[Run, Path], begun: Path, tmp_path: Path
) -> None:
    meta = stored(ready, begun, 11)[1]
    shutil.copytree(begun, tmp_path / "new")
    moved = ready.but(data={"train": "elsewhere.csv", "text": "review", "tokenizer": "t"}, model={"init": "weights"})
    run = fit(moved, tmp_path / "new")
    assert_same_end(ready, tmp_path / "new", whole[1])
    said = "\n".join(run.notes)
    assert "data.train was '" in said
    assert "now 'elsewhere.csv': the training rows are the same" in said
    assert "model.init was None, now 'weights': the weights are the checkpoint's" in said
    # Other rows, or another network, are another run.
    split = in_memory(moved.setup.train)
    other = dataclasses.replace(split, columns={**split.columns, "labels": (split.columns["labels"] + 1) % 3})
    with pytest.raises(UserError, match=r"holds a run on other rows: elsewhere\.csv"):
        fit(Ready(dataclasses.replace(moved.setup, train=other), moved.programs), tmp_path / "new")
    meta["arch"]["hidden_size"] = 32
    with pytest.raises(
        UserError, match=r"a run of another model: arch\.hidden_size was 32, now 16; give the model\.init"
    ):
        resume.check_goes_on(moved.setup, meta, TOTAL, 0, tmp_path)
    # A checkpoint of the first versions does not know its rows: what it names must be what is named now.
    del meta["train_rows"]
    with pytest.raises(UserError, match=r"another configuration: data\.text was 'text', now 'review' \(and 3 more\)"):
        resume.check_goes_on(moved.setup, meta, TOTAL, 0, tmp_path)


def with_tokenizer(ready: Ready, folder: Path, change: tuple[str, str] = ("", "")) -> Ready:
    """The same run with a tokenizer in a folder of its own, with a change of its text."""
    text = (write_tokenizer(folder) / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace(*change) if change[0] else text)
    return Ready(dataclasses.replace(ready.setup, processor=Tokenizer(folder, 12, model_type="bert")), ready.programs)


def test_a_tokenizer_that_has_changed_is_said(ready: Ready, whole: tuple[Run, Path], tmp_path: Path) -> None:
    meta = moved_on(ready, whole, tmp_path / "run")
    same = with_tokenizer(ready, tmp_path / "elsewhere").setup
    assert list(resume.changes_said(same, meta, TOTAL, 0)) == []
    # A word that no row has.
    other = with_tokenizer(ready, tmp_path / "other", ('"word19"', '"word99"')).setup
    (line,) = resume.changes_said(other, meta, TOTAL, 0)
    assert line.startswith(f"warning: {tmp_path}/other: the tokenizer has changed since this run was begun")
    # Other ids of the training rows are another run.
    split = in_memory(other.train)
    rows = dataclasses.replace(split, columns={**split.columns, "tokens": split.columns["tokens"][::-1]})
    with pytest.raises(
        UserError, match=r"other rows: the tokenizer in .*other gives other ids .*; give that tokenizer"
    ):
        resume.check_goes_on(dataclasses.replace(other, train=rows), meta, TOTAL, 0, tmp_path)
    # Checkpoints of earlier versions do not know.
    del meta["tokenizer_digest"]
    assert list(resume.changes_said(other, meta, TOTAL, 0)) == []


@pytest.mark.parametrize("inside", [True, False])
def test_a_run_folder_that_moved_has_its_tokenizer(ready: Ready, tmp_path: Path, inside: bool) -> None:
    place = tmp_path / ("old/words" if inside else "words")
    fit(with_tokenizer(ready, place), tmp_path / "old", stop_at=3)
    (tmp_path / "old").rename(tmp_path / "new")
    now = tmp_path / ("new/words" if inside else "words")
    for named in ("new", "new/checkpoints", "new/checkpoints/3"):
        notes: list[str] = []
        assert predict.restored(tmp_path / named, [], notes.append)[4] == now
        assert notes == []
    # Changed since, which is said, or gone: then what the configuration names.
    path = now / "tokenizer.json"
    path.write_text(path.read_text().replace('"word19"', '"word99"'))
    predict.restored(tmp_path / "new", [], notes.append)
    assert notes == [
        f"warning: {now}: the tokenizer has changed since the run: it gives other ids than the model was trained on"
    ]
    shutil.rmtree(now)
    named = str(ready.setup.config.data.tokenizer)
    assert predict.restored(tmp_path / "new", [], notes.append)[4] == Path(named)
    assert notes[1:] == [f"{place} is gone; the tokenizer of {named} is used"]
    asked = write_tokenizer(tmp_path / "asked")
    assert predict.restored(tmp_path / "new", [f"data.tokenizer={asked}"], notes.append)[4] == asked


@pytest.mark.parametrize("what", ["rows", "metric"])
def test_the_best_so_far_is_scored_anew_when_scores_change(
    ready: Ready, whole: tuple[Run, Path], tmp_path: Path, what: str
) -> None:
    moved_on(ready, whole, tmp_path)
    best = whole[0].result.best_step
    if what == "rows":
        # With the rows that this model gets right as held-out rows, no later evaluation can be better.
        right = [i for i in range(21) if _right(ready, whole[0].result.params, i)]
        rows = ready.setup.held_out
        held_out = make_split("eval", [Encoded(rows[i], i) for i in right], rows.fields)
        other = Ready(dataclasses.replace(ready.setup, held_out=held_out), ready.programs).but(train={"steps": 35})
        value, reason = 1.0, "the held-out rows have changed: by them"
    else:
        other = ready.but(train={"steps": 35}, eval={"metric": "loss"})
        value, reason = whole[0].result.metrics["loss"], "eval.metric was 'accuracy', now 'loss': by them"
    run = fit(other, tmp_path)
    assert any(note.startswith(f"{reason}, the best step so far ({best}) has {other.setup.config.eval.metric or 'accuracy'} {value}")
               for note in run.notes)  # fmt: skip
    progress = stored(ready, tmp_path, 35)[1]["progress"]
    if what == "rows":
        assert (progress["best_value"], progress["best_step"], progress["bad_evals"]) == (1.0, best, 1)
        assert_same_params(run.result.params, whole[0].result.params)
    else:
        assert progress["best_value"] <= value


def assert_same_params(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def _right(ready: Ready, params: Any, row: int) -> bool:
    tokens, types, label = (ready.setup.held_out[row][name] for name in ("tokens", "types", "labels"))
    padded = [np.pad(x, (0, 12 - len(tokens)))[None] for x in (tokens, np.ones_like(tokens), types)]
    return int(np.argmax(_apply(ready.setup.model)(params, *padded)[0])) == label


def test_divergence_ends_the_run(ready: Ready, tmp_path: Path) -> None:
    def spoilt(programs: Mapping[Any, Any]) -> dict[Any, Any]:
        def call(program: Any, state: Any, batch: Any, seed: Any) -> Any:
            bad = batch["weights"] * (np.nan if int(state.step) >= 4 else 1.0)
            return program(state, batch | {"weights": bad}, seed)

        return {shape: lambda *a, p=program: call(p, *a) for shape, program in programs.items()}

    broken = ready.but(train={"max_nonfinite": 4, "rollbacks": 0}, checkpoint={"every": 1, "keep": 99})
    broken = dataclasses.replace(
        broken, programs=dataclasses.replace(broken.programs, train=spoilt(broken.programs.train))
    )
    with pytest.raises(UserError, match=r"^step 9: loss or gradient was not finite 5 steps in a row; lower optim"):
        fit(broken, tmp_path)
    with Checkpoints(tmp_path / "checkpoints", keep=99) as store:
        assert store.steps() == tuple(range(1, 9))
    good, _ = stored(ready, tmp_path, 4)
    after, _ = stored(ready, tmp_path, 8)
    for field in ("params", "opt_state", "ema"):
        for a, b in zip(jax.tree.leaves(getattr(good, field)), jax.tree.leaves(getattr(after, field)), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert (int(after.skipped), int(after.streak)) == (4, 4)
    # With healthy data the run goes on from there.
    assert fit(ready.but(train={"max_nonfinite": 4}), tmp_path).result.step == TOTAL


def spoilt_batches(ready: Ready, hashes: Mapping[str, bool]) -> Ready:
    """The same run, on whose batches of these hashes nothing finite comes out."""

    def call(program: Any, state: Any, batch: Any, seed: Any) -> Any:
        bad = batch["weights"] * (np.nan if digest_of(batch) in hashes else 1.0)
        return program(state, batch | {"weights": bad}, seed)

    programs = {shape: lambda *a, p=program: call(p, *a) for shape, program in ready.programs.train.items()}
    return dataclasses.replace(ready, programs=dataclasses.replace(ready.programs, train=programs))


def test_a_run_goes_back_and_leaves_out_what_is_not_finite(
    ready: Ready, whole: tuple[Run, Path], tmp_path: Path
) -> None:
    bad = dict.fromkeys(whole[0].batches[12:18], True)
    often = ready.but(train={"max_nonfinite": 4, "log_every": 1}, checkpoint={"every": 5, "keep": 99})
    broken = spoilt_batches(often, bad)
    run = fit(broken, tmp_path)
    assert run.result.step == TOTAL
    (said,) = (note for note in run.notes if "going back" in note)
    assert said == (
        "step 17: loss or gradient was not finite 5 steps in a row: going back to step 10, and leaving out the batches of "
        "steps 11 to 17 (1 of 3 times)"
    )
    # Of the second course, the first batch is the one after those; nothing that was left out is missed by what follows.
    log = [line for line in read_log(tmp_path / "log.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in log] == list(range(1, TOTAL + 1))
    assert [line.get("left_out") for line in log[:10]] == [None] * 10
    assert {line["left_out"] for line in log[10:]} == {7}
    assert log[-1]["skipped"] == 1  # the last bad batch, number 18, by itself
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.result.params))

    # Stopped after it went back, it goes on to the same end.
    first = tmp_path / "first"
    begun = fit(broken, first, stop_at=22)
    second = fit(broken, first)
    assert begun.result.interrupted
    assert not any("going back" in note for note in second.notes)
    assert (first / "log.jsonl").read_bytes() == (tmp_path / "log.jsonl").read_bytes()
    assert_same_params(second.result.params, run.result.params)


def test_a_stop_that_is_asked_for_while_a_run_goes_back_is_not_forgotten(
    ready: Ready, whole: tuple[Run, Path], tmp_path: Path
) -> None:
    bad = dict.fromkeys(whole[0].batches[12:18], True)
    broken = spoilt_batches(ready.but(train={"max_nonfinite": 4}, checkpoint={"every": 5, "keep": 99}), bad)
    with pytest.MonkeyPatch.context() as patch:
        real = loop._Run.goes_back

        def told(run: Any, found: Any, note: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return real(run, found, note)

        patch.setattr(loop._Run, "goes_back", told)
        run = fit(broken, tmp_path)
    assert (run.result.interrupted, run.result.step) == (True, 11)  # the first step of the new course
    # It has not taken the new course's checkpoints for the old one's.
    assert fit(broken, tmp_path).result.step == TOTAL


def test_a_run_goes_back_so_often_and_no_oftener(ready: Ready, tmp_path: Path) -> None:
    def call(program: Any, state: Any, batch: Any, seed: Any) -> Any:
        bad = batch["weights"] * (np.nan if int(state.step) >= 12 else 1.0)
        return program(state, batch | {"weights": bad}, seed)

    programs = {shape: lambda *a, p=program: call(p, *a) for shape, program in ready.programs.train.items()}
    broken = dataclasses.replace(ready, programs=dataclasses.replace(ready.programs, train=programs))
    broken = broken.but(train={"max_nonfinite": 2, "rollbacks": 2}, checkpoint={"every": 4})
    notes: list[str] = []
    with pytest.raises(Diverged, match=r"^step 15: loss or gradient was not finite 3 steps in a row; lower optim"):
        loop.fit(broken.setup, broken.programs, tmp_path, 0, notes.append, Times())
    back = [note for note in notes if "going back" in note]
    assert [note.partition("going back to ")[2][:7] for note in back] == ["step 12", "step 12"]


def test_parameters_that_are_not_finite_are_never_stored(ready: Ready, tmp_path: Path) -> None:
    def call(program: Any, state: Any, batch: Any, seed: Any) -> Any:
        state, metrics = program(state, batch, seed)
        if int(state.step) == 7:
            leaf = next(iter(paths_of(state.params).values()))
            spoilt = jax.tree.map(lambda p: p * np.nan if p is leaf else p, state.params)
            state = dataclasses.replace(state, params=spoilt)
        return state, metrics

    programs = {shape: lambda *a, p=program: call(p, *a) for shape, program in ready.programs.train.items()}
    broken = dataclasses.replace(ready, programs=dataclasses.replace(ready.programs, train=programs))
    first = next(iter(paths_of(ready.setup.shapes)))
    with pytest.raises(Diverged, match=rf"^step 7: parameters {first} are not finite; lower optim"):
        fit(broken.but(train={"rollbacks": 0}, checkpoint={"every": 1, "keep": 99}), tmp_path)
    with Checkpoints(tmp_path / "checkpoints", keep=99) as store:
        assert store.steps() == tuple(range(1, 7))


def test_what_was_not_finite_is_named(ready: Ready) -> None:
    """Parameters that are finite, and too large for anything to come of them."""
    setup_ = ready.setup
    params = jax.device_get(setup_.start_params(0, lambda text: None))
    huge = jax.tree.map(lambda leaf: np.full_like(leaf, 3e38), params)
    batches = setup_.train_batches(0)
    batch = to_global(batches[0], setup_.fields, setup_.mesh, setup_.model.compute.rules, batches.batch_size)
    said = not_finite(setup_, huge, batch, 0, 0)
    assert re.search(r"the loss is (nan|inf)", said)
    assert re.search(r"gradients of \d+ of \d+ tensors are not finite \(", said)
    assert not_finite(setup_, params, batch, 0, 0) == ""


def test_another_mesh_goes_on_with_the_same_data(
    ready: Ready, whole: tuple[Run, Path], folder: Path, tmp_path: Path
) -> None:
    config = config_of(folder, "eval.every=10", "mesh.data=1", "mesh.fsdp=8")
    with pytest.MonkeyPatch.context() as patch:
        sharded = prepared(config, 8, patch)
    begun = fit(ready, tmp_path, stop_at=17)
    ended = fit(sharded, tmp_path)
    assert begun.batches + ended.batches == whole[0].batches
    wanted, found = paths_of(whole[0].result.params), paths_of(ended.result.params)
    for path, leaf in wanted.items():
        if not path.endswith("key/bias"):  # its gradient is rounding alone
            np.testing.assert_allclose(found[path], leaf, atol=2e-5, err_msg=path)
    for a, b in zip(read_log(whole[1] / "log.jsonl"), read_log(tmp_path / "log.jsonl"), strict=True):
        assert a.keys() == b.keys()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_accumulation_in_the_loop(whole: tuple[Run, Path], folder: Path, tmp_path: Path) -> None:
    # Without dropout, whose bits depend on the shape of a micro-batch, accumulation must not show.
    still = ARCH.replace("{", "{hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0, ")
    few = "train.steps=5", "train.log_every=1"
    with pytest.MonkeyPatch.context() as patch:
        four = prepared(config_of(folder, still, *few, "train.accumulation=4"), 1, patch)
    run = fit(four, tmp_path)
    assert run.batches == whole[0].batches[:5]
    first, batch = read_log(tmp_path / "log.jsonl")[0], four.setup.train_batches(0)[0]
    params = init_params(four.setup.model, 0)
    logits = _apply(four.setup.model)(params, batch["tokens"], batch["mask"], batch["types"])
    logp = np.asarray(jax.nn.log_softmax(logits))[np.arange(8), batch["labels"]]
    assert first["loss"] == pytest.approx(-logp.mean(), rel=1e-5)


def test_several_seeds_share_programs(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["train.seeds=[3,4]", f"train.out={tmp_path}", "train.steps=6", "eval.every=6", "train.export=false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        patch.setattr(setup, "init_params", init_params)
        jax.config.update("jax_log_compiles", True)  # jax.log_compiles() would hold for this thread alone
        try:
            with caplog.at_level("WARNING"):
                assert main(["train", *overrides(folder, *more)]) == 0
        finally:
            jax.config.update("jax_log_compiles", False)
    compiled = [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
    for name in ("train_step", "eval_step"):
        assert sum(f"jit({name})" in message for message in compiled) == 1, compiled
    logs = [(tmp_path / f"seed{seed}" / "log.jsonl").read_bytes() for seed in (3, 4)]
    assert logs[0] != logs[1]
    assert "+-" in capsys.readouterr().out


CHILD = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny_run import ARCH, config_of, overrides, write_tokenizer
from jaxft.training import loop, resume, setup
from jaxft.training.caching import build_caches
from jaxft.training.programs import compile_programs
from jaxft.hub import pretrained
from jaxft.__main__ import main
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[2] + "/cache")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
folder = Path(sys.argv[2])
ready = setup.prepare(config_of(folder, "train.steps=120", "checkpoint.every=7", "eval.every=50"), print, setup.Times())
programs = compile_programs(ready, print)
for out in sys.argv[3:]:
    result = loop.fit(ready, programs, folder / out, 0, print, setup.Times())
    print(json.dumps({"best": result.best_step, "metrics": result.metrics}), flush=True)
"""


@pytest.mark.slow
def test_kill_and_resume_is_bit_identical(tmp_path: Path) -> None:
    def start(*outs: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path), *outs]
        # One device, quick compilation.
        flags = {"XLA_FLAGS": quick_flags()}
        return subprocess.Popen(arguments, env=os.environ | flags, stdout=subprocess.PIPE, text=True)

    checkpoints = tmp_path / "killed" / "checkpoints"
    child = start("killed")
    with child:
        deadline = time.monotonic() + 120
        while not (checkpoints.is_dir() and any(int(p.name) > 14 for p in checkpoints.iterdir() if p.name.isdigit())):
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    with start("killed", "never_stopped") as child:
        printed, _ = child.communicate(timeout=240)
    assert child.returncode == 0
    assert "resuming from step" in printed
    ends = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(ends) == 2
    assert ends[0] == ends[1]
    first, second = tmp_path / "killed", tmp_path / "never_stopped"
    assert (first / "log.jsonl").read_bytes() == (second / "log.jsonl").read_bytes()
    manifests = [json.loads((out / "checkpoints/120/jaxft.json").read_text()) for out in (first, second)]
    assert manifests[0]["meta"]["progress"] == manifests[1]["meta"]["progress"]
    states = []
    for out in (first, second):
        with Checkpoints(out / "checkpoints", keep=99) as store:
            like = _shapes_of(manifests[0]["tree"])
            states.append(store.restore(like, 120).state)
    for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
        assert a.tobytes() == b.tobytes()


def _shapes_of(tree: dict[str, Any]) -> Any:
    nested: dict[str, Any] = {}
    for path, leaf in tree.items():
        *parents, last = path.split("/")
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = np.zeros(leaf["shape"], leaf["dtype"])
    return nested
