"""`jaxft convert`: every form in, every form out, bit for bit; what does not fit is listed; nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import make_folder, refusal, run

from jaxft.commands.convert import parse_size
from jaxft.errors import UserError

Capture = pytest.CaptureFixture[str]
HEADS = (None, "classification", "masked_lm", "next_sentence")


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _same(a: Path, b: Path) -> None:
    ours, theirs = _tensors(a), _tensors(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.tobytes() == theirs[name].tobytes(), name


def _ok(capsys: Capture, *arguments: object) -> str:
    code, out, err = run(capsys, "convert", *arguments)
    assert (code, err) == (0, ""), err
    return out


@pytest.mark.parametrize(
    ("head", "dtype"),
    [*((head, "float32") for head in HEADS), ("classification", "bfloat16"), (None, "float16")],
)
def test_there_and_back_is_bit_equal(tmp_path: Path, capsys: Capture, head: str | None, dtype: str) -> None:
    source = make_folder(tmp_path / "source", head, ("b", "a") if head == "classification" else None, dtype=dtype)
    _ok(capsys, source, tmp_path / "again")
    _same(source, tmp_path / "again")
    config = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "again/config.json").read_text()) == config
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        assert (source / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    _ok(capsys, source, tmp_path / "stored", "--to", "jaxft")
    _ok(capsys, tmp_path / "stored", tmp_path / "back")
    _same(source, tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text()) == config


def test_shards(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source")
    _ok(capsys, source, tmp_path / "shards", "--shard-size", "3KB")
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert max(sum(tensor.nbytes for tensor in load_file(file).values()) for file in files) <= 3000
    _ok(capsys, tmp_path / "shards", tmp_path / "whole")
    _same(source, tmp_path / "whole")
    files[1].unlink()
    assert files[1].name in refusal(capsys, "convert", tmp_path / "shards", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "100kb", "1.5 MB", "7")] == [5 * 10**9, 10**5, 1500000, 7]
    for text in ("", "0", "-1GB", "5XB", "GB", "0.1B"):
        with pytest.raises(UserError, match="expected a size"):
            parse_size(text)


def test_dtype(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source")
    _ok(capsys, source, tmp_path / "half", "--dtype", "bfloat16")
    expected = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in _tensors(source).items()}
    found = _tensors(tmp_path / "half")
    assert all(found[name].tobytes() == tensor.tobytes() for name, tensor in expected.items())
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def test_head_is_dropped_or_made_and_said(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source", "classification", ("x", "y", "z"))
    out = _ok(capsys, source, tmp_path / "bare", "--head", "none")
    assert "in the checkpoint, not used: classifier.weight, classifier.bias" in out
    bare = _tensors(tmp_path / "bare")
    assert all(
        bare[name.removeprefix("bert.")].tobytes() == t.tobytes()
        for name, t in _tensors(source).items()
        if "bert." in name
    )
    assert json.loads((tmp_path / "bare/config.json").read_text())["architectures"] == ["BertModel"]
    out = _ok(capsys, tmp_path / "bare", tmp_path / "headed", "--head", "classification")
    assert "initialised afresh: head/linear/kernel, head/linear/bias" in out
    assert "classifier.weight" in _tensors(tmp_path / "headed")


def test_a_checkpoint_keeps_its_head(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source", "classification", ("x", "y"))
    _ok(capsys, source, tmp_path / "stored", "--to", "jaxft")
    message = refusal(capsys, "convert", tmp_path / "stored", tmp_path / "no", "--head", "none")
    assert "the checkpoint has head classification" in message
    assert not (tmp_path / "no").exists()


def _edit_config(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    path = folder / "config.json"
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if key not in drop}))


def test_what_config_json_gets_wrong_is_said(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source", "classification", ("x", "y", "z"))
    _edit_config(source, drop=("model_type", "id2label", "label2id"), num_labels=5)
    out = _ok(capsys, source, tmp_path / "again")
    assert "config.json has no model_type: 'bert' follows from architectures" in out
    assert "config.json says 5 labels, the weights have 3: the weights are believed" in out
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert (config["model_type"], len(config["id2label"])) == ("bert", 3)


def test_old_names_of_norm_parameters(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source", "masked_lm")
    old = shutil.copytree(source, tmp_path / "old")
    renamed = {}
    for name, tensor in _tensors(source).items():
        if "LayerNorm" in name:
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        renamed[name] = tensor
    save_file(renamed, old / "model.safetensors")
    _ok(capsys, old, tmp_path / "again")
    _same(source, tmp_path / "again")


def test_all_that_does_not_fit_is_listed_together(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source")
    tensors = _tensors(source)
    del tensors["embeddings.LayerNorm.bias"]
    tensors["embeddings.token_type_embeddings.weight"] = np.zeros((2, 8), np.float32)
    tensors["adapter.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, source / "model.safetensors")
    message = refusal(capsys, "convert", source, tmp_path / "no")
    assert "1 missing: bert.embeddings.LayerNorm.bias" in message
    assert "1 unused: adapter.weight" in message
    assert "1 mis-shaped: embeddings.token_type_embeddings.weight is [2, 8], expected [2, 16]" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "source.tokenizer"]


def test_targets(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source")
    (tmp_path / "empty").mkdir()
    _ok(capsys, source, tmp_path / "empty")
    assert "already exists" in refusal(capsys, "convert", source, tmp_path / "empty")
    _ok(capsys, source, tmp_path / "deep/er/still")
    assert (tmp_path / "deep/er/still/model.safetensors").is_file()


def test_nothing_is_left_when_writing_fails(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxft import pretrained

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "config.json")

    source = make_folder(tmp_path / "source")
    monkeypatch.setattr(pretrained, "write_atomic", full)
    assert "No space left on device" in refusal(capsys, "convert", source, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "source.tokenizer"]


def test_old_flax_file(tmp_path: Path, capsys: Capture) -> None:
    import msgpack

    source = make_folder(tmp_path / "source", "classification", ("x", "y"))
    tree: dict[str, Any] = {}
    for name, tensor in _tensors(source).items():
        *path, last = name.split(".")
        value = tensor
        if "embeddings" in path[-1]:
            last = "embedding"
        elif "LayerNorm" in path[-1]:
            last = {"weight": "scale"}.get(last, last)
        elif last == "weight":
            last, value = "kernel", tensor.T
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        packed = msgpack.packb((value.shape, value.dtype.name, np.ascontiguousarray(value).tobytes()))
        node[last] = msgpack.ExtType(1, packed)
    (source / "flax_model.msgpack").write_bytes(bytes(msgpack.packb(tree) or b""))
    (source / "model.safetensors").rename(tmp_path / "kept.safetensors")
    _ok(capsys, source, tmp_path / "again")
    (tmp_path / "kept.safetensors").rename(source / "model.safetensors")
    _same(source, tmp_path / "again")


# ------------------------------------------------------------------------------------------------- against the reference


def test_old_torch_file(tmp_path: Path, capsys: Capture) -> None:
    torch = pytest.importorskip("torch")
    source = make_folder(tmp_path / "source", "next_sentence")
    old = shutil.copytree(source, tmp_path / "old")
    (old / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(t.copy()) for name, t in _tensors(source).items()}, old / "pytorch_model.bin")
    _ok(capsys, old, tmp_path / "again")
    _same(source, tmp_path / "again")


@pytest.mark.parametrize("head", HEADS)
def test_check(tmp_path: Path, capsys: Capture, head: str | None) -> None:
    pytest.importorskip("torch")
    source = make_folder(tmp_path / "source", head)
    code, out, _ = run(capsys, "convert", source, tmp_path / "target", "--check", "--dtype", "bfloat16")
    assert code == 0, out
    assert "NO" not in out


def test_check_fails_with_exit_code_1(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from jaxft import parity

    monkeypatch.setattr(parity, "TOLERANCE", 0.0)
    source = make_folder(tmp_path / "source", "classification")
    code, out, _ = run(capsys, "convert", source, tmp_path / "target", "--check")
    assert code == 1
    assert "NO" in out


def test_check_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    source = make_folder(tmp_path / "source")
    _ok(capsys, source, tmp_path / "stored", "--to", "jaxft")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a))
    assert "pip install torch" in refusal(capsys, "convert", source, tmp_path / "no", "--check")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: True if name == "torch" else find(name, *a))
    assert "use --to hf" in refusal(capsys, "convert", tmp_path / "stored", tmp_path / "no", "--to", "jaxft", "--check")
    assert not (tmp_path / "no").exists()


def test_peak_memory_of_loading(tmp_path: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    try:
        import load
    finally:
        sys.path.pop(0)
    # A quarter of BERT-base: large enough to stand out of the noise of an allocator.
    folder = make_folder(
        tmp_path / "source",
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        vocab_size=30000,
    )
    size = (folder / "model.safetensors").stat().st_size
    assert load.measure(load._JAXFT, folder)["peak_bytes"] < 1.3 * size + 16 * 2**20
