"""A run whose rows stop coming, in a real process; and what does not count as a hang."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from quick_xla import quick_flags
from tiny_run import overrides

from jaxft.reporting.sinks import Clock
from jaxft.training.watchdog import watched

ROOT = Path(__file__).parents[1]
HANGS = """
import sys, threading
from jaxft.data import loader
from jaxft.training import loop
usual = loader.stream
def stream(*arguments):
    for number, batch in enumerate(usual(*arguments)):
        if number == 8:
            rows_that_never_come()
        yield batch
def rows_that_never_come():
    threading.Event().wait()
loop.stream = stream
from jaxft import __main__
sys.argv = ["jaxft", "train", *sys.argv[1:]]
__main__.program()
"""


def test_a_run_that_hangs_ends_and_says_where(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_flags(), "PYTHONPATH": str(ROOT)}
    out = tmp_path / "run"
    given = overrides(tmp_path, "train.watchdog=1", f"train.out={out}")
    done = subprocess.run([sys.executable, "-c", HANGS, *given], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 70, done.stderr
    assert "(train.watchdog): what each thread was doing is in" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "rows_that_never_come" in (out / "hang.txt").read_text()
    assert (out / "checkpoints" / "5" / "jaxft.json").exists()


def test_pauses_and_the_time_before_the_first_step_are_no_hang(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    with watched(clock, 0.2, tmp_path):
        time.sleep(0.5)
        clock.steps += 1
        with clock.paused():
            time.sleep(0.5)
        assert not (tmp_path / "hang.txt").exists()
        deadline = time.monotonic() + 10
        while any(thread.name == "jaxft-watchdog" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert capsys.readouterr().err.startswith("warning: no step for 0 s, after 1 here (train.watchdog)")
    with watched(clock, None, tmp_path):
        assert not any(thread.name == "jaxft-watchdog" for thread in threading.enumerate())
