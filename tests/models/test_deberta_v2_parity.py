"""Values and gradients of DeBERTa-v2 and v3 against `transformers` on torch, in process, in float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from reference import close, compare_head, drawn, make_reference, ours_of, torch_inputs
from safetensors.torch import load_file, save_file

from jaxft.attention.relative import distances
from jaxft.errors import UserError
from jaxft.hub.source import make_config
from jaxft.inference.load import load
from jaxft.layers import Compute
from jaxft.models.disentangled import Ranges
from jaxft.models.example import example_batch
from jaxft.models.families import deberta_v2
from jaxft.models.initial import init_params

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SMALL = dataclasses.replace(deberta_v2.TINY, num_hidden_layers=2)
HEADS = [head for head in deberta_v2.HEADS if head is not None]
# As the published models are.
V2: dict[str, Any] = {
    "share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3, "conv_act": "gelu",
    "position_biased_input": False, "type_vocab_size": 0, "pos_att_type": ("p2c", "c2p"),
}  # fmt: skip
V3 = V2 | {"conv_kernel_size": 0, "legacy": False}
VALUES: dict[str, list[Any]] = {
    "vocab_size": [96, 61],
    "hidden_size": [32, 48],
    "embedding_size": [None, 24],
    "num_hidden_layers": [1, 2, 3],
    "num_attention_heads": [1, 2, 4],
    "intermediate_size": [64, 24],
    "hidden_act": ["gelu", "relu", "gelu_new", "silu"],
    "max_position_embeddings": [40, 20],
    "type_vocab_size": [0, 2, 3],
    "layer_norm_eps": [1e-7, 1e-3],
    "pad_token_id": [0, 7, None],
    "position_biased_input": [True, False],
    "relative_attention": [True, True, True, False],
    "pos_att_type": [("c2p", "p2c"), ("p2c",), ("c2p",), ()],
    "share_att_key": [True, False],
    "position_buckets": [-1, 8, 6, 16],
    "max_relative_positions": [-1, 12, 60],
    "norm_rel_ebd": ["none", "layer_norm"],
    "conv_kernel_size": [0, 3, 5, 1],
    "conv_groups": [1, 2, 8],
    "conv_act": ["tanh", "gelu"],
    "pooler_hidden_act": ["gelu", "tanh", "relu"],
    "tie_word_embeddings": [True, False],
    "legacy": [True, False],
    "num_labels": [2, 3, 5],
}
QUICK: list[tuple[str, dict[str, Any]]] = [
    ("masked_lm", V2 | {"num_hidden_layers": 1}),
    ("classification", {"num_hidden_layers": 1, "embedding_size": 24, "position_buckets": -1, "max_relative_positions": 7,
     "norm_rel_ebd": "none", "conv_kernel_size": 0, "num_labels": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("head", "changes"), QUICK)
def test_values_and_gradients_equal_the_reference(head: str, changes: dict[str, Any], tmp_path: Path) -> None:
    compare_head(deberta_v2, dataclasses.replace(SMALL, **changes), head, "deberta-v2", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_every_head_equals_the_reference(head: str, tmp_path: Path) -> None:
    compare_head(deberta_v2, dataclasses.replace(SMALL, **V3), head, "deberta-v2", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_random_configs_equal_the_reference(number: int, tmp_path: Path) -> None:
    head, config = HEADS[number % len(HEADS)], drawn(SMALL, VALUES, number)
    if head == "question_answering":  # the reference's ends have as many outputs as there are labels
        config = dataclasses.replace(config, num_labels=2)
    if head == "masked_lm" and not config.legacy:
        config = dataclasses.replace(config, embedding_size=None)
    compare_head(deberta_v2, config, head, "deberta-v2", tmp_path)


@pytest.mark.parametrize("buckets", [-1, 2, 3, 64, 100, 256])
@pytest.mark.parametrize("farthest", [300, 512])
def test_ranges_of_distances_are_the_references(buckets: int, farthest: int) -> None:
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    there = torch.zeros(1, 1, 800, 1)
    span = farthest if buckets < 1 else buckets
    away = build_relative_position(there, there, buckets, farthest)[0].numpy()
    wanted = np.clip(
        np.concatenate([away[0, :0:-1], away[:, 0]]) + span, 0, 2 * span - 1
    )  # from query 0, then to key 0
    found = Ranges(span, None if buckets < 1 else buckets // 2, farthest).rows(distances(800))
    np.testing.assert_array_equal(found, wanted)


def same_tensors(one: Path, other: Path) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        # Where the decoder has a bias of its own, nothing reads the one of that name: exports have the decoder's twice.
        read = name != "cls.predictions.bias" or "cls.predictions.decoder.bias" not in first
        assert not read or torch.equal(second[name], tensor), name


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        ("masked_lm", V3 | {"num_hidden_layers": 1}),
        ("classification", {"conv_groups": 2, "embedding_size": 24, "cls_dropout": 0.3, "position_buckets": -1}),
        pytest.param("masked_lm", V2 | {"tie_word_embeddings": False}, marks=pytest.mark.slow),
        pytest.param("multiple_choice", {"relative_attention": False}, marks=pytest.mark.slow),
        pytest.param(None, {"share_att_key": True, "pos_att_type": ("p2c",)}, marks=pytest.mark.slow),
    ],
)
def test_a_folder_comes_back_as_it_was(head: str | None, changes: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, **changes)
    theirs = make_reference(deberta_v2, config, head, "deberta-v2")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load(tmp_path / "theirs", note=lambda _: None)
    assert loaded.model.config == config
    loaded.save(tmp_path / "ours")
    same_tensors(tmp_path / "theirs", tmp_path / "ours")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert after["architectures"] == [type(theirs).__name__]
    assert {name: after[name] for name in deberta_v2.config_to_hf(config)} == {
        name: before[name] for name in deberta_v2.config_to_hf(config)
    }


def test_a_folder_as_it_was_published(tmp_path: Path) -> None:
    """No class named, kinds of attention as text, the trained head beside that of another task, positions that nothing reads."""
    config = dataclasses.replace(SMALL, **V3 | {"num_hidden_layers": 1})
    make_reference(deberta_v2, config, "masked_lm", "deberta-v2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["deberta.embeddings.position_embeddings.weight"] = torch.ones(40, 32)
    tensors["mask_predictions.dense.weight"] = torch.ones(32, 32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((tmp_path / "config.json").read_text()) | {"pos_att_type": "p2c|c2p"}
    for name in ("architectures", "legacy", "embedding_size", "conv_kernel_size", "conv_groups", "conv_act"):
        del stated[name]
    (tmp_path / "config.json").write_text(json.dumps(stated | {"attention_head_size": 8, "z_steps": 0}))
    loaded = load(tmp_path, note=lambda _: None)
    assert loaded.model.head == "masked_lm"
    assert loaded.model.config == dataclasses.replace(config, conv_act="tanh")


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
@pytest.mark.parametrize(
    "changes", [V2, {"position_buckets": -1, "pos_att_type": ("c2p",)}, {"relative_attention": False}]
)
def test_states_and_attentions_are_the_references(changes: dict[str, Any], layers: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(deberta_v2.TINY, **changes)
    theirs = make_reference(deberta_v2, config, None, "deberta-v2")
    params = ours_of(deberta_v2, theirs, config, None, tmp_path)[1]
    model: Any = deberta_v2.Model(config, None, Compute(layers=layers))
    batch = example_batch(deberta_v2.facts(config), 3, length=14)
    out = model.apply({"params": params}, **batch, hidden_states=True, attentions=True)
    with torch.no_grad():
        wanted = theirs(**torch_inputs(batch), output_hidden_states=True, output_attentions=True)
    seen = batch["mask"].astype(bool)
    for ours, state in zip(out.hidden_states, wanted.hidden_states, strict=True):
        close(ours[seen], state[torch.tensor(seen)], "state")
    for ours, looked in zip(out.attentions, wanted.attentions, strict=True):
        close(np.asarray(ours).swapaxes(1, 2)[seen], looked.transpose(1, 2)[torch.tensor(seen)], "attention")


def test_packed_texts_equal_texts_of_their_own() -> None:
    """The convolution does not look from one text into the next, nor does attention."""
    config = dataclasses.replace(SMALL, **V2 | {"conv_kernel_size": 5, "num_hidden_layers": 1})
    model: Any = deberta_v2.Model(config, "token_classification", Compute())
    params, lengths = init_params(model, 0), (4, 6, 13)
    # Fresh biases are 0, and what reads beyond a text would read 0 there.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), params)
    texts = [rng.integers(5, 96, n).astype(np.int32) for n in lengths]
    alone = {"tokens": np.stack([np.pad(text, (0, 25 - len(text))) for text in texts])}
    alone["mask"] = (np.arange(25) < np.array(lengths)[:, None]).astype(np.int32)
    packed = {
        "tokens": np.concatenate([*texts, np.full(2, 7, np.int32)])[None],
        "segments": np.repeat([1, 2, 3, 0], [*lengths, 2])[None].astype(np.int32),
        "positions": np.concatenate([np.arange(n) for n in (*lengths, 2)])[None].astype(np.int32),
    }
    run = jax.jit(lambda batch: model.apply({"params": params}, **batch).logits)
    wanted, found = run(alone), run(packed)
    for number, length in enumerate(lengths):
        of_text = found[0, packed["segments"][0] == number + 1]
        np.testing.assert_allclose(of_text, wanted[number, :length], atol=3e-6)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"pos_att_type": "c2p|p2p"}, "pos_att_type 'p2p' is not supported, only c2p and p2c"),
        ({"norm_rel_ebd": "rms_norm"}, "norm_rel_ebd"),
        ({"attention_head_size": 16}, "attention_head_size=16 is not supported, only 8"),
        ({"pooler_hidden_size": 16}, "pooler_hidden_size=16 is not supported, only 32"),
        ({"conv_kernel_size": 4}, "conv_kernel_size=4 must be an odd number, or 0"),
        ({"conv_groups": 3}, "hidden_size=32 is not a multiple of conv_groups=3"),
        ({"position_buckets": 1}, "position_buckets=1 of max_relative_positions=40 do not tell far distances apart"),
        ({"position_buckets": 24, "max_relative_positions": 12}, "do not tell far distances apart"),
        ({"conv_act": "tanhh"}, "conv_act='tanhh'"),
        ({"pooler_dropout": 1.0}, "pooler_dropout=1.0 must lie in 0..1"),
        ({"type_vocab_size": -1}, "type_vocab_size=-1 must be at least 1"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
    ],
)
def test_what_a_config_cannot_be(stated: dict[str, Any], message: str) -> None:
    tree = deberta_v2.config_to_hf(SMALL) | stated
    with pytest.raises(UserError) as caught:
        make_config(deberta_v2, deberta_v2.config_from_hf(tree))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_trained_head_reads_the_table_of_tokens() -> None:
    config = dataclasses.replace(SMALL, legacy=False, embedding_size=24)
    model: Any = deberta_v2.Model(config, "masked_lm", Compute())
    with pytest.raises(UserError, match="legacy=false needs tables as wide as the model, not embedding_size=24"):
        jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 4), np.int32))
