"""A sample of the malformed inputs, in this process; all of them, each in a process of its own, in `make test-slow`."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxft
from faults.malformed import Case, all_cases
from faults.malformed.case import make_sound
from faults.run_malformed import Ended, snapshot, wrong_with
from jaxft import __main__
from jaxft.errors import LONGEST_LINE, one_line

KINDS = ("weights", "config", "tokenizer", "data", "run", "checkpoint")
EACH = 5
LONGEST_WAIT = 60


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("malformed") / "sound"
    make_sound(folder)
    return folder


@pytest.fixture
def alarm() -> Iterator[None]:
    """A command that waits for ever ends in an error."""

    def told(number: int, frame: object) -> None:
        raise TimeoutError(f"still running after {LONGEST_WAIT} s")

    before = signal.signal(signal.SIGALRM, told)
    signal.alarm(LONGEST_WAIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(case: Case, folder: Path, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What is wrong about how a case ended here."""
    case.damage(folder)
    before = snapshot(folder)
    capfd.readouterr()
    try:
        code: int | None = __main__.main(list(case.command))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else None
    out, err = capfd.readouterr()
    after = snapshot(folder)
    written = [str(path) for path in after.keys() | before.keys() if after.get(path) != before.get(path)]
    # How long it took and what memory it needed, the slow test looks at: here other tests are running.
    return wrong_with(case, Ended(code=code, out=out, err=err, seconds=0, cpu=0, memory=0, written=written))


def test_there_are_hundreds_of_every_part() -> None:
    counts = {kind: sum(case.kind == kind for case in all_cases()) for kind in KINDS}
    assert sum(counts.values()) == len(all_cases())
    assert min(counts.values()) >= 100, counts


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_refused_in_one_line(
    kind: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Those that may be understood would be computed with, which takes seconds.
    certain = [case for case in all_cases() if case.kind == kind and 0 not in case.codes]
    for number, case in enumerate(random.Random(kind).sample(certain, EACH)):
        folder = tmp_path / str(number)
        shutil.copytree(sound, folder, symlinks=True)
        monkeypatch.chdir(folder)
        assert refused(case, folder, capfd) == [], case.id


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_are_refused_within_bounds(kind: str) -> None:
    program = Path(__file__).with_name("run_malformed.py")
    done = subprocess.run(
        [sys.executable, str(program), "--quiet", "--kind", kind],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(jaxft.__file__).parents[1],
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_what_is_echoed_is_cut() -> None:
    path, advice = "/data/model/config.json", "give another one"
    line = one_line(f"{path}: {'x' * 10**6!r} is no value;\n{advice}")
    assert line.startswith(path)
    assert line.endswith(advice)
    assert len(line) < 200
    many = one_line(f"{path}: {'word ' * 10_000}; {advice}")
    assert len(many) == LONGEST_LINE
    assert many.startswith(path)
    assert many.endswith(advice)
    assert one_line("a\n  b\x1b[31m") == "a b\\x1b[31m"
