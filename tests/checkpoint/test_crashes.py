"""Checkpoints when the process is killed, the disk is full, or something fails half-way."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.checkpoint import Checkpoints, folders, manifest, save_params
from jaxft.errors import StorageError, UserError
from jaxft.reporting.records import LineFile

SIZE = 3_000_000


def numbered(step: int, size: int = SIZE) -> dict[str, Any]:
    return {
        "params": {"a": jnp.full(size, step, jnp.float32), "b": jnp.full(7, step, jnp.bfloat16)},
        "step": jnp.int32(step),
    }


def assert_all_restore(folder: Path, size: int = SIZE) -> tuple[int, ...]:
    store = Checkpoints(folder, keep=2)
    for step in store.steps():
        for leaf in jax.tree.leaves(store.restore(numbered(0, size), step).state):
            assert (np.asarray(leaf) == step).all()
    if store.steps():
        assert store.restore(numbered(0, size)).step == store.steps()[-1]
    assert sorted(path.name for path in folder.iterdir()) == sorted(map(str, store.steps()))
    return store.steps()


# Saves without end; each fills its arrays with the number of its step.
CHILD = f"""
import sys
from pathlib import Path
import jax.numpy as jnp
from jaxft.checkpoint import Checkpoints
store = Checkpoints(Path(sys.argv[1]), keep=2)
like = {{"params": {{"a": jnp.zeros({SIZE}), "b": jnp.zeros(7, jnp.bfloat16)}}, "step": jnp.int32(0)}}
step = store.restore(like).step
print("ready", flush=True)
while True:
    step += 1
    params = {{"a": jnp.full({SIZE}, step, jnp.float32), "b": jnp.full(7, step, jnp.bfloat16)}}
    store.save(step, {{"params": params, "step": jnp.int32(step)}}, {{}}, best=step % 5 == 0)
