"""Object stores: tries again, copies in the cache, a run's folder in a bucket, who holds it; on fsspec's memory, with faults put in."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jaxft.__main__ import main
from jaxft.checkpoint.bucket import of_model, run_folder, sealed
from jaxft.checkpoint.manifest import (
    FORMAT,
    DamagedCheckpoint,
    FileSpec,
    LeafSpec,
    Manifest,
    Piece,
    hash_and_sync,
    render,
    seal,
)
from jaxft.checkpoint.mirror import Mirror, followed, mirrored
from jaxft.data.sources.read import iter_rows
from jaxft.errors import StorageError, UserError
from jaxft.machine.buckets import Store, fetched, fetched_rows, is_address, lease, patience, store
from jaxft.machine.buckets.lease import leased

Fault = Callable[[str, str], Exception | None]


@dataclass
class _Plan:
    fault: Fault = lambda what, path: None
    short: int = 0
    """So many of the next puts lose a byte on their way."""
    asked: list[tuple[str, str]] = field(default_factory=list)


PLAN = _Plan()


class Flaky(MemoryFileSystem):
    """fsspec's memory, with a record of what was asked, and errors instead of answers."""

    def _ask(self, what: str, path: str) -> None:
        PLAN.asked.append((what, path.removeprefix("memory://").lstrip("/")))
        if (error := PLAN.fault(*PLAN.asked[-1])) is not None:
            raise error

    def find(self, *args: Any, **more: Any) -> Any:
        self._ask("find", args[0])
        return super().find(*args, **more)

    def cat_file(self, *args: Any, **more: Any) -> Any:
        self._ask("get", args[0])
        return super().cat_file(*args, **more)

    def get_file(self, *args: Any, **more: Any) -> Any:
        self._ask("get", args[0])
        return super().get_file(*args, **more)

    def pipe_file(self, *args: Any, **more: Any) -> Any:
        path, value = args
        self._ask("put", path)
        if PLAN.short:
            PLAN.short -= 1
            value = value[:-1]
        return super().pipe_file(path, value, **more)

    def put_file(self, *args: Any, **more: Any) -> Any:
        self.pipe_file(args[1], Path(args[0]).read_bytes())

    def _rm(self, *args: Any, **more: Any) -> Any:
        self._ask("delete", args[0])
        return super()._rm(*args, **more)


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setitem(store.SCHEMES, "memory", (__name__, "Flaky", "memory"))
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)
    PLAN.fault, PLAN.short = (lambda what, path: None), 0
    PLAN.asked.clear()
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()


def first(times: int, what: str, error: Callable[[], Exception], part: str = "") -> Fault:
    left = [times]

    def fault(asked: str, path: str) -> Exception | None:
        if asked != what or part not in path or not left[0]:
            return None
        left[0] -= 1
        return error()

    return fault


