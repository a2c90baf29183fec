"""``jaxft train --restarts``: which ends of a run are tried again, how often, and what becomes of signals. The run is a stand-in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxft.cli import restarts
from jaxft.errors import EXIT_CODES

Supervised = Callable[..., int]
ROOT = Path(__file__).parents[1]
# Takes the first of the ends that are left in a file: an exit code, a signal's number below 0, or `store` and then one of them.
RUN = """
import os, pathlib, sys, time
ends = pathlib.Path(sys.argv[2])
first, *rest = ends.read_text().split()
ends.write_text(" ".join(rest))
with open(ends.with_name("tries"), "a") as file:
    file.write(f"{os.environ['JAXFT_TRY']} {os.environ['JAXFT_LAUNCHER_PID']}\\n")
if first.startswith("store"):
    step = ends.parent / "run" / "checkpoints" / first.removeprefix("store")
    step.mkdir(parents=True)
    (step / "jaxft.json").touch()
    first = "-9"
if first == "wait":
    time.sleep(100)
if first == "stop":
    os.kill(os.getpid(), 19)
os.kill(os.getpid(), -int(first)) if int(first) < 0 else os._exit(int(first))
"""


@pytest.fixture
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervised:
    (tmp_path / "run.py").write_text(RUN)
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, str(tmp_path / "run.py")])
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(restarts, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(restarts, "_LOOK", 0.05)

    def run(ends: str, most: int = 9, silence: float | None = None) -> int:
        (tmp_path / "ends").write_text(ends)
        return restarts.supervise([str(tmp_path / "ends")], [tmp_path / "run"], most, 0, silence)

    return run


def said(tmp_path: Path) -> list[dict[str, object]]:
    path = tmp_path / "run" / "restarts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_what_may_pass_is_tried_again_and_told_apart(
    supervised: Supervised, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert supervised("-9 -11 1 134 70 71 4 0") == 0
    kinds = ["crash", "crash", "crash", "crash", "hang", "peer", "storage"]
    assert [line["kind"] for line in said(tmp_path)] == kinds
    assert [line["code"] for line in said(tmp_path)] == [-9, -11, 1, 134, 70, 71, 4]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(kinds) + 1
    assert lines[0].startswith("jaxft train: crash (SIGKILL) after step 0 was stored: start 1 of 9 again in 0.0 s")
    assert lines[-1] == "jaxft train: started again 7 times: 4 crash, 1 hang, 1 peer, 1 storage"
    tries = [line.split() for line in (tmp_path / "tries").read_text().splitlines()]
    assert tries == [[str(number), str(os.getpid())] for number in range(8)]


@pytest.mark.parametrize("code", [0, 2, 3, 5, 6, 130])
def test_what_would_come_again_is_not_tried_again(
    supervised: Supervised, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    assert supervised(f"{code} 0") == code
    assert said(tmp_path) == []
    assert capsys.readouterr().err == ""


def test_every_exit_code_has_a_kind() -> None:
    kinds = {code: restarts.kind_of(code) for code in EXIT_CODES}
    assert [code for code, kind in kinds.items() if kind == "crash"] == [1]
    assert [kinds[code] for code in (70, 71, 4, 5, 130)] == ["hang", "peer", "storage", "numerics", "stopped"]
    assert restarts.kind_of(-signal.SIGTERM) == "stopped"


@pytest.mark.parametrize(("ends", "code"), [("-9 -9 -9 0", 137), ("70 70 70 0", 70)])
def test_enough_is_enough(
    supervised: Supervised, tmp_path: Path, capsys: pytest.CaptureFixture[str], ends: str, code: int
) -> None:
    assert supervised(ends, most=2) == code
    assert len(said(tmp_path)) == 2
    assert "; given up: " in capsys.readouterr().err.splitlines()[-1]


def test_waits_double_until_a_step_is_stored(
    supervised: Supervised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "_JITTER", 0.0)
    monkeypatch.setattr(restarts, "_FIRST_WAIT", 0.1)
    monkeypatch.setattr(restarts, "_LONGEST_WAIT", 0.3)
    assert supervised("1 1 1 store7 1 0") == 0
    assert [line["wait"] for line in said(tmp_path)] == [0.1, 0.2, 0.3, 0.1, 0.2]
    assert [line["step"] for line in said(tmp_path)] == [0, 0, 0, 7, 7]


def test_a_process_that_is_stopped_is_ended_where_others_have_given_it_up(
    supervised: Supervised, tmp_path: Path
) -> None:
    assert supervised("stop 0", silence=0.2) == 0
    assert [line["code"] for line in said(tmp_path)] == [-9]


@pytest.mark.parametrize("ends", ["wait", "1 1"])
def test_a_stop_is_passed_on_and_ends_it(supervised: Supervised, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    monkeypatch.setattr(restarts, "_FIRST_WAIT", 50.0)
    script = f"import os, signal, sys, time; time.sleep(1); os.kill({os.getpid()}, signal.SIGTERM)"
    teller = subprocess.Popen([sys.executable, "-c", script])
    before = signal.getsignal(signal.SIGTERM)
    began = time.monotonic()
    assert supervised(ends) == 130
    assert time.monotonic() - began < 40
    assert signal.getsignal(signal.SIGTERM) is before
    assert teller.wait(20) == 0


def test_a_number_below_0_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jaxft", "train", "--restarts", "-1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (2, "jaxft train: error: --restarts -1: must be 0 or more\n")
