"""`jaxft checkpoint`: what it says of whole and damaged runs, and what it never deletes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.__main__ import main
from jaxft.checkpoint import Checkpoints
from jaxft.checkpoint.manifest import NAME

from .states import all_files, damage_arrays, saved


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    saved(Checkpoints(tmp_path / "checkpoints", keep=9), 10, 20, 30, 40, best=10)
    return tmp_path


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_list_and_verify_name_what_is_damaged(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run_folder)]) == 0
    damage_arrays(run_folder / "checkpoints/20")
    (run_folder / "checkpoints/30" / NAME).unlink()
    before = all_files(run_folder)
    capsys.readouterr()
    assert main(["checkpoint", "list", str(run_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["10", "20", "30", "40"]
    assert "best  sizes as written" in lines[0]
    assert "jaxft.json: missing" in lines[2]
    assert main(["checkpoint", "verify", str(run_folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [("damaged" in line) for line in lines] == [False, True, True, False]
    assert "/checkpoints/20/" in lines[1]
    assert main(["checkpoint", "verify", str(run_folder), "40"]) == 0
    assert all_files(run_folder) == before


def test_only_the_newest_best_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Checkpoints(tmp_path, keep=9)
    for step in (1, 2, 3):
        saved(store, step, best=step if step < 3 else None)
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    assert [("best" in line) for line in capsys.readouterr().out.splitlines()] == [False, True, False]


def test_inspect_shows_arrays_and_versions(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(run_folder), "20"]) == 0
    shown = capsys.readouterr().out
    assert "params/layers/mlp/kernel  float32[2, 8, 24]\n" in shown
    assert "at: 20\n" in shown
    assert '"orbax": ' in shown
    assert main(["checkpoint", "inspect", str(run_folder), "21"]) == 2
    assert "there is no step 21; there are: 10, 20, 30, 40" in capsys.readouterr().err


def test_prune_keeps_the_best_and_the_newest_whole_one(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage_arrays(run_folder / "checkpoints/40")
    prune = ["checkpoint", "prune", str(run_folder), "--keep", "1"]
    assert main([*prune, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("would delete step 20 (")
    assert steps_of(run_folder) == ["10", "20", "30", "40"]
    assert main([*prune, "--keep-every", "20"]) == 0
    assert steps_of(run_folder) == ["10", "20", "30", "40"]
    assert main(prune) == 0
    assert steps_of(run_folder) == ["10", "30", "40"]
    for step in ("10", "30"):
        damage_arrays(run_folder / "checkpoints" / step)
    assert main(prune) == 2
    assert steps_of(run_folder) == ["10", "30", "40"]


@pytest.mark.parametrize("words", [["inspect"], ["export", "10"], ["prune"], ["list", "10"], ["prune", "--keep", "0"]])
def test_wrong_usage_is_one_line(run_folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", words[0], str(run_folder), *words[1:]]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_jax_is_imported(run_folder: Path) -> None:
    script = f"""
import sys
sys.modules["jax"] = sys.modules["orbax"] = None
from jaxft.__main__ import main
for words in (["list"], ["verify"], ["inspect", "20"], ["prune", "--keep", "1"]):
    assert main(["checkpoint", words[0], {str(run_folder)!r}, *words[1:]]) == 0, words
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
