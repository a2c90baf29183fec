"""`jaxft convert`: every form in, every form out, bit for bit; what does not fit is listed; nothing half-written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import make_folder, refusal, run

from jaxft.cli.convert import parse_size
from jaxft.errors import UserError

Capture = pytest.CaptureFixture[str]
HEADS = (None, "classification", "token_classification", "masked_lm", "next_sentence")


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
    from jaxft.hub import pretrained

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "config.json")

    source = make_folder(tmp_path / "source")
    monkeypatch.setattr(pretrained, "write_atomic", full)
    assert "No space left on device" in refusal(capsys, "convert", source, tmp_path / "target", code=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "source.tokenizer"]


def _as_flax(folder: Path) -> None:
    """The folder's weights as flax_model.msgpack alone."""
    import msgpack

    tree: dict[str, Any] = {}
    for name, tensor in _tensors(folder).items():
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
    (folder / "flax_model.msgpack").write_bytes(bytes(msgpack.packb(tree) or b""))
    (folder / "model.safetensors").unlink()


def test_old_flax_file(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source", "classification", ("x", "y"))
    old = shutil.copytree(source, tmp_path / "old")
    _as_flax(old)
    _ok(capsys, old, tmp_path / "again")
    _same(source, tmp_path / "again")


def test_check_of_an_old_flax_file(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("torch")
    source = make_folder(tmp_path / "source", "next_sentence")
    _as_flax(source)
    code, out, _ = run(capsys, "convert", source, tmp_path / "target", "--check", "--dtype", "float16")
    assert code == 0, out
    assert f"compared: {source} as jaxft reads it, since transformers cannot, with {tmp_path / 'target'}" in out


# ------------------------------------------------------------------------------------------------- numbers and names


def _edit_tensors(folder: Path, **changes: Any) -> None:
    """Replaces tensors by name (or by what a function makes of the old ones); None removes one."""
    tensors = _tensors(folder)
    for name, change in changes.items():
        tensors[name] = change(tensors[name]) if callable(change) else change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


_TABLE = "embeddings.word_embeddings.weight"


def test_stored_types_stay_as_they_are(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source")
    _edit_tensors(
        source,
        **{_TABLE: lambda t: t.astype(np.float64) + 1e-12, "pooler.dense.weight": lambda t: t.astype(np.float16)},
    )
    out = _ok(capsys, source, tmp_path / "again")
    _same(source, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "float64"
    assert "float32" not in out
    # A checkpoint of jaxft cannot hold that.
    out = _ok(capsys, source, tmp_path / "stored", "--to", "jaxft")
    assert "weights of type float16, float32, float64 are all stored as float32" in out
    _ok(capsys, tmp_path / "stored", tmp_path / "back")
    assert {str(tensor.dtype) for tensor in _tensors(tmp_path / "back").values()} == {"float32"}


@pytest.mark.parametrize("to", ["hf", "jaxft"])
def test_quantised_weights_are_refused(tmp_path: Path, capsys: Capture, to: str) -> None:
    source = make_folder(tmp_path / "source")
    _edit_tensors(source, **{_TABLE: lambda t: (t * 50).astype(np.int8)})
    message = refusal(capsys, "convert", source, tmp_path / "no", "--to", to)
    assert f"1 not floating-point (quantised weights are not read): {_TABLE} is int8" in message
    _edit_config(source, quantization_config={"quant_method": "gptq", "bits": 4})
    message = refusal(capsys, "convert", source, tmp_path / "no", "--to", to)
    assert "quantization_config says that the weights are quantised (method gptq)" in message
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("to", ["hf", "jaxft"])
@pytest.mark.parametrize(("dtype", "value"), [("float16", 7e4), ("bfloat16", 3.4e38)])
def test_numbers_beyond_a_type_are_refused(tmp_path: Path, capsys: Capture, to: str, dtype: str, value: float) -> None:
    source = make_folder(tmp_path / "source")
    _edit_tensors(
        source, **{_TABLE: lambda t: np.where(np.arange(t.size).reshape(t.shape) == 7, np.float32(-value), t)}
    )
    message = refusal(capsys, "convert", source, tmp_path / "no", "--to", to, "--dtype", dtype)
    assert f"tensor {_TABLE!r} holds {value:.6g}, which {dtype} cannot hold" in message
    assert not (tmp_path / "no").exists()
    _ok(capsys, source, tmp_path / "stored", "--to", "jaxft")
    message = refusal(capsys, "convert", tmp_path / "stored", tmp_path / "no", "--to", to, "--dtype", dtype)
    assert f"which {dtype} cannot hold" in message
    assert not (tmp_path / "no").exists()


def test_nan_is_said_once_and_written(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source", "classification")
    _edit_tensors(
        source,
        **{"classifier.bias": np.array([np.nan, 1.0], np.float32), f"bert.{_TABLE}": lambda t: t * np.float32(np.inf)},
    )
    for to in ("hf", "jaxft"):
        out = _ok(capsys, source, tmp_path / to, "--to", to)
        [line] = [line for line in out.splitlines() if "NaN or infinity in the weights: " in line]
        assert f"bert.{_TABLE}" in line
        assert "classifier.bias" in line
    _same(source, tmp_path / "hf")


def test_an_old_and_a_new_name_must_agree(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source")
    tensors = _tensors(source)
    name = "encoder.layer.1.output.LayerNorm.weight"
    old = name.replace("weight", "gamma")
    _edit_tensors(source, **{old: tensors[name].copy()})
    _ok(capsys, source, tmp_path / "again")
    assert set(_tensors(tmp_path / "again")) == set(tensors)
    _edit_tensors(source, **{old: tensors[name] + 1})
    message = refusal(capsys, "convert", source, tmp_path / "no")
    assert name in message
    assert old in message


def test_a_stored_decoder_is_kept_though_config_json_ties_it(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source", "masked_lm")
    decoder = "cls.predictions.decoder.weight"
    table = _tensors(source)[f"bert.{_TABLE}"]
    _edit_tensors(source, **{decoder: table.copy()})
    out = _ok(capsys, source, tmp_path / "equal")
    assert "untied" not in out
    assert "not used" not in out
    assert decoder not in _tensors(tmp_path / "equal")
    _edit_tensors(source, **{decoder: table * 2})
    out = _ok(capsys, source, tmp_path / "different")
    assert "config.json ties the embeddings, but the weights have another decoder of their own" in out
    assert (_tensors(tmp_path / "different")[decoder] == table * 2).all()
    assert json.loads((tmp_path / "different/config.json").read_text())["tie_word_embeddings"] is False


def test_part_of_a_head_is_not_made_up(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source", "masked_lm", tie_word_embeddings=False)
    _edit_tensors(source, **{"cls.predictions.decoder.weight": None})
    assert "1 missing: cls.predictions.decoder.weight" in refusal(capsys, "convert", source, tmp_path / "no")
    source = make_folder(tmp_path / "layer")
    _edit_tensors(source, **{"encoder.layer.0.output.dense.bias": None})
    message = refusal(capsys, "convert", source, tmp_path / "no")
    assert message.endswith("weights do not fit the model: 1 missing: bert.encoder.layer.0.output.dense.bias")


def test_how_many_labels(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source", "classification", ("x", "y", "z"))
    _edit_config(source, drop=("id2label", "label2id"))
    out = _ok(capsys, source, tmp_path / "again")
    assert "config.json does not say how many labels there are; the weights have 3" in out
    two = make_folder(tmp_path / "two", "classification", ("x", "y"))
    _edit_config(two, drop=("id2label", "label2id"))
    assert "config.json" not in _ok(capsys, two, tmp_path / "two.again")


def test_old_spellings_are_not_written_beside_new_ones(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source")
    _edit_config(source, torch_dtype="float16", auto_map={"AutoModel": "mine.Mine"}, my_key=3, num_labels=2)
    _ok(capsys, source, tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["my_key"] == 3
    assert not {"torch_dtype", "auto_map", "num_labels"} & set(config)
    assert config["dtype"] == "float32"


def test_a_checkpoint_has_its_tokenizer_with_it(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "source", "classification", ("x", "y"))
    _ok(capsys, source, tmp_path / "stored", "--to", "jaxft")
    moved = (tmp_path / "stored").rename(tmp_path / "moved")
    shutil.rmtree(source)
    _ok(capsys, moved, tmp_path / "back")
    assert (tmp_path / "back/tokenizer.json").is_file()
    assert (tmp_path / "back/vocab.txt").is_file()
    (moved / "tokenizer/vocab.txt").write_text("tampered")


# ------------------------------------------------------------------------------------------------- against the reference


def test_old_torch_file(tmp_path: Path, capsys: Capture) -> None:
    torch = pytest.importorskip("torch")
    source = make_folder(tmp_path / "source", "next_sentence")
    old = shutil.copytree(source, tmp_path / "old")
    (old / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(t.copy()) for name, t in _tensors(source).items()}, old / "pytorch_model.bin")
    _ok(capsys, old, tmp_path / "again")
    _same(source, tmp_path / "again")


@pytest.mark.parametrize("to", ["hf", "jaxft"])
@pytest.mark.parametrize("head", HEADS)
def test_check(tmp_path: Path, capsys: Capture, head: str | None, to: str) -> None:
    pytest.importorskip("torch")
    source = make_folder(tmp_path / "source", head)
    target = tmp_path / "target"
    code, out, _ = run(capsys, "convert", source, target, "--check", "--dtype", "bfloat16", "--to", to)
    assert code == 0, out
    assert f"compared: {source} as transformers reads it, with {target} as each reads it" in out
    assert "hidden states (jaxft)" in out
    assert ("hidden states (transformers)" in out) == (to == "hf")
    assert "NO" not in out


@pytest.mark.parametrize("to", ["hf", "jaxft"])
def test_check_finds_a_fault_of_the_conversion(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    pytest.importorskip("torch")
    from jaxft.models.families import bert

    right = bert.hf_layout

    def swapped(config: Any, head: str | None) -> Any:
        """Queries and keys change places: a round trip through it is bit-equal."""
        names = {"query": "key", "key": "query"}
        layout = right(config, head)
        rules = []
        for rule in layout.rules:
            *parents, name, last = rule.paths[0].split("/")
            rules.append(dataclasses.replace(rule, ours="/".join((*parents, names.get(name, name), last))))
        return dataclasses.replace(layout, rules=tuple(rules))

    monkeypatch.setattr(bert, "hf_layout", swapped)
    source = make_folder(tmp_path / "source", "classification")
    code, out, _ = run(capsys, "convert", source, tmp_path / "target", "--check", "--to", to)
    assert code == 1
    assert "NO" in out


def test_check_says_what_it_cannot_compare(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("torch")
    source = make_folder(tmp_path / "source")
    code, out, _ = run(capsys, "convert", source, tmp_path / "headed", "--head", "classification", "--check")
    assert code == 0, out
    assert "not in the source, so not compared with it: classifier.bias, classifier.weight; logits: jaxft" in out
    _ok(capsys, source, tmp_path / "stored", "--to", "jaxft")
    code, out, _ = run(capsys, "convert", tmp_path / "stored", tmp_path / "back", "--check")
    assert code == 0, out
    assert f"{tmp_path / 'stored'} as jaxft reads it, since transformers cannot, with" in out
    # What transformers refuses and jaxft does not mind.
    _edit_config(source, id2label="none")
    message = refusal(capsys, "convert", source, tmp_path / "odd", "--check")
    assert "is written, but not checked" in message


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
    _as_flax(source)
    assert "use --to hf" in refusal(capsys, "convert", source, tmp_path / "no", "--to", "jaxft", "--check")
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


_CONVERT = """
import resource, sys
import jax, jaxft
from jaxft import __main__, checkpoint
from jaxft.hub import pretrained
from jaxft.checkpoint import params
jax.devices()
jax.jit(lambda: jax.numpy.zeros(3))().block_until_ready()
import json, time
start = time.perf_counter()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert __main__.main(["convert", sys.argv[1], sys.argv[1] + ".converted", "--to", {to!r}]) == 0
seconds = time.perf_counter() - start
"""


@pytest.mark.parametrize(("format", "to", "limit"), [("flax", "hf", 1.0), ("safetensors", "jaxft", 1.35)])
def test_peak_memory_of_converting(tmp_path: Path, format: str, to: str, limit: float) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    try:
        import load
    finally:
        sys.path.pop(0)
    sizes = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
    # Its largest tensor is a tenth of it.
    folder = make_folder(tmp_path / "source", vocab_size=5000, **sizes)
    size = (folder / "model.safetensors").stat().st_size
    if format == "flax":
        _as_flax(folder)
    assert load.measure(_CONVERT.format(to=to), folder)["peak_bytes"] < limit * size + 32 * 2**20
