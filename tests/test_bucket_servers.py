"""The same code against servers: moto's S3 and an emulator of GCS, behind a proxy that puts faults in (jaxft[storage])."""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from faults.object_stores import KINDS, Faults, environment_of, faulty, gcs_server, s3_server

from jaxft.errors import StorageError, UserError
from jaxft.machine.buckets import Store, fetched, fetched_rows, patience
from jaxft.machine.buckets.store import SCHEMES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
_NEEDS = {"s3": ("s3fs", "moto", "flask"), "gs": ("gcsfs", "gcp_storage_emulator")}


@pytest.fixture(params=["s3", "gs"])
def bucket(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[tuple[str, Faults]]:
    scheme = request.param
    if missing := [name for name in _NEEDS[scheme] if find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'jaxft[storage]'")
    faults = Faults()
    with (s3_server if scheme == "s3" else gcs_server)() as upstream, faulty(upstream, faults) as endpoint:
        for name, value in {**environment_of(endpoint), "STORAGE_EMULATOR_HOST": endpoint}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(patience, "FIRST_WAIT", 0.01)
        module, kind, _ = SCHEMES[scheme]
        made = getattr(__import__(module, fromlist=[kind]), kind)
        made(skip_instance_cache=True, **({} if scheme == "s3" else {"project": "tests"})).mkdir("bucket")
        yield f"{scheme}://bucket/run", faults


def test_objects_come_through_faults(bucket: tuple[str, Faults], tmp_path: Path) -> None:
    address, faults = bucket
    store = Store(address)
    assert store.entries() == {}
    assert store.entry("x") is store.read("x") is None
    large = tmp_path / "large"
    large.write_bytes(random.Random(0).randbytes(3_000_000))
    faults.share = 0.25
    for number in range(12):
        store.put(f"n/{number}", b"%d" % number)
        store.upload("large", large)
        copy = tmp_path / f"copy{number}"
        store.download("large", copy, 3_000_000)
        assert copy.read_bytes() == large.read_bytes()
    assert [store.read(f"n/{number}") for number in range(12)] == [b"%d" % number for number in range(12)]
    assert fetched(address).joinpath("n/3").read_bytes() == b"3"
    assert Path(fetched_rows(f"{address}/n/1*")).parent.joinpath("11").read_bytes() == b"11"
    store.delete([f"n/{number}" for number in range(12)])
    assert set(store.entries()) == {"large"}
    assert set(faults.counts) == set(KINDS)


def test_what_lasts_is_said(bucket: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch) -> None:
    address, faults = bucket
    other = address.replace("bucket", "another")
    with pytest.raises(UserError, match="no such bucket"):
        Store(other).entries()
    with pytest.raises(UserError, match="no such bucket"):
        Store(other).put("x", b"")
    with pytest.raises(UserError, match="nothing here"):
        fetched(address)
    store = Store(address)
    store.put("x", b"1")
    monkeypatch.setenv("JAXFT_STORAGE_SECONDS", "0.3")
    faults.share = 1.0
    for kind in KINDS if address.startswith("s3") else KINDS[:1]:  # gcsfs tries for half a minute by itself
        faults.kinds = (kind,)
        with pytest.raises(StorageError, match="given up after"):
            store.read("x")


def test_an_object_is_put_only_where_there_is_none(bucket: tuple[str, Faults]) -> None:
    address, _ = bucket
    if address.startswith("gs"):
        pytest.skip("the emulator ignores ifGenerationMatch")
    store = Store(address)
    assert store.put_new("x", b"1")
    assert not store.put_new("x", b"2")
    assert store.read("x") == b"1"
