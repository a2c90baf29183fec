"""benchmarks/accelerator.py: a rehearsal of the whole of it on this machine, and what a stage that goes wrong costs."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxft.bench.workers import Worker
from jaxft.errors import UserError

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"
HAS_TORCH = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("transformers") is not None


@pytest.fixture(scope="module")
def accelerator() -> Any:
    kept = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("accelerator")
    finally:
        sys.path[:] = kept


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("accelerator")
    # As a user calls it: this process's eight virtual devices are not for the stages.
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, str(FOLDER / "accelerator.py"), "--rehearse", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    return out


@pytest.mark.slow  # a minute and more
def test_every_stage_finds_what_it_looks_for(rehearsed: Path) -> None:
    results = json.loads((rehearsed / "results.json").read_text())
    stages = results["stages"]
    assert {stage["state"] for stage in stages.values()} == {"ok"}

    values = stages["values"]["found"]
    assert len(values["rows"]) == 3
    for row in values["rows"]:
        assert not row["failed"]
        assert {"xla", "blockwise"} <= set(row["errors"])
        assert "cudnn" in row["refused"]
        for errors in row["errors"].values():
            assert 0 < max(errors.values()) <= values["bounds"][row["ask"]["operands"]]

    attention = stages["attention"]["found"]["rows"]
    asked = {"xla", "blockwise"} | ({"torch-sdpa"} if HAS_TORCH else set())
    assert asked <= {row["contender"] for row in attention}
    assert all(row["ms"]["both"] > 0 for row in attention)

    kinds = {"jaxft-auto"} | ({"torch-bf16-compile"} if HAS_TORCH else set())
    for name, contenders in (("step-tiny-bert-16", kinds), ("step-tiny-llama-16", {"jaxft-auto"})):
        rows = stages[name]["found"]["rows"]
        assert {row["kind"] for row in rows} == contenders
        assert all(row["tokens_per_second"] > 0 for row in rows)
    ours = next(row for row in stages["step-tiny-bert-16"]["found"]["rows"] if row["kind"] == "jaxft-auto")
    # The plan is of the very program that was timed.
    assert stages["plan-tiny-bert-16"]["found"]["memory_bytes"]["total"] == pytest.approx(
        ours["program_bytes"], rel=0.1
    )

    resume = stages["resume"]["found"]
    assert (resume["whole"]["exit"], resume["stopped"]["exit"], resume["resumed"]["exit"]) == (0, 130, 0)
    assert resume["stopped"]["lines"] < resume["steps"]
    assert resume["equal"]


@pytest.mark.slow  # a minute and more
def test_the_table_names_each_result_beside_its_goal(rehearsed: Path) -> None:
    table = (rehearsed / "table.txt").read_text()
    assert table.startswith("A REHEARSAL on a CPU")
    for part in (
        "stages: 7 of 7 ok",
        "largest relative error",
        "a train step",
        "goals: ",
        "plan off",
        "equal byte for byte",
    ):
        assert part in table
    assert "WRONG" not in table


@pytest.mark.slow  # a minute and more
def test_what_comes_back_is_few_files(rehearsed: Path) -> None:
    assert sorted(path.name for path in rehearsed.iterdir()) == ["log.txt", "results.json", "table.txt"]


@pytest.mark.skipif(not HAS_TORCH, reason="no torch")
def test_torch_takes_the_step_of_a_decoder(accelerator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the rehearsal leaves out."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    step = importlib.import_module("step")
    options = argparse.Namespace(size="tiny-llama", rows=2, length=16, dropout=0.0, compiler="eager")
    made = step.torch_step("torch-bf16-autocast", options)
    first, second = (float(made.step()) for _ in range(2))
    assert 0 < second < first < 8


def _stage(accelerator: Any, script: str, limit: float = 60.0) -> Any:
    return accelerator.Stage("tried", (sys.executable, "-c", script), limit)


def test_a_stage_that_dies_keeps_what_it_had_found(accelerator: Any, tmp_path: Path) -> None:
    script = "import os, sys; open(sys.argv[2], 'w').write('[1]'); print('so far', flush=True); os.abort()"
    made = accelerator.run_stage(_stage(accelerator, script), tmp_path / "r.json", tmp_path / "log", dict(os.environ))
    assert made["state"].startswith("failed")
    assert made["found"] == [1]
    assert made["last"][0] == "so far"
    assert "tried: failed" in (tmp_path / "log").read_text()


def test_a_stage_that_hangs_is_ended_with_its_children(accelerator: Any, tmp_path: Path) -> None:
    shell = ("sh", "-c", 'sleep 600 & echo $! > "$2"; wait', "sh")
    stage = accelerator.Stage("tried", shell, 5.0)
    made = accelerator.run_stage(stage, tmp_path / "r.json", tmp_path / "log", dict(os.environ))
    assert made["state"] == "out of time (5 s)"
    state = Path(f"/proc/{made['found']}/stat")
    for _ in range(100):  # a killed process is there until its parent has taken note
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the child lives on")


def test_contenders_have_three_quarters_of_their_stages_time(accelerator: Any, tmp_path: Path) -> None:
    script = "import sys; open(sys.argv[-1], 'w').write(sys.argv[1])"
    stage = accelerator.Stage("tried", (sys.executable, "-c", script, accelerator.READY), 400.0)
    made = accelerator.run_stage(stage, tmp_path / "r.json", tmp_path / "log", dict(os.environ), limit=80.0)
    assert made["found"] == 60


def test_nothing_is_started_when_the_time_is_up(accelerator: Any, tmp_path: Path) -> None:
    run = accelerator.Run(tmp_path, tmp_path, dict(os.environ), until=0.0, rehearsal=True)
    run.all([_stage(accelerator, "raise SystemExit(1)")])
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["stages"] == {"tried": {"state": "not started: the time was up"}}


def test_a_worker_that_does_not_answer_is_ended() -> None:
    worker = Worker("slow", [sys.executable, "-c", "import time; time.sleep(600)"])
    with pytest.raises(UserError, match="slow: no answer in time"):
        worker.read(0.2)
    worker.close()


def test_the_table_of_a_run_that_found_nothing(accelerator: Any) -> None:
    text = accelerator.text_of({"rehearsal": False, "stages": {"values": {"state": "failed (exit 1)", "last": ["no"]}}})
    assert text.splitlines() == ["stages: 0 of 1 ok", "  values: failed (exit 1): no"]


def test_a_folder_without_wheels_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "accelerator.py"), "--rehearse", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--wheels", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no wheels there" in done.stderr