"""


def kill_in_the_middle(folder: Path, delay: float) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == b"ready\n"
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


def kill_often(folder: Path, times: int, seed: int) -> None:
    with Checkpoints(folder, keep=2) as store:
        store.save(1, numbered(1), {})
    steps = (1,)
    rng = random.Random(seed)
    for _ in range(times):
        kill_in_the_middle(folder, rng.uniform(0, 0.6))
        found = assert_all_restore(folder)
        assert found[-1] >= steps[-1]
        steps = found
    assert steps[-1] > 1


def test_kill_during_saves(tmp_path: Path) -> None:
    kill_often(tmp_path, 5, seed=0)


@pytest.mark.slow
def test_many_kills_during_saves(tmp_path: Path) -> None:
    kill_often(tmp_path, 60, seed=1)


class _Dead(BaseException):
    """What a killed process would do from here on: nothing."""


def test_death_before_any_operation_of_a_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On disk as a kill: from the n-th unlink, rmdir or rename on, none happens any more."""
    real = {name: getattr(os, name) for name in ("unlink", "rmdir", "rename")}
    states: set[tuple[str, ...]] = set()
    with Checkpoints(tmp_path / "whole", keep=2) as store:
        for step in (1, 2):
            store.save(step, numbered(step, 10), {}, best=step == 1)
    for allowed in range(100):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(allowed))
        store = Checkpoints(folder, keep=2)
        left = [allowed]

        def counted(name: str, left: list[int] = left) -> Callable[..., Any]:
            def operation(*args: Any, **kwargs: Any) -> Any:
                if left[0] == 0:
                    raise _Dead
                left[0] -= 1
                return real[name](*args, **kwargs)

            return operation

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, counted(name))
            try:
                folders.forget(folder, 1)
            except _Dead:
                finished = False
            else:
                finished = True
        assert store.steps() in ((1, 2), (2,))
        states.add(tuple(path.name.partition("-")[0] for path in sorted(folder.iterdir())))
        assert assert_all_restore(folder, 10) == ((1, 2) if allowed == 0 else (2,))
        if finished:
            break
    assert states == {("1", "2"), (".deleting", "2"), ("2",)}
    assert allowed > 20


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Writes beyond the limit fail with EFBIG (Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_save_is_told_once_and_leaves_the_others(
    tmp_path: Path, file_size_limit: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    store = Checkpoints(tmp_path, keep=2)
    store.save(1, numbered(1), {})
    store.wait()
    file_size_limit(1_000_000)
    store.save(2, numbered(2), {})
    with pytest.raises(UserError, match=r"checkpoint of step 2 failed: .*; earlier checkpoints are intact") as error:
        store.save(3, numbered(3), {})
    assert "\n" not in str(error.value)
    assert not [record for record in caplog.records if record.exc_info]
    file_size_limit(resource.RLIM_INFINITY)
    store.wait()
    assert store.steps() == (1,)
    store.save(2, numbered(2), {})
    store.close()
    assert assert_all_restore(tmp_path) == (1, 2)


@pytest.mark.parametrize("place", ["write_atomic", "hash_and_sync"])
def test_failure_after_orbax_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Checkpoints(tmp_path / "c", keep=2)
    store.save(1, numbered(1), {})
    store.wait()
    with monkeypatch.context() as patch:
        patch.setattr(manifest, place, full)
        store.save(2, numbered(2), {})
        with pytest.raises(UserError, match=r"step 2 failed: .*No space left"):
            store.wait()
        with pytest.raises(UserError, match=r"could not be written: .*No space left"):
            save_params(tmp_path / "p", {"a": jnp.zeros(3)}, {})
    assert store.steps() == (1,)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    store.save(2, numbered(2), {})
    store.wait()
    assert assert_all_restore(tmp_path / "c") == (1, 2)


def test_a_deletion_that_fails_does_not_fail_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(tmp_path, keep=1)

    def refuse(*_: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(folders, "forget", refuse)
        store.save(1, numbered(1), {})
        store.save(2, numbered(2), {})
        with pytest.raises(UserError, match=r"step 2 is complete, but removing older ones failed: .*Permission denied"):
            store.wait()
    assert assert_all_restore(tmp_path) == (1, 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    store = Checkpoints(small_disk / "c", keep=2)
    store.save(1, numbered(1), {})
    with pytest.raises(StorageError, match=r"step 2 needs 12\.0 MB, and [78]\.\d MB are free in .*; earlier") as error:
        store.save(2, numbered(2), {})
    assert len(str(error.value)) <= 300
    # A disk that fills while it is written to, or a quota: room is only found lacking then.
    monkeypatch.setattr(store, "_check_room", lambda step, size: None)
    store.save(2, numbered(2), {})
    with pytest.raises(StorageError, match=r"step 2 failed: No space left on device; earlier checkpoints") as error:
        store.wait()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 300
    assert [record.getMessage() for record in caplog.records if record.name == "jaxft.checkpoint"] == [
        "step 2: No space left on device; saving it once more"
    ]
    assert [path.name for path in store.folder.iterdir()] == ["1"]
    assert assert_all_restore(store.folder) == (1,)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_save_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real, left = manifest.write_atomic, [1]

    def fails(*arguments: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        real(*arguments)

    monkeypatch.setattr(manifest, "write_atomic", fails)
    store = Checkpoints(tmp_path, keep=2)
    store.save(1, numbered(1, 10), {})
    store.wait()
    assert assert_all_restore(tmp_path, 10) == (1,)
    left[0] = 2
    store.save(2, numbered(2, 10), {})
    with pytest.raises(StorageError, match=f"step 2 failed: {os.strerror(number)}; earlier"):
        store.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_run_folder_that_vanishes(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints", keep=2)
    store.save(1, numbered(1, 10), {})
    store.wait()
    shutil.rmtree(store.folder)
    with pytest.raises(StorageError, match="was removed while the run stored its steps there"):
        store.save(2, numbered(2, 10), {})
    assert not store.folder.exists()
    log = LineFile(tmp_path / "log.jsonl", 0)
    log.append({"step": 1})
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(StorageError, match=r"log\.jsonl was removed while"):
        log.append({"step": 2})
    log.close()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used for checkpoints"):
        Checkpoints(tmp_path / "file", keep=2)
    with pytest.raises(UserError, match="could not be written"):
        save_params(tmp_path / "file" / "p", {"a": jnp.zeros(3)}, {})


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python 3.12 starts no thread at its end; Orbax needs some")
@pytest.mark.parametrize("fails", [False, True])
def test_a_program_that_ends_without_waiting(tmp_path: Path, fails: bool) -> None:
    code = f"""
import resource
from pathlib import Path
import jax.numpy as jnp
from jaxft.checkpoint import Checkpoints
store = Checkpoints(Path({str(tmp_path)!r}), keep=2)
if {fails}:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, -1))
store.save(1, {{"a": jnp.zeros({SIZE})}}, {{}})
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert Checkpoints(tmp_path, keep=2).steps() == (() if fails else (1,))
    assert ("checkpoint of step 1 failed" in ended.stderr) == fails
