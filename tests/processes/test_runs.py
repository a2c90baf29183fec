"""Several real processes, one device each: the same run as one process, stopped and resumed on another number of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from quick_xla import quick_flags
from safetensors.numpy import load_file
from tiny_run import overrides

from jaxft.__main__ import main
from jaxft.parallel.sharding import make_mesh
from jaxft.training import setup

ROOT = Path(__file__).parents[2]
# Without the suite's eight virtual devices.
ENV = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
    "JAX_PLATFORMS": "cpu",
    "PYTHON": sys.executable,
    "XLA_FLAGS": quick_flags(),
}
LOCAL = str(ROOT / "launch" / "local.sh")


def arguments(folder: Path, out: str, *more: str) -> list[str]:
    # A large eps: Adam would scale the rounding errors of gradients near 0 up to whole steps. A small rate: at 0.01, what
    # rounding makes of the first steps has grown to 1.2e-5 of a gradient's norm by the 51st.
    settings = (
        "train.steps=60",
        "optim.eps=1e-3",
        "optim.learning_rate=1e-3",
        "checkpoint.every=1000",
        "eval.every=30",
        f"train.out={folder / out}",
    )
    return overrides(folder, *settings, *more)


def finish(command: list[str]) -> None:
    done = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def stop_at(command: list[str], log: Path, step: int) -> int:
    """Sends SIGTERM to the launcher once ``step`` is logged; the step that the run stopped at."""
    running = subprocess.Popen(command, env=ENV, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 200
    while not (log.exists() and len(log.read_text().splitlines()) >= step // 3):
        assert running.poll() is None, running.communicate()[0][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    text, _ = running.communicate(timeout=100)
    assert running.returncode == 130, text[-2000:]
    assert "the same command goes on from there" in text
    return int(text.rsplit("stopped by a signal at step ", 1)[1].split()[0])


def logged(folder: Path, out: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("later", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_course_on_one_process_and_several(later: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # the process of the tests, on one of its devices
        patch.setattr(setup, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        assert main(["train", *arguments(tmp_path, "one")]) == 0
    two = [LOCAL, "2", *arguments(tmp_path, "many", "mesh.data=1", "mesh.fsdp=2")]
    stopped = stop_at(two, tmp_path / "many" / "log.jsonl", 9)
    assert 9 <= stopped < 60
    sizes = {2: ("mesh.data=1", "mesh.fsdp=1", "mesh.tensor=2"), 4: ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2")}
    finish([LOCAL, str(later), *arguments(tmp_path, "many", *sizes[later])])

    one, many = logged(tmp_path, "one"), logged(tmp_path, "many")
    assert [(line["step"], line["kind"]) for line in one] == [(line["step"], line["kind"]) for line in many]
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(list(b.values())[2:], list(a.values())[2:], rtol=1e-5, err_msg=str(a))
    wanted, found = (load_file(tmp_path / out / "export" / "model.safetensors") for out in ("one", "many"))
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)
    # The uneven last batch of evaluation counts exactly its rows.
    assert json.loads((tmp_path / "many" / "metrics.json").read_text())["rows"] == 21


def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(
    index: int, count: int, at: int, cwd: Path, arguments: list[str], more: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    env = ENV | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{at}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "JAXFT_HOSTS": ",".join(f"node{i}" for i in range(count)),
        "JAXFT_START_TIMEOUT": "30" if count == 2 else "2",
        "PYTHONPATH": str(ROOT),
        **(more or {}),
    }
    command = [sys.executable, "-m", "jaxft", "train", *arguments]
    return subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_missing_process_is_named_by_all_that_came(tmp_path: Path) -> None:
    at, given = port(), arguments(tmp_path, "run")
    for running in [start(i, 3, at, tmp_path, given) for i in (0, 2)]:
        _, err = running.communicate(timeout=60)
        assert running.returncode == 2
        assert len(err.splitlines()) == 1, err
        assert "1 of 3 processes did not come within 2 s: process 1 on node1; there are: 0 on" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lost", [0, 1])
def test_bad_input_of_one_process_ends_all(tmp_path: Path, lost: int) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    given = [text.replace(f"{tmp_path}/train.csv", "train.csv") for text in arguments(tmp_path, "run")]
    (folders[1 - lost] / "train.csv").write_text((tmp_path / "train.csv").read_text())
    at = port()
    errors = {}
    for index, running in enumerate([start(i, 2, at, folders[i], given) for i in (0, 1)]):
        _, errors[index] = running.communicate(timeout=60)
        assert running.returncode == 2, errors[index]
    assert "train.csv' does not exist" in errors[lost]
    assert "another process has given up; its log says why" in errors[1 - lost]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_processes_stop_and_save_when_their_launcher_goes(tmp_path: Path, number: signal.Signals) -> None:
    command = [LOCAL, "2", *arguments(tmp_path, "run", "train.steps=100000", "eval.every=100000", "mesh.data=2")]
    running = subprocess.Popen(command, env=ENV, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 200
    while not (log.exists() and log.read_text()):
        assert running.poll() is None, running.communicate()[0][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(number)
    text, _ = running.communicate(timeout=100)  # until all that write there have ended
    assert running.returncode == (130 if number == signal.SIGHUP else -signal.SIGKILL)
    assert "the state is saved, the same command goes on from there" in text
    assert not (tmp_path / "run" / "run.lock").exists()