class Answered(OSError):
    """As s3fs raises it: what the server said is on the library's own error."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(errno.EIO, "secret AKIA123")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": code}}


def test_addresses() -> None:
    assert is_address("s3://bucket/x")
    assert is_address("gs://bucket/x")
    assert not is_address("/s3://x")
    assert not is_address("http://x/y")
    assert not is_address(("s3://bucket/x",))
    for name in ("memory://", "memory:///"):
        with pytest.raises(UserError, match="name a bucket"):
            Store(name)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store.SCHEMES, "memory", ("no_such_module.core", "X", "s3"))
    with pytest.raises(UserError, match=r"needs the package no_such_module; pip install 'jaxft\[s3\]'"):
        Store("memory://b/x")


@pytest.mark.parametrize(
    "error",
    [
        lambda: Answered(503, "SlowDown"),
        lambda: Answered(500, "InternalError"),
        lambda: Answered(429, "TooManyRequests"),
        lambda: Answered(400, "RequestTimeout"),
        ConnectionResetError,
        TimeoutError,
    ],
)
def test_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]) -> None:
    one = Store("memory://b/run")
    monkeypatch.setattr(PLAN, "fault", first(3, "put", error))
    one.put("x", b"abc")
    monkeypatch.setattr(PLAN, "fault", first(3, "get", error))
    assert one.read("x") == b"abc"
    assert sum(what == "put" for what, _ in PLAN.asked) == sum(what == "get" for what, _ in PLAN.asked) == 4


@pytest.mark.parametrize(
    "error", [PermissionError, lambda: Answered(403, "AccessDenied"), lambda: Answered(400, "Bad")]
)
def test_what_lasts_is_said_at_once(monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]) -> None:
    monkeypatch.setattr(PLAN, "fault", first(99, "put", error))
    with pytest.raises(UserError, match="refused") as caught:
        Store("memory://b/run").put("x", b"abc")
    assert caught.value.exit_code == 2
    assert "AKIA" not in str(caught.value)
    assert len(PLAN.asked) == 1


def test_a_store_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXFT_STORAGE_SECONDS", "0.05")
    monkeypatch.setattr(PLAN, "fault", first(10**6, "put", lambda: Answered(503, "SlowDown")))
    with pytest.raises(
        StorageError, match=r"memory://b/run/x: given up after \d+ tries .*: HTTP 503 SlowDown"
    ) as caught:
        Store("memory://b/run").put("x", b"abc")
    assert caught.value.exit_code == 4
    assert len(PLAN.asked) > 1
    assert "AKIA" not in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_an_upload_that_lost_bytes_is_found_and_done_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    one = Store("memory://b/run")
    for put in (lambda: one.put("x", b"content"), lambda: one.upload("x", tmp_path / "file")):
        PLAN.short = 2
        put()
        assert one.read("x") == b"content"


def test_a_new_object_is_put_once() -> None:
    one = Store("memory://b/run")
    assert one.put_new("x", b"1")
    assert not one.put_new("x", b"2")
    assert one.read("x") == b"1"


# ---------------------------------------------------------------------------------------------------- copies in the cache


def test_rows_are_read_from_a_bucket_and_fetched_once() -> None:
    Store("memory://b/d").put("rows.csv", b"text,label\none,x\n")
    for _ in range(2):
        assert [row.values for row in iter_rows("memory://b/d/rows.csv", ("text", "label"))] == [("one", "x")]
    assert sum(what == "get" for what, _ in PLAN.asked) == 1
    Store("memory://b/d").put("rows.csv", b"text,label\ntwo,y\n")
    assert [row.values for row in iter_rows("memory://b/d/*.csv", ("text", "label"))] == [("two", "y")]
    assert [row.values for row in iter_rows("memory://b/d", ("text", "label"))] == [("two", "y")]


def test_what_is_not_there_is_one_line() -> None:
    Store("memory://b/d").put("rows.csv", b"text\n")
    for reference, said in (
        ("memory://b/e", "nothing here"),
        ("memory://b/d/*.txt", "asked for"),
        ("memory://*/x", "bucket"),
    ):
        with pytest.raises(UserError, match=said):
            fetched_rows(reference)


def test_several_at_once_fetch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    Store("memory://b/d").put("big", bytes(1000))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetched("memory://b/d/big"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert sum(what == "get" for what, _ in PLAN.asked) == 1


def test_names_of_a_run() -> None:
    names = [
        "config.yaml",
        "run.lock",
        "checkpoints/1/jaxft.json",
        "checkpoints/1/d/a",
        "checkpoints/2/d/a",
        "log.jsonl",
    ]
    assert "checkpoints/2/d/a" not in sealed(names)
    assert set(of_model(names)) == {"config.yaml", "log.jsonl", "checkpoints/1/jaxft.json", "checkpoints/1/d/a"}
    assert of_model([*names, "export/config.json", "export/w"]) == ["config.yaml", "export/config.json", "export/w"]
    assert run_folder("runs/x") == Path("runs/x")


# ------------------------------------------------------------------------------------------------- a run in a bucket


RUN = "memory://b/run"


def step(out: Path, number: int, *, best: bool = False) -> None:
    folder = out / "checkpoints" / str(number)
    (folder / "d").mkdir(parents=True)
    (folder / "d" / "a").write_bytes(f"array of {number}".encode())
    (folder / "_CHECKPOINT_METADATA").write_bytes(b"{}")
    seal(folder, kind="state", step=number, best=best, tree={"w": LeafSpec((1,), "float32")}, meta={})
    with open(out / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": number}) + "\n")


def there() -> list[int]:
    names = Store(RUN).entries()
    return sorted(int(name.split("/")[1]) for name in names if name.endswith("/jaxft.json") and name[0] != ".")


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def opened(out: Path, notes: list[str] | None = None, keep: int = 2):
    out.mkdir(parents=True, exist_ok=True)
    return mirrored(RUN, out, keep, ([] if notes is None else notes).append)


def test_the_seal_is_put_last_and_deleted_first(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as mirror:
        step(tmp_path / "a", 1)
        mirror.sync()
        puts = [path for what, path in PLAN.asked if what == "put" and "run.lock" not in path]
        assert puts[0] == "b/run/log.jsonl"
        assert puts[-1] == "b/run/checkpoints/1/jaxft.json"
        step(tmp_path / "a", 2)
        for path in sorted((tmp_path / "a/checkpoints/1").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        PLAN.asked.clear()
        mirror.sync()
        asked = [(what, path) for what, path in PLAN.asked if what in ("put", "delete")]
        gone = asked.index(("delete", "b/run/checkpoints/1/jaxft.json"))
        assert asked.index(("put", "b/run/checkpoints/2/jaxft.json")) < gone
        assert all(gone < at for at, (what, path) in enumerate(asked) if what == "delete" and not path.endswith("json"))
    assert there() == [2]
    assert set(Store(RUN).entries()) == {
        "log.jsonl",
        *(f"checkpoints/2/{n}" for n in ("jaxft.json", "d/a", "_CHECKPOINT_METADATA")),
    }


def test_another_machine_goes_on_with_what_is_there(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as mirror:
        step(tmp_path / "a", 1, best=True)
        step(tmp_path / "a", 2)
        mirror.sync()
    wanted = content(tmp_path / "a")
    Store(RUN).put("checkpoints/3/d/a", b"half a step")
    Store(RUN).put("notes.txt", b"someone's own")
    step(tmp_path / "b", 9)  # of an earlier run on that machine
    with opened(tmp_path / "b") as mirror:
        assert content(tmp_path / "b") == wanted
        step(tmp_path / "b", 3)
        mirror.sync()
    assert there() == [1, 2, 3]
    assert Store(RUN).read("checkpoints/3/d/a") == b"array of 3"
    assert Store(RUN).read("notes.txt") == b"someone's own"


def test_steps_that_only_their_number_keeps_are_not_fetched_and_stay(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as mirror:
        for number in (1, 2, 3, 4):
            step(tmp_path / "a", number)
        mirror.sync()
    with opened(tmp_path / "b") as mirror:
        assert not (tmp_path / "b/checkpoints/1/d").exists()
        assert (tmp_path / "b/checkpoints/1/jaxft.json").exists()
        step(tmp_path / "b", 5)
        (tmp_path / "b/checkpoints/2/jaxft.json").unlink()
        mirror.sync()
    assert there() == [1, 3, 4, 5]
    names = Store(RUN).entries()
    assert "checkpoints/1/d/a" in names
    assert "checkpoints/2/d/a" not in names


def test_a_damaged_newest_step_brings_an_older_one_and_is_kept(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as mirror:
        for number in (1, 2, 3):
            step(tmp_path / "a", number)
        mirror.sync()
    for number in (2, 3):
        Store(RUN).put(f"checkpoints/{number}/d/a", b"ARRAY of x")
    with opened(tmp_path / "b") as mirror:
        assert (tmp_path / "b/checkpoints/1/d/a").read_bytes() == b"array of 1"
        assert (tmp_path / "b/checkpoints/3/d/a").read_bytes() == b"ARRAY of x"
        (tmp_path / "b/checkpoints/3").rename(tmp_path / "b/checkpoints/.aside-3-01234567")
        step(tmp_path / "b", 3)
        mirror.sync()
    assert Store(RUN).read("checkpoints/.aside-3-01234567/d/a") == b"ARRAY of x"
    assert Store(RUN).read("checkpoints/3/d/a") == b"array of 3"


def test_every_place_where_the_store_may_fail_leaves_whole_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXFT_STORAGE_SECONDS", "0")
    for number in range(40):
        MemoryFileSystem.store.clear()
        monkeypatch.setattr(PLAN, "fault", lambda what, path: None)
        out, count = tmp_path / str(number), [0]

        def fault(what: str, path: str, count: list[int] = count, number: int = number) -> Exception | None:
            count[0] += what in ("put", "delete") and "run.lock" not in path
            return ConnectionResetError() if count[0] > number else None

        failed = False
        with opened(out) as mirror:
            step(out, 1)
            mirror.sync()
            step(out, 2)
            for path in sorted((out / "checkpoints/1").rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            monkeypatch.setattr(PLAN, "fault", fault)
            try:
                mirror.sync()
            except StorageError:
                failed = True
            monkeypatch.setattr(PLAN, "fault", lambda what, path: None)
        whole = tmp_path / f"{number}-again"
        with opened(whole):
            steps = sorted(
                int(path.name) for path in (whole / "checkpoints").iterdir() if (path / "jaxft.json").exists()
            )
            assert steps, number
            assert (whole / f"checkpoints/{steps[-1]}/d/a").read_bytes() == f"array of {steps[-1]}".encode()
        if not failed:
            assert steps == [2]
            return
    raise AssertionError("it failed to the end")


def test_a_second_run_is_refused_and_one_that_was_taken_over_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lease, "STILL_SECONDS", 20.0)
    monkeypatch.setattr(lease, "is_running", lambda pid: True)  # the other run is this process
    with opened(tmp_path / "a") as mirror:
        with pytest.raises(UserError, match="another run is at work here"), leased(RUN, lambda text: None):
            raise AssertionError
        Store(RUN).put("run.lock", b'{"host": "other", "pid": 1, "id": "x"}')
        with pytest.raises(UserError, match="taken this folder over"):
            mirror.sync()
    assert Store(RUN).read("run.lock") is not None  # the other's


@pytest.mark.parametrize("host", ["elsewhere", "here"])
def test_the_lock_of_a_dead_holder_is_taken_over(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(lease, "STILL_SECONDS", 0.05 if host == "elsewhere" else 1e6)
    name = lease.socket.gethostname() if host == "here" else host
    Store(RUN).put(
        "run.lock", json.dumps({"host": name, "processes": lease._processes(), "pid": 2**22 + 1, "id": "x"}).encode()
    )
    notes: list[str] = []
    with leased(RUN, notes.append):
        pass
    assert "ended without a word" in notes[-1]
    assert Store(RUN).read("run.lock") is None


def test_steps_of_a_bucket_are_listed_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(tmp_path / "a") as mirror:
        step(tmp_path / "a", 1)
        step(tmp_path / "a", 2, best=True)
        mirror.sync()
    Store(RUN).put("checkpoints/1/d/a", b"ARRAY of 1")
    assert main(["checkpoint", "list", RUN]) == 0
    assert "best  sizes as written" in capsys.readouterr().out
    assert main(["checkpoint", "verify", RUN]) == 1
    assert "step 1: damaged" in capsys.readouterr().out
    assert main(["checkpoint", "prune", RUN, "--keep", "1"]) == 2
    assert main(["checkpoint", "list", "memory://b/none"]) == 2


def test_seeds_and_exports_are_told_apart(tmp_path: Path) -> None:
    out = tmp_path / "a"
    with opened(out) as mirror:
        step(out / "seed0", 1)
        (out / "seed0/export").mkdir()
        for name in ("config.json", "model.safetensors", "vocab.txt"):
            (out / "seed0/export" / name).write_text(name)
        mirror.sync()
        assert isinstance(mirror, Mirror)
    with opened(tmp_path / "b") as mirror:
        assert (tmp_path / "b/seed0/checkpoints/1/d/a").exists()
        assert not (tmp_path / "b/seed0/export").exists()
        mirror.sync()
        assert Store(RUN).read("seed0/export/vocab.txt") is not None
        (tmp_path / "b/seed0/export").mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "b/seed0/export" / name).write_text("new")
        mirror.sync()
    names = Store(RUN).entries()
    assert {name for name in names if "export" in name} == {
        f"seed0/export/{n}" for n in ("config.json", "model.safetensors")
    }
    assert Store(RUN).read("seed0/export/config.json") == b"new"


# --------------------------------------------------------------------------------------------------------- two hosts


def part(mirror: Mirror, out: Path, number: int, host: int) -> dict[str, FileSpec]:
    """A host's part of a step, written and put."""
    folder = out / "checkpoints" / str(number)
    (folder / "params").mkdir(parents=True)
    (folder / f"params/part-{host:05d}").write_bytes(bytes(f"{number:03d}{host}", "ascii"))
    files = hash_and_sync(folder)
    mirror.put(folder, folder, files)
    return files


