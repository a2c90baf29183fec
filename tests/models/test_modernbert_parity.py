"""Values and gradients of ModernBERT against `transformers` on torch, in process, in float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from reference import close, compare, compare_choices, compare_spans, make_reference, ours_of, torch_inputs
from safetensors.torch import load_file, save_file

from jaxft import __main__
from jaxft.errors import UserError
from jaxft.hub.source import make_config
from jaxft.inference.load import load
from jaxft.layers import Compute, Rotary
from jaxft.models.example import example_batch
from jaxft.models.families import modernbert
from jaxft.models.initial import init_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

OFF: dict[str, Any] = {f.name: 0.0 for f in dataclasses.fields(modernbert.Config) if "dropout" in f.name}
SMALL = dataclasses.replace(modernbert.TINY, num_hidden_layers=3, **OFF)
FULL, NEAR = "full_attention", "sliding_attention"
BIASES: dict[str, Any] = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)
# (head, changes, whether it is tried in each run of the tests)
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "cls": ("classification", {}, False),
    "mean": ("classification", {"classifier_pooling": "mean", "num_labels": 5} | BIASES, True),
    "tokens": ("token_classification", {"num_labels": 9, "local_attention": 2}, False),
    "masked": ("masked_lm", {}, False),
    "untied": ("masked_lm", {"tie_word_embeddings": False, "decoder_bias": False, "pad_token_id": None}, False),
    "masked_biases": ("masked_lm", BIASES | {"classifier_activation": "relu", "hidden_activation": "silu"}, False),
    "wide_window": ("masked_lm", {"local_attention": 60, "norm_eps": 1e-2}, False),
    "odd_window": ("masked_lm", {"local_attention": 5}, False),
    "types": ("masked_lm", {"layer_types": (NEAR, NEAR, FULL)}, False),
    "all_local": ("masked_lm", {"layer_types": (NEAR,) * 3, "local_rope": Rotary(50.0)}, False),
    "linear": ("masked_lm", {"global_rope": Rotary(500.0, "linear", 4.0), "local_rope": Rotary(7.0)}, False),
    "one_layer": ("masked_lm", {"num_hidden_layers": 1}, False),
    "deeper": ("masked_lm", {"num_hidden_layers": 7, "global_attn_every_n_layers": 3}, False),
}


def some(cases: Any, quick: Any) -> list[Any]:
    return [pytest.param(one, marks=[] if quick(one) else [pytest.mark.slow]) for one in cases]


@pytest.mark.parametrize("variant", some(VARIANTS, lambda name: VARIANTS[name][2]))
def test_loss_logits_and_every_gradient_equal_the_reference(variant: str, tmp_path: Path) -> None:
    head, changes, _ = VARIANTS[variant]
    compare(modernbert, dataclasses.replace(SMALL, **changes), head, "modernbert", tmp_path)


def test_starts_and_ends_of_answers_equal_the_reference(tmp_path: Path) -> None:
    compare_spans(modernbert, SMALL, "modernbert", tmp_path)


@pytest.mark.parametrize("pooling", ["cls", pytest.param("mean", marks=pytest.mark.slow)])
def test_scores_of_choices_equal_the_reference(pooling: Any, tmp_path: Path) -> None:
    # Where rows begin with padding, the reference looks for the first token that is none.
    config = dataclasses.replace(SMALL, num_hidden_layers=2, classifier_pooling=pooling)
    compare_choices(modernbert, config, "modernbert", tmp_path, padded_in_front=True)


def equal_folders(one: Path, other: Path) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype
        assert torch.equal(second[name], tensor), name


@pytest.mark.parametrize("head", modernbert.HEADS)
def test_a_folder_comes_back_bit_for_bit_and_computes_the_same(head: str | None, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, layer_types=(NEAR, FULL, NEAR), attention_bias=True, classifier_pooling="mean")
    theirs = make_reference(modernbert, config, head, "modernbert")
    theirs.save_pretrained(tmp_path / "theirs")
    load(tmp_path / "theirs", note=lambda _: None).save(tmp_path / "ours")
    equal_folders(tmp_path / "theirs", tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    same = ("layer_types", "rope_parameters", "local_attention", "classifier_pooling", "attention_bias")
    assert all(getattr(again.config, name) == getattr(theirs.config, name) for name in same)
    inputs = torch_inputs(example_batch(modernbert.facts(config), 3, length=12))
    if head == "multiple_choice":
        inputs = {name: value[:, None] for name, value in inputs.items()}
    with torch.no_grad():
        assert torch.equal(theirs(**inputs)[0], again(**inputs)[0])


def test_stored_types_of_fused_tensors_stay(tmp_path: Path) -> None:
    theirs = make_reference(modernbert, SMALL, None, "modernbert")
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/model.safetensors"
    tensors = load_file(path)
    for name in ("layers.0.attn.Wqkv.weight", "layers.1.mlp.Wi.weight", "layers.2.attn_norm.weight"):
        tensors[name] = tensors[name].to(torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
    assert __main__.main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    equal_folders(tmp_path / "theirs", tmp_path / "ours")


OLD: dict[str, Any] = {"global_attn_every_n_layers": 2, "global_rope_theta": 500.0, "local_rope_theta": 20.0}
NEW: dict[str, Any] = {
    "layer_types": [NEAR, FULL, FULL],
    "rope_parameters": {
        FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0},
        NEAR: {"rope_type": "default"},
    },
}
KEYS = {
    "none": {},
    "old": OLD | {"reference_compile": None, "position_embedding_type": "absolute"},
    "new": NEW,
    "both": OLD | NEW,
    "null": {"layer_types": None, "rope_parameters": None, "global_attn_every_n_layers": 1},
}


@pytest.mark.parametrize("keys", KEYS)
def test_old_and_new_keys_mean_what_they_mean_to_the_reference(keys: str, tmp_path: Path) -> None:
    from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding

    kept = ("layer_types", "rope_parameters", "global_attn_every_n_layers")
    tree = {k: v for k, v in modernbert.config_to_hf(SMALL).items() if k not in kept}
    stated = tree | KEYS[keys] | {"model_type": "modernbert", "architectures": ["ModernBertModel"]}
    theirs = transformers.ModernBertConfig.from_dict(json.loads(json.dumps(stated)))
    transformers.ModernBertModel(theirs).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/config.json").write_text(json.dumps(stated))
    loaded = load(tmp_path / "theirs", note=lambda _: None)
    assert list(loaded.model.config.types) == theirs.layer_types
    loaded.save(tmp_path / "ours")
    written = json.loads((tmp_path / "ours/config.json").read_text())
    assert not set(modernbert.SUPERSEDED) & set(written)
    again = transformers.ModernBertConfig.from_pretrained(tmp_path / "ours")
    assert again.layer_types == theirs.layer_types
    ropes = {FULL: loaded.model.config.global_rope, NEAR: loaded.model.config.local_rope}
    wanted, back = ModernBertRotaryEmbedding(theirs), ModernBertRotaryEmbedding(again)
    for name in set(theirs.layer_types):
        frequencies = getattr(wanted, f"{name}_inv_freq")
        close(ropes[name].frequencies(SMALL.head_size), frequencies, name)
        assert torch.equal(getattr(back, f"{name}_inv_freq"), frequencies)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"layer_types": [FULL, "sliding_atention", FULL]}, "'sliding_atention' is not supported: did you mean"),
        ({"layer_types": [FULL, NEAR]}, "layer_types names 2 layers, num_hidden_layers is 3"),
        ({"layer_types": "full"}, "layer_types ='full' is no list"),
        ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers=0"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "must have an object for each of full_attention, sliding_attention"),
        ({"rope_parameters": {FULL: {"rope_type": "yarn"}}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is not supported"),
        ({"rope_parameters": {}, "local_rope_theta": None}, "rope_theta is None"),
        ({"classifier_pooling": "max"}, "classifier_pooling"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"hidden_activation": "gelo"}, "hidden_activation='gelo'"),
    ],
)
def test_what_a_config_cannot_be(stated: dict[str, Any], message: str) -> None:
    tree = modernbert.config_to_hf(SMALL)
    tree = {k: v for k, v in tree.items() if k not in ("rope_parameters", "layer_types")} | stated
    with pytest.raises(UserError) as caught:
        make_config(modernbert, modernbert.config_from_hf(tree))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_listed_in_one_line(tmp_path: Path) -> None:
    make_reference(modernbert, SMALL, "classification", "modernbert").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    fused = "model.layers.1.attn.Wqkv.weight"
    tensors[fused] = tensors[fused][:64].clone()
    del tensors["model.layers.2.mlp.Wi.weight"], tensors["model.layers.1.attn_norm.weight"]
    tensors["model.layers.0.attn_norm.weight"] = torch.ones(32)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "2 missing: " in message
    assert message.count("model.layers.2.mlp.Wi.weight") == message.count("model.layers.1.attn_norm.weight") == 1
    assert "1 unused: model.layers.0.attn_norm.weight" in message
    assert f"1 mis-shaped: {fused} is [64, 32], expected [96, 32]" in message
    assert "\n" not in message


def test_tensors_alone_do_not_tell_heads_apart(tmp_path: Path) -> None:
    make_reference(modernbert, SMALL, "token_classification", "modernbert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    for head in ("classification", "token_classification", "question_answering"):
        assert head in str(caught.value)
    assert load(tmp_path, head=None, note=lambda _: None).model.head is None


@pytest.mark.slow
def test_states_and_attentions_of_all_layers_are_the_references(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, num_hidden_layers=5, **BIASES)
    theirs = make_reference(modernbert, config, None, "modernbert")
    params = ours_of(modernbert, theirs, config, None, tmp_path)[1]
    batch = example_batch(modernbert.facts(config), 2, length=14)
    seen = batch["mask"].astype(bool)
    wanted = theirs(**torch_inputs(batch), output_hidden_states=True, output_attentions=True)
    for layers in ("unrolled", "scanned"):
        computed: Any = modernbert.Model(config, None, Compute(layers=layers))
        out: Any = computed.apply({"params": params}, **batch, hidden_states=True, attentions=True)
        assert len(out.hidden_states) == len(wanted.hidden_states) == 6
        for ours, state in zip(out.hidden_states, wanted.hidden_states, strict=True):
            close(ours[seen], state[torch.tensor(seen)], "state")
        for ours, looked in zip(out.attentions, wanted.attentions, strict=True):
            close(np.asarray(ours).swapaxes(1, 2)[seen], looked.transpose(1, 2)[torch.tensor(seen)], "attention")


@pytest.mark.parametrize(
    "head",
    ["classification", *(pytest.param(name, marks=pytest.mark.slow) for name in ("masked_lm", "token_classification"))],
)
def test_packed_texts_equal_texts_of_their_own(head: str) -> None:
    config = dataclasses.replace(SMALL, classifier_pooling="mean")
    model: Any = modernbert.Model(config, head, Compute(layers="scanned"))
    params, lengths = init_params(model, 0), (9, 14, 3)
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 96, n).astype(np.int32) for n in lengths]
    alone = {"tokens": np.stack([np.pad(text, (0, 30 - len(text))) for text in texts])}
    alone["mask"] = (np.arange(30) < np.array(lengths)[:, None]).astype(np.int32)
    packed = {
        "tokens": np.concatenate([*texts, np.zeros(4, np.int32)])[None],
        "segments": np.repeat([1, 2, 3, 0], [*lengths, 4])[None].astype(np.int32),
        "positions": np.concatenate([np.arange(n) for n in (*lengths, 4)])[None].astype(np.int32),
    }
    run = jax.jit(lambda batch: model.apply({"params": params}, **batch).logits)
    wanted, found = run(alone), run(packed)
    if head == "classification":  # of a row, its first text
        np.testing.assert_allclose(found, wanted[:1], atol=2e-6)
        return
    for number, length in enumerate(lengths):
        of_text = found[0, packed["segments"][0] == number + 1]
        np.testing.assert_allclose(of_text, wanted[number, :length], atol=2e-6)
