"""Who works in a run's folder: one at a time, dead holders are followed, living ones of other hosts are left alone."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxft.errors import UserError
from jaxft.files import remove_unfinished
from jaxft.machine import lock

HOLDER = """
import sys, time
from pathlib import Path
from jaxft.machine.lock import held
with held(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        try:
            yield child
        finally:
            child.kill()


def of_another_host(folder: Path, *, pid: int = 1) -> Path:
    path = folder / lock.NAME
    path.write_text(json.dumps({"host": "node07", "pid": pid, "since": "2026-01-01 00:00:00 +0000"}))
    return path


def test_a_folder_has_one_holder_who_is_named(tmp_path: Path) -> None:
    said: list[str] = []
    with holder(tmp_path) as child:
        with pytest.raises(
            UserError, match=rf"another run is at work here: process {child.pid} on \S+, since 20"
        ) as told:
            lock.held(tmp_path, said.append).__enter__()
        assert "give another folder" in str(told.value)
        assert "remove" not in str(told.value)  # of this machine's, the kernel knows
    assert said == []


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    with holder(tmp_path) as child:
        child.kill()
        child.wait()
        said: list[str] = []
        with lock.held(tmp_path, said.append):
            assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    (line,) = said
    assert f"its holder (process {child.pid} on" in line
    assert not (tmp_path / lock.NAME).exists()


def test_nothing_is_left_and_one_process_holds_a_folder_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with lock.held(folder, print), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        lock.held(folder, print).__enter__()
    assert list(folder.iterdir()) == []


def test_threads_that_come_together_are_let_in_one_by_one(tmp_path: Path) -> None:
    inside, most, refused = [0], [0], [0]
    guard = threading.Lock()

    def come() -> None:
        for _ in range(30):
            try:
                with lock.held(tmp_path, print):
                    with guard:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                    time.sleep(0.001)
                    with guard:
                        inside[0] -= 1
            except UserError:
                refused[0] += 1

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert refused[0] > 0


def test_a_holder_of_another_host_that_gives_signs_of_life_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    path, ended = of_another_host(tmp_path), threading.Event()

    def beat() -> None:
        while not ended.wait(0.02):
            os.utime(path)

    alive = threading.Thread(target=beat)
    alive.start()
    try:
        said: list[str] = []
        with pytest.raises(UserError, match=r"process 1 on node07, since 2026.* last sign of life 0 s ago") as told:
            lock.held(tmp_path, said.append).__enter__()
    finally:
        ended.set()
        alive.join()
    assert f"if that host is dead for good, remove {path}" in str(told.value)
    assert "looking for" in said[0]


def test_a_holder_of_another_host_that_has_stood_still_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = of_another_host(tmp_path)
    os.utime(path, (time.time() - 100, time.time() - 100))
    said: list[str] = []
    with lock.held(tmp_path, said.append):
        pass
    assert len(said) == 1
    assert "process 1 on node07" in said[0]
    monkeypatch.setattr(lock, "STILL_SECONDS", 0.2)
    of_another_host(tmp_path)
    with lock.held(tmp_path, said.append):
        pass
    assert len(said) == 3  # first that it is being watched


def test_a_holder_renews_the_time_of_its_file_and_says_if_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    path = tmp_path / lock.NAME
    with lock.held(tmp_path, print):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        path.unlink()
        while any(thread.name == "jaxft-lock" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "has been removed: another run may now begin here" in capsys.readouterr().err


def test_where_files_cannot_be_locked_the_living_are_told_by_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    said: list[str] = []
    with holder(tmp_path) as child:
        with pytest.raises(UserError, match=f"process {child.pid} on"):
            lock.held(tmp_path, said.append).__enter__()
        child.kill()
        child.wait()
        with lock.held(tmp_path, said.append):
            pass
    assert len(said) == 1


def test_a_folder_that_cannot_be_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        lock.held(tmp_path / "file" / "run", print).__enter__()


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".export.0123abcd" / "deep").mkdir(parents=True)
    (tmp_path / ".config.yaml.89abcdef").write_text("half")
    kept = {".env", ".notes.txt", "log.jsonl", "x.0123abcd", ".aside.12", "..0123abcd"}
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".adapter.00000000").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept | {"elsewhere"}
    remove_unfinished(tmp_path / "not there")
