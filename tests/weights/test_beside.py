"""What a new model folder takes over from the one it was made of, and what it must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxft.errors import UserError
from jaxft.hub.weights import beside


def fill(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def taken(source: Path, target: Path, known: tuple[str, ...] = ()) -> tuple[set[str], list[str]]:
    notes: list[str] = []
    beside.take_over(source, target, known, notes.append)
    return {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}, notes


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return fill(tmp_path / "target", {"config.json": "{}"})


def test_texts_and_settings_are_carried_over_and_said(tmp_path: Path, target: Path) -> None:
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling"},
        {"path": "2_Dense"},
    ]
    files: dict[str, str | bytes] = {
        "config.json": '{"of": "the source"}',
        "README.md": "# a model",
        "LICENSE": "do",
        "generation_config.json": '{"max_length": 20}',
        "modules.json": json.dumps(modules),
        "1_Pooling/config.json": "{}",
        "2_Dense/config.json": "{}",
        "2_Dense/model.safetensors": b"weights of its own",
        "model-00001-of-00002.safetensors": b"",
        "model.safetensors.index.json": "{}",
        "pytorch_model.bin": b"",
        ".gitattributes": "",
    }
    found, notes = taken(fill(tmp_path / "source", files), target)
    wanted = {"README.md", "LICENSE", "generation_config.json", "modules.json", "1_Pooling/config.json"}
    wanted |= {"2_Dense/config.json", "2_Dense/model.safetensors"}
    assert found == wanted | {"config.json"}
    assert (target / "config.json").read_text() == "{}"
    assert len(notes) == 1
    assert all(name in notes[0] for name in wanted)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("modeling.py", "code"),
        ("install.sh", "code"),
        ("tf_model.h5", "weights or binary data"),
        ("onnx.onnx", "weights or binary data"),
        ("optimizer.pt", "weights or binary data"),
        ("1_Pooling/pytorch_model.bin", "weights or binary data"),
        ("adapter_config.json", "adapters, which transformers would load on top"),
        ("adapter_model.safetensors", "adapters, which transformers would load on top"),
        ("rows.csv", "of unknown kind"),
        ("checkpoint-500/config.json", "folder"),
    ],
)
def test_code_weights_and_strangers_are_left_behind_and_said(tmp_path: Path, target: Path, name: str, why: str) -> None:
    source = fill(tmp_path / "source", {name: "x", "modules.json": '[{"path": "1_Pooling"}, {"path": "../target"}]'})
    found, notes = taken(source, target, ("modules.json",))
    assert found == {"config.json"}
    shown = "checkpoint-500" if "checkpoint" in name else name
    assert notes == [f"left behind in {source}: {shown} ({why})"]


def test_large_files_are_left_behind_and_said(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "LARGEST", 10**6)
    source = fill(tmp_path / "source", {"table.json": b"1" * 2_000_000})
    assert taken(source, target) == ({"config.json"}, [f"left behind in {source}: table.json (2 MB)"])


def test_links_out_of_the_folder_are_left_behind(tmp_path: Path, target: Path) -> None:
    secret = fill(tmp_path / "home", {"secret.txt": "secret"}) / "secret.txt"
    source = fill(tmp_path / "hub" / "snapshots" / "abc", {})
    source.mkdir(parents=True)
    fill(tmp_path / "hub" / "blobs", {"1234": "# a card"})
    (source / "README.md").symlink_to(tmp_path / "hub" / "blobs" / "1234")
    (source / "notes.txt").symlink_to(secret)
    found, notes = taken(source, target)
    assert found == {"config.json", "README.md"}
    assert (target / "README.md").read_text() == "# a card"
    assert notes[1] == f"left behind in {source}: notes.txt (a link to elsewhere)"


def test_settings_that_name_code_are_taken_out(tmp_path: Path, target: Path) -> None:
    source = fill(
        tmp_path / "source", {"processor_config.json": '{"auto_map": {"AutoProcessor": "code.P"}, "size": 3}'}
    )
    _, notes = taken(source, target)
    assert json.loads((target / "processor_config.json").read_text()) == {"size": 3}
    assert notes[1] == f"left behind in {source}: auto_map of processor_config.json"


def test_broken_lists_of_modules_are_refused(tmp_path: Path, target: Path) -> None:
    source = fill(tmp_path / "source", {"modules.json": "["})
    with pytest.raises(UserError, match=r"modules\.json: not valid JSON"):
        taken(source, target)


def test_thresholds_of_other_weights_are_left_behind(tmp_path: Path, target: Path) -> None:
    found, notes = taken(fill(tmp_path / "source", {"thresholds.json": "{}"}), target)
    assert found == {"config.json"}
    assert notes == [f"left behind in {tmp_path / 'source'}: thresholds.json (tuned for other weights)"]
