"""Programs that are told to end: by any signal, once or twice, at work in Python or outside of it; real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from quick_xla import quick_flags
from tiny_run import overrides

ROOT = Path(__file__).parents[1]
LINES = """
import hashlib, sys, threading, time
from jaxft.machine import signals
signals.GRACE_SECONDS, signals.TOGETHER_SECONDS = 0.3, 0.5
def stuck():  # in C, where Python calls no handler
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
def say_when_stuck():
    while sys._current_frames()[threading.main_thread().ident].f_code.co_name != "stuck":
        time.sleep(0.01)
    time.sleep(0.1)
    print("ready", flush=True)
"""
ENDED = "ended at once by a second signal"


pytestmark = pytest.mark.usefixtures("usual_signals")


@contextmanager
def program(body: str, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", LINES + body]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": f"{ROOT}:{cwd}"}, **pipes) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_program_that_is_stuck_in_a_library_ends_all_the_same(number: signal.Signals) -> None:
    with program("""
with signals.told_by_signals("train"):
    threading.Thread(target=say_when_stuck, daemon=True).start()
    stuck()
""") as child:
        child.send_signal(number)
        _, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (130, f"jaxft train: {number.name}: ended, whatever was under way\n")


def test_a_second_signal_ends_at_once_and_one_that_is_sent_twice_does_not() -> None:
    with program("""
with signals.told_by_signals("train") as told:
    asked = threading.Event()
    told.ask = lambda: (print("asked", flush=True), asked.set())
    print("ready", flush=True)
    while not asked.is_set():  # a handler of Python's is not called in stuck()
        time.sleep(0.05)
    stuck()
""") as child:
        child.send_signal(signal.SIGHUP)
        child.send_signal(signal.SIGHUP)
        assert child.stdout is not None
        assert child.stdout.readline() == "asked\n"
        time.sleep(1)
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err.startswith(f"jaxft train: {ENDED} (SIGTERM)")
    assert len(err.splitlines()) == 1


def test_an_import_is_not_cut_off(tmp_path: Path) -> None:
    (tmp_path / "imported_slowly.py").write_text("""
import time
print("ready", flush=True)
try:
    time.sleep(0.2)
except BaseException:
    print("cut off")
print("whole", flush=True)
""")
    with program(
        """
signals.GRACE_SECONDS = 20
with signals.told_by_signals("train"):
    try:
        import imported_slowly
        time.sleep(20)
    except signals.Told as told:
        print(told)
""",
        tmp_path,
    ) as child:
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (0, "whole\nSIGTERM\n", "")


def test_what_is_ignored_stays_ignored() -> None:
    with program("""
import signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with signals.told_by_signals("train"):
    print("ready", flush=True)
    time.sleep(1)
""") as child:
        child.send_signal(signal.SIGHUP)
        child.communicate(timeout=30)
    assert child.returncode == 0


def test_a_run_has_its_folder_to_itself_and_stops_when_its_terminal_closes(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_flags(), "PYTHONPATH": str(ROOT)}
    out = tmp_path / "run"
    given = overrides(tmp_path, "train.steps=100000", "eval.every=100000", f"train.out={out}")
    command = [sys.executable, "-m", "jaxft", "train", *given]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        try:
            log, deadline = out / "log.jsonl", time.monotonic() + 120
            while not (log.exists() and log.read_text()):
                assert first.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
            assert second.returncode == 2
            assert f"{out}: another run is at work here: process {first.pid} on" in second.stderr
            assert len(second.stderr.splitlines()) == 1
            first.send_signal(signal.SIGHUP)
            text, errors = first.communicate(timeout=60)
        finally:
            first.kill()
    assert (first.returncode, errors) == (130, "")
    assert "the state is saved, the same command goes on from there" in text
    assert not (out / "run.lock").exists()
