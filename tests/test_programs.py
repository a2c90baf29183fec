"""Programs are compiled beside the training, in the order in which they are needed."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import pytest
from tiny_run import config_of

from jaxft.checkpoint import Checkpoints
from jaxft.data.batch import text_shape
from jaxft.data.examples import Encoded, Examples, Split, make_split
from jaxft.errors import UserError
from jaxft.machine.threads import Ahead
from jaxft.parallel.sharding import make_mesh
from jaxft.training import loop, programs, setup
from jaxft.training.setup import Setup, Times

SEED = 1  # with it, several batches of one shape come first
SHORT, LONG = text_shape(8, 6), text_shape(8, 12)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("run")
    more = (
        "data.buckets=[6, 12]",
        "train.steps=8",
        "eval.every=8",
        "train.log_every=1",
        f"train.seed={SEED}",
        "checkpoint.every=8",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        return setup.prepare(config_of(folder, *more), lambda text: None, Times())


def fit(ready: Setup, made: programs.Programs, out: Path) -> tuple[loop.Result, list[str]]:
    notes: list[str] = []
    return loop.fit(ready, made, out, SEED, notes.append, Times()), notes


@pytest.fixture(scope="module")
def whole(ready: Setup, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, programs.Programs]:
    """The log of a run whose programs were all there, and those."""
    out, made = tmp_path_factory.mktemp("whole"), programs.compile_programs(ready, lambda text: None)
    assert made.compilation.wait("train", tuple(made.train))
    fit(ready, made, out)
    return (out / "log.jsonl").read_bytes(), made


def held_back(
    ready: Setup, monkeypatch: pytest.MonkeyPatch, made: programs.Programs, gate: Callable[[programs.Name], None]
) -> programs.Programs:
    """The same programs, each there once ``gate`` lets it pass."""

    class Gated(Ahead[programs.Name, Any]):
        def __init__(self, function: Any, names: Any, count: int, **how: Any) -> None:
            def passed(name: programs.Name) -> programs.Compiled:
                gate(name)
                kind, shape = name
                program = (made.train if kind == "train" else made.evaluate)[shape]
                return programs.Compiled(cast(jax.stages.Compiled, program), [])

            super().__init__(passed, names, count, **how)

    monkeypatch.setattr(programs, "Ahead", Gated)
    return programs.compile_programs(ready, lambda text: None)


def first_two(ready: Setup) -> tuple[Any, Any, int]:
    """The shape of the first step, the other one, and the step that first has it."""
    batches = ready.train_batches(SEED)
    shapes = [batches.shape_of(step) for step in range(8)]
    assert set(shapes) == {SHORT, LONG}
    other = SHORT if shapes[0] == LONG else LONG
    assert shapes.index(other) >= 2  # or nothing would be trained before the wait
    return shapes[0], other, shapes.index(other)


def test_the_order_is_that_of_need(ready: Setup) -> None:
    batches, held_out = ready.train_batches(SEED), ready.eval_batches()
    first, other, at = first_two(ready)
    evals = [("eval", shape) for shape in held_out.shapes()]
    assert programs.needed(ready, batches, held_out, 0) == [("train", first), ("train", other), *evals]
    assert programs.needed(ready, batches, held_out, at)[0] == ("train", other)
    # A run that has ended needs evaluations alone.
    assert programs.needed(ready, batches, held_out, 8)[: len(evals)] == evals


def test_a_test_of_other_lengths_has_its_programs_last(
    ready: Setup, whole: tuple[bytes, programs.Programs], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ready.held_out.sizes("length") <= 6
    rows = (Encoded(ready.held_out[int(i)], 0) for i in short.nonzero()[0])
    tested = dataclasses.replace(
        ready, held_out=make_split("eval", rows, ready.held_out.fields), test=in_memory(ready.held_out)
    )
    begun: list[programs.Name] = []
    monkeypatch.setattr(programs, "_THREADS", 1)  # two that begin at once tell in any order
    made = held_back(tested, monkeypatch, whole[1], begun.append)
    assert tuple(made.evaluate) == (SHORT, LONG)
    assert made.compilation.wait("eval", (LONG,))
    assert begun[-1] == ("eval", LONG)
    assert ("eval", SHORT) in begun


def in_memory(examples: Examples) -> Split:
    assert isinstance(examples, Split)
    return dataclasses.replace(examples, name="test")


def test_training_begins_with_the_first_program_and_waits_for_the_next(
    ready: Setup, whole: tuple[bytes, programs.Programs], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, other, at = first_two(ready)
    log, lines_then = tmp_path / "log.jsonl", []

    def gate(name: programs.Name) -> None:
        if name == ("train", other):
            deadline = time.monotonic() + 60
            while not (log.exists() and len(log.read_text().splitlines()) >= at - 1):
                assert time.monotonic() < deadline, "no step was taken before all programs were there"
                time.sleep(0.01)
            lines_then.append(len(log.read_text().splitlines()))

    result, notes = fit(ready, held_back(ready, monkeypatch, whole[1], gate), tmp_path)
    assert result.step == 8
    assert lines_then
    assert lines_then[0] < 8
    assert log.read_bytes() == whole[0]
    assert any(note.startswith(f"compiled train {first}") for note in notes)


@pytest.mark.parametrize("every", [8, 1])  # 1: the step is stored already
def test_a_signal_that_comes_while_a_program_is_waited_for_saves_what_is_done(
    every: int, ready: Setup, whole: tuple[bytes, programs.Programs], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, other, at = first_two(ready)
    stored = dataclasses.replace(ready.config.checkpoint, every=every, keep=99)
    ready = dataclasses.replace(ready, config=dataclasses.replace(ready.config, checkpoint=stored))
    over, log = threading.Event(), tmp_path / "log.jsonl"

    def gate(name: programs.Name) -> None:
        if name == ("train", other):
            while not (log.exists() and len(log.read_text().splitlines()) >= at - 1):
                time.sleep(0.01)
            time.sleep(0.3)  # the loop has come to the wait
            os.kill(os.getpid(), signal.SIGTERM)
            assert over.wait(60)

    result, _ = fit(ready, held_back(ready, monkeypatch, whole[1], gate), tmp_path)
    over.set()
    assert (result.interrupted, result.step) == (True, at)
    with Checkpoints(tmp_path / "checkpoints", keep=9) as store:
        assert store.steps() == ((at,) if every == 8 else tuple(range(1, at + 1)))
    fit(ready, whole[1], tmp_path)
    assert log.read_bytes() == whole[0]


def test_a_program_that_cannot_be_made_ends_the_run_with_its_reason(
    ready: Setup, whole: tuple[bytes, programs.Programs], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, other, _ = first_two(ready)

    def gate(name: programs.Name) -> None:
        if name == ("train", other):
            raise UserError("model.attention: none of these")

    with pytest.raises(UserError, match=r"^model\.attention: none of these$"):
        fit(ready, held_back(ready, monkeypatch, whole[1], gate), tmp_path)


def test_a_program_that_ends_waits_for_what_has_been_begun() -> None:
    """A compiler in a thread that is cut off by the interpreter's end takes the process with it (seen: exit code 134)."""
    program = """
import time
from jaxft.machine.threads import Ahead
def work(name):
    time.sleep(0.2)
    print(name, flush=True)
Ahead(work, ["first", "second", "third"], 1)
time.sleep(0.05)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "first\n"
