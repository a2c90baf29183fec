"""SHA256SUMS of exported folders: what lost bytes on its way is refused before anything of it is used."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny import make_folder, refusal, run

from jaxft.errors import UserError
from jaxft.hub.sums import NAME, check_sums, write_sums

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("exported") / "m", "classification")
    (folder / "README.md").write_text("A card.\n")
    write_sums(folder)
    return folder


def copy_of(folder: Path, place: Path) -> Path:
    return shutil.copytree(folder, place / "copy")


def test_they_are_those_of_sha256sum(exported: Path) -> None:
    checked = subprocess.run(["sha256sum", "-c", NAME], cwd=exported, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    named = [line.rpartition(": ")[0] for line in checked.stdout.splitlines()]
    assert named == sorted(path.name for path in exported.iterdir() if path.name not in (NAME, "README.md"))
    assert "model.safetensors" in named
    assert "tokenizer.json" in named
    check_sums(exported)


def test_a_flipped_bit_of_any_file_is_found(exported: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = copy_of(exported, tmp_path)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for bit in rng.integers(0, 8 * len(good), 5).tolist():
            raw = bytearray(good)
            raw[bit // 8] ^= 1 << bit % 8
            path.write_bytes(raw)
            if path.name == "README.md":
                check_sums(folder)
            else:
                with pytest.raises(UserError, match=rf"{path.name}|{NAME}"):
                    check_sums(folder)
        path.write_bytes(good)
    check_sums(folder)


def test_weights_with_blocks_zeroed_or_swapped_give_no_answer(exported: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = copy_of(exported, tmp_path)
    code, _, err = run(capsys, "predict", folder, "--text", "the cat")
    assert code == 0, err
    path = folder / "model.safetensors"
    good = path.read_bytes()
    end = len(good) - 4096
    for raw in (good[:end] + bytes(4096), good[: end - 4096] + good[end:] + good[end - 4096 : end]):
        path.write_bytes(raw)
        said = refusal(capsys, "predict", folder, "--text", "the cat")
        assert f"{path}: not the file that was exported" in said
        assert len(said) <= 300 + len(str(folder))


def test_what_was_changed_on_purpose_is_read_once_its_line_is_gone(
    exported: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = copy_of(exported, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "beast", "1": "thing"}
    config.pop("label2id", None)
    (folder / "config.json").write_text(json.dumps(config))
    assert "if the change is meant, remove its line" in refusal(capsys, "predict", folder, "--text", "the cat")
    lines = (folder / NAME).read_text().splitlines(keepends=True)
    (folder / NAME).write_text("".join(line for line in lines if "config.json" not in line))
    code, out, err = run(capsys, "predict", folder, "--text", "the cat")
    assert code == 0, err
    assert set(json.loads(out)["probabilities"]) == {"beast", "thing"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0" * 64 + "  ../x", "line 1"),
        ("0" * 64 + "  /etc/passwd", "line 1"),
        ("what is this", "line 1"),
        ("0" * 64 + "  gone", "gone: missing"),
    ],
)
def test_odd_sums_are_refused(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / NAME).write_text(line + "\n")
    with pytest.raises(UserError, match=said):
        check_sums(tmp_path)
