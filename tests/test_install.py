"""The wheel: what it holds, and that it works from a folder that is no checkout. Needs a registry (hatchling)."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(pip, check=True)
    (found,) = folder.glob("jaxft-*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone, installed before whatever jaxft this environment has."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*pip, str(wheel)], check=True)
    return folder


def _run(site: Path, folder: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "XLA_FLAGS")} | {"PYTHONPATH": str(site)} | more
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_the_wheel_holds_what_people_need(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        *("py.typed", "configs/runs/wordnet8_minilm.yaml", "configs/data/wordnet8/train.csv.gz"),
        *("launch/local.sh", "launch/env.sh", "launch/k8s.yaml", "launch/Dockerfile", "launch/README.md"),
        *("attention/measured.json", "attention/native/native.cc"),
    ):
        assert f"jaxft/{name}" in names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


def test_commands_work_from_any_folder(site: Path, tmp_path: Path) -> None:
    where = _run(site, tmp_path, sys.executable, "-c", "import jaxft; print(jaxft.__file__)")
    assert where.stdout.startswith(str(site)), where
    assert _run(site, tmp_path, str(site / "bin/jaxft"), "--help").returncode == 0
    shown = _run(site, tmp_path, str(site / "bin/jaxft"), "show-config", "configs/runs/wordnet8_minilm.yaml")
    assert "train: configs/data/wordnet8/train.csv.gz" in shown.stdout, shown.stderr
    reads = "from jaxft.files import find_file; print(find_file('configs/data/wordnet8/train.csv.gz', 'data'))"
    assert _run(site, tmp_path, sys.executable, "-c", reads).stdout.startswith(str(site))


def test_launchers_work_from_the_wheel_and_from_a_copy(site: Path, tmp_path: Path) -> None:
    ask = "from jaxft.files import shipped; print(shipped('launch'))"
    folder = _run(site, tmp_path, sys.executable, "-c", ask).stdout.strip()
    assert folder == str(site / "jaxft/launch")
    script = f'cp -r "{folder}" launch && bash launch/local.sh'
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = _run(site, tmp_path, "bash", "-c", script, **env)
    assert (done.returncode, done.stderr) == (2, "usage: launch/local.sh PROCESSES RUN.yaml [key=value ...]\n")