def sealed_in_parts(mirrors: dict[Path, Mirror], number: int) -> None:
    """A step whose parts are of several hosts; the first of them seals it."""
    found = [part(mirror, out, number, host) for host, (out, mirror) in enumerate(mirrors.items())]
    files = {name: spec for each in found for name, spec in each.items()}
    cut = {"params/w": [Piece((host,), (host + 1,), host, 0) for host in range(len(mirrors))]}
    tree = {"params/w": LeafSpec((len(mirrors),), "float32")}
    text = render(Manifest(FORMAT, "state", number, False, tree, {}, files, cut))
    for out, mirror in mirrors.items():
        mirror.holds(out / "checkpoints" / str(number), files)
        (out / "checkpoints" / str(number) / "jaxft.json").write_text(text)
    next(iter(mirrors.values())).sync()


def parts_there() -> list[str]:
    return sorted(name for name in Store(RUN).entries() if "/part-" in name)


def test_hosts_that_share_nothing_put_their_parts(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    Store(RUN).put("checkpoints/1/params/part-00001", b"left by a crash")
    Store(RUN).put("checkpoints/1/params/part-00007", b"left by a crash")
    a.mkdir()
    with mirrored(RUN, a, 2, [].append, apart=True) as first:
        mirrors = {a: first, b: followed(RUN, b, 2)}
        PLAN.asked.clear()
        sealed_in_parts(mirrors, 1)
        puts = [path for what, path in PLAN.asked if what == "put" and "run.lock" not in path]
        assert puts[-1] == "b/run/checkpoints/1/jaxft.json"
        assert len(puts) == len(set(puts)) == 3
        assert parts_there() == ["checkpoints/1/params/part-00000", "checkpoints/1/params/part-00001"]
        sealed_in_parts(mirrors, 2)
        shutil.rmtree(a / "checkpoints" / "1")  # as the first host does with a step that does not stay
        first.sync()
        assert parts_there() == ["checkpoints/2/params/part-00000", "checkpoints/2/params/part-00001"]
    assert there() == [2]


def test_each_host_fetches_its_own_parts(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    with mirrored(RUN, a, 2, [].append, apart=True) as first:
        mirrors = {a: first, b: followed(RUN, b, 2)}
        sealed_in_parts(mirrors, 1)
        sealed_in_parts(mirrors, 2)
    fresh = tmp_path / "c"
    mirror = followed(RUN, fresh, 2)
    assert sorted(content(fresh)) == ["checkpoints/1/jaxft.json", "checkpoints/2/jaxft.json"]
    mirror.fetch_parts(fresh / "checkpoints/2", ["params/part-00001"])
    assert (fresh / "checkpoints/2/params/part-00001").read_bytes() == b"0021"
    with pytest.raises(DamagedCheckpoint, match="part-00009: is missing"):
        mirror.fetch_parts(fresh / "checkpoints/2", ["params/part-00009"])
    with opened(tmp_path / "d"):  # one process alone has all of it
        assert set(parts_there()) <= content(tmp_path / "d").keys()
