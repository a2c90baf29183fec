"""The cache of compiled programs after crashes: entries that are cut off go, those that are whole stay."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from backports import zstd

from jaxft.machine.compile_cache import _is_whole, _remove_torn

SLOWLY = """
import sys, warnings
warnings.simplefilter("error")
from jaxft.machine.platform import set_up_jax
set_up_jax(sys.argv[1])
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: x * 2 + 1)(3.0))
"""


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-cache"))


def test_an_entry_that_a_crash_cut_off_is_written_anew(tmp_path: Path) -> None:
    def start() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "XLA_FLAGS": ""}
        return subprocess.run([sys.executable, "-c", SLOWLY, tmp_path], capture_output=True, text=True, env=environment)

    assert start().stdout == "7.0\n"
    whole = {path.name: path.stat().st_size for path in entries(tmp_path)}
    assert whole
    for path in entries(tmp_path):  # as kill -9 leaves them
        os.truncate(path, path.stat().st_size // 2)
    again = start()
    assert (again.returncode, again.stdout, again.stderr) == (0, "7.0\n", "")
    found = {path.name: path.stat().st_size for path in entries(tmp_path)}
    assert found.keys() == whole.keys()
    assert all(_is_whole(path) for path in entries(tmp_path))


@pytest.mark.parametrize("cut", [0, 1, 10, -1])
def test_cut_files_are_removed_and_whole_ones_stay(cut: int, tmp_path: Path) -> None:
    packed = zlib.compress(os.urandom(3_000_000))
    (tmp_path / "whole-cache").write_bytes(packed)
    (tmp_path / "torn-cache").write_bytes(packed[:cut])
    (tmp_path / "notes").write_text("not an entry")
    _remove_torn(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jaxft-checked", "notes", "whole-cache"]


def test_entries_are_checked_once(tmp_path: Path) -> None:
    _remove_torn(tmp_path)
    old, new = tmp_path / "old-cache", tmp_path / "new-cache"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, ns=(1, 1))
    _remove_torn(tmp_path)
    assert old.exists()
    assert not new.exists()


def test_a_folder_that_is_not_there_is_left_to_jax(tmp_path: Path) -> None:
    _remove_torn(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_zstd_entries_are_checked(tmp_path: Path) -> None:
    packed = zstd.compress(os.urandom(100_000))
    (tmp_path / "whole-cache").write_bytes(packed)
    (tmp_path / "torn-cache").write_bytes(packed[:-7])
    _remove_torn(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jaxft-checked", "whole-cache"]
