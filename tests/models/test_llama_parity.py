"""Values and gradients of Llama against `transformers` on torch, in process, in float32."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.hub import pretrained
from jaxft.hub.convert import export_tensors
from jaxft.hub.pretrained import export_folder, load_params
from jaxft.hub.source import open_source
from jaxft.layers import Compute, Rotary
from jaxft.models.contract import architecture_of
from jaxft.models.example import example_batch
from jaxft.models.families import llama
from jaxft.tasks.causal_lm import Task
from jaxft.training.step import apply_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5
BASE = dataclasses.replace(llama.TINY, attention_dropout=0.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi_head": {"num_key_value_heads": None},
    "multi_query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 12},
    "gelu": {"hidden_act": "gelu"},
    "eps": {"rms_norm_eps": 1e-2},
    "theta": {"rope": Rotary(theta=500_000.0)},
    "linear": {"rope": Rotary(kind="linear", factor=4.0)},
    "llama3": {
        "rope": Rotary(
            500.0, "llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        )
    },
    "padding_idx": {"pad_token_id": 0},
}


def close(ours: Any, theirs: Any, what: str) -> None:
    """Within 2e-5 of the largest value compared, or absolutely where all values are below 1."""
    ours, theirs = np.asarray(ours, np.float32), theirs.detach().numpy()
    assert ours.shape == theirs.shape, what
    limit = TOLERANCE * max(1.0, float(np.abs(theirs).max()))
    worst = float(np.abs(ours - theirs).max())
    assert worst <= limit, f"{what}: {worst:.2e} > {limit:.2e}"


def reference(config: llama.Config, head: str | None) -> Any:
    torch.manual_seed(0)
    tree = llama.config_to_hf(config)
    model = getattr(transformers, architecture_of(llama, head))(
        transformers.LlamaConfig(attn_implementation="eager", num_labels=config.num_labels, **tree)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh biases are all 0 and fresh norm scales all 1: swapped or dropped ones would not be noticed.
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
    return model


@pytest.mark.sampled(3)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_loss_and_gradients(variant: str, tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, **VARIANTS[variant])
    theirs = reference(config, "causal_lm")
    theirs.save_pretrained(tmp_path / "hf")
    source = open_source(str(tmp_path / "hf"), lambda text: pytest.fail(text))
    assert source.config == dataclasses.replace(config, num_key_value_heads=config.key_heads, head_dim=config.head_size)
    model = llama.Model(config, "causal_lm")
    params = load_params(source, model, lambda text: pytest.fail(text))

    batch = example_batch(llama.facts(config), 4) | {"weights": np.ones(4, np.float32)}
    mask = batch["mask"].astype(bool)
    inputs = {"input_ids": batch["tokens"], "attention_mask": batch["mask"]}
    tensors = {name: torch.tensor(value.astype(np.int64)) for name, value in inputs.items()}
    labels = torch.tensor(np.where(mask, batch["tokens"], -100).astype(np.int64))
    wanted = theirs(**tensors, labels=labels, output_hidden_states=True)
    wanted.loss.backward()

    def loss(params: Any) -> tuple[jax.Array, Any]:
        prepared = Task().prepare(jax.tree.map(jnp.asarray, batch), jax.random.key(0))
        out = apply_model(model, params, prepared, None)
        sums = Task().sums(lambda batch, key: out, prepared, None)
        return sums["loss"] / sums["weight"], out

    (value, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    close(np.asarray(out.hidden)[mask], wanted.hidden_states[-1][mask], "hidden")
    close(np.asarray(out.logits)[mask], wanted.logits[mask], "logits")
    close(value, wanted.loss, "loss")
    named = dict(theirs.named_parameters())
    for tensor in export_tensors(gradient, llama.hf_layout(config, "causal_lm"), bare=False):
        close(tensor.read(), named[tensor.name].grad, tensor.name)


@pytest.mark.parametrize("head", ["classification", "token_classification"])
def test_values_and_gradients_of_classes(head: str, tmp_path: Path) -> None:
    # The reference takes the last token that is no padding by its id: id 0 is nowhere else.
    config = dataclasses.replace(BASE, pad_token_id=0, num_labels=5, classifier_dropout=0.0)
    theirs = reference(config, head)
    theirs.save_pretrained(tmp_path / "hf")
    source = open_source(str(tmp_path / "hf"), lambda text: pytest.fail(text))
    assert (source.head, source.classes) == (head, 5)
    model = llama.Model(source.config, head)
    params = load_params(source, model, lambda text: pytest.fail(text))

    batch = example_batch(llama.facts(config), 4)
    mask = batch["mask"].astype(bool)
    inputs = {"input_ids": batch["tokens"], "attention_mask": batch["mask"]}
    wanted = theirs(**{name: torch.tensor(value.astype(np.int64)) for name, value in inputs.items()}).logits
    wanted = wanted if head == "classification" else wanted[mask]
    weights = np.random.default_rng(0).normal(size=wanted.shape).astype(np.float32)
    (wanted * torch.tensor(weights)).sum().backward()

    def product(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = apply_model(model, params, jax.tree.map(jnp.asarray, batch), None).logits
        assert logits is not None
        logits = logits if head == "classification" else logits[mask]
        return (logits * weights).sum(), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(product, has_aux=True))(params)
    close(logits, wanted, "logits")
    named = dict(theirs.named_parameters())
    for tensor in export_tensors(gradient, llama.hf_layout(source.config, head), bare=False):
        close(tensor.read(), named[tensor.name].grad, tensor.name)


@pytest.mark.parametrize("head", llama.HEADS)
@pytest.mark.parametrize("variant", ["grouped", "tied", "biases", "llama3"])
def test_there_and_back(variant: str, head: str | None, tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, **VARIANTS[variant])
    theirs = reference(config, head)
    theirs.save_pretrained(tmp_path / "hf")
    source = open_source(str(tmp_path / "hf"), lambda text: None)
    assert source.head == head
    model = llama.Model(source.config, head)
    params = load_params(source, model, lambda text: pytest.fail(text))
    export_folder(tmp_path / "back", source.hf_config, llama, model, params, tokenizer_folder=None)
    again = getattr(transformers, architecture_of(llama, head)).from_pretrained(tmp_path / "back")
    assert again.config.rope_parameters == theirs.config.rope_parameters
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_packed_texts_are_those_of_the_reference_apart(tmp_path: Path) -> None:
    theirs = reference(BASE, "causal_lm")
    theirs.save_pretrained(tmp_path / "hf")
    source = open_source(str(tmp_path / "hf"), lambda text: None)
    model = llama.Model(source.config, "causal_lm")
    params = load_params(source, model, lambda text: None)
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, BASE.vocab_size, n) for n in (7, 12, 3)]
    tokens = np.concatenate([*texts, np.zeros(2, np.int64)])[None].astype(np.int32)
    segments = np.repeat([1, 2, 3, 0], [7, 12, 3, 2])[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (7, 12, 3, 2)])[None].astype(np.int32)
    out: Any = model.apply({"params": params}, tokens, positions=positions, segments=segments)
    for text, start in zip(texts, (0, 7, 19), strict=True):
        with torch.no_grad():
            close(out.logits[0, start : start + len(text)], theirs(torch.tensor(text)[None]).logits[0], "packed")


def test_old_config_files(tmp_path: Path) -> None:
    theirs = reference(BASE, "causal_lm")
    theirs.save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    tree.pop("rope_parameters")
    old = tree | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert open_source(str(tmp_path), lambda text: None).config.rope == Rotary(5e5, "linear", 2.0)
    (tmp_path / "config.json").write_text(json.dumps(tree | {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}))
    with pytest.raises(UserError, match="'longrope' is not supported"):
        open_source(str(tmp_path), lambda text: None)


def test_texts_beyond_the_limit_are_refused() -> None:
    model = llama.Model(BASE)
    with pytest.raises(UserError, match="limit of 64"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 65), np.int32)))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
ROPE_SPELLINGS: dict[str, dict[str, Any]] = {
    "both": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0},
    },
    "empty": {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0}},
    "theta_twice": {"rope_theta": 50.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
    "no_original": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "original_outside": {
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8},
        "original_max_position_embeddings": 16,
    },
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn": {
        "rope_scaling": {"type": "yarn", "factor": 4.0},
        "rope_theta": 500.0,
        "original_max_position_embeddings": 16,
    },
    "yarn_of_5": {"rope_parameters": {**YARN, "beta_fast": 4, "beta_slow": None, "attention_factor": 1.5}},
    "yarn_of_scales": {
        "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.2, "truncate": False},
        "rope_theta": 90.0,
    },
    "yarn_of_one_scale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.0}},
}


@pytest.mark.parametrize("spelling", ROPE_SPELLINGS)
def test_rotary_settings_mean_what_they_mean_to_the_reference(spelling: str, tmp_path: Path) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    tree = llama.config_to_hf(BASE)
    tree.pop("rope_parameters")
    stated = tree | ROPE_SPELLINGS[spelling]
    fields: Any = llama.config_from_hf(stated)["rope"]
    rope = Rotary(**fields)
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig.from_dict(dict(stated)))
    close(rope.frequencies(BASE.head_size), theirs.inv_freq, spelling)
    assert rope.scale == pytest.approx(theirs.attention_scaling)
    # An export must not keep an old spelling, which the reference would believe over what we write.
    written = pretrained._exported_config(
        stated, llama, llama.Model(dataclasses.replace(BASE, rope=rope)), None, None, "float32"
    )
    assert not set(llama.SUPERSEDED) & set(written)
    again = LlamaRotaryEmbedding(transformers.LlamaConfig.from_dict(written))
    close(again.inv_freq.numpy(), theirs.inv_freq, spelling)
    assert again.attention_scaling == theirs.attention_scaling


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, not a number above 0"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor is None"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor below its high_freq_factor"),
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "high_freq_factor"}}, "high_freq_factor is missing"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_scaling": {"type": ["linear"]}}, "is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type='yarn': factor is missing"),
        ({"rope_scaling": YARN | {"factor": None}}, "rope_type='yarn': factor is None"),
        ({"rope_scaling": YARN | {"mscale": "a"}}, "rope_type='yarn': mscale is 'a'"),
        ({"rope_scaling": YARN | {"truncate": 3}}, "truncate=3 is not true or false"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "(only default, linear, dynamic, yarn, llama3)"),
    ],
)
def test_rotary_settings_that_are_not_whole_are_refused(stated: dict[str, Any], named: str) -> None:
    tree = llama.config_to_hf(BASE)
    tree.pop("rope_parameters")
    with pytest.raises(UserError, match=re.escape(named)):
        llama.config_from_hf(tree | stated)


@pytest.mark.parametrize("content", ["absent", "equal", "different", "alone"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_flag_and_the_stored_decoder(tied: bool, content: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs = reference(BASE, "causal_lm")
    theirs.save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    table, decoder = "model.embed_tokens.weight", "lm_head.weight"
    tensors |= {"equal": {decoder: tensors[table].clone()}, "alone": {decoder: tensors[table]}}.get(content, {})
    for name in {"absent": [decoder], "alone": [table]}.get(content, []):
        del tensors[name]
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": tied}))
    notes: list[str] = []
    source = open_source(str(tmp_path / "hf"), notes.append)
    model = llama.Model(source.config, "causal_lm")
    if not tied and content in ("absent", "alone"):
        with pytest.raises(
            UserError, match=f"weights lack {decoder}" if content == "absent" else f"1 missing: {table}"
        ):
            load_params(source, model, notes.append)
        return
    export_folder(
        tmp_path / "back",
        source.hf_config,
        llama,
        model,
        load_params(source, model, notes.append),
        tokenizer_folder=None,
    )
    said = {(True, "different"): "it is kept, untied", (True, "alone"): f"{decoder} is read for {table}"}.get(
        (tied, content)
    )
    assert len(notes) == (said is not None)
    assert not said or said in notes[0]
    before, after = (
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / folder).state_dict() for folder in ("hf", "back")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_does_not_start_from_nan(tmp_path: Path) -> None:
    theirs = reference(BASE, None)
    with torch.no_grad():
        theirs.norm.weight[3] = float("nan")
    theirs.save_pretrained(tmp_path / "hf")
    notes: list[str] = []
    source = open_source(str(tmp_path / "hf"), notes.append)
    model = llama.Model(source.config)
    load_params(source, model, notes.append)
    assert notes == ["warning: NaN or infinity in the weights: norm.weight"]
    with pytest.raises(UserError, match=r"training cannot start: NaN or infinity in the weights: norm\.weight"):
        load_params(source, model, notes.append, finite=True)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_states_of_all_layers_are_the_references(layers: Any, tmp_path: Path) -> None:
    theirs = reference(BASE, "causal_lm")
    theirs.save_pretrained(tmp_path / "hf")
    source = open_source(str(tmp_path / "hf"), lambda text: pytest.fail(text))
    model = llama.Model(BASE, "causal_lm", Compute(layers=layers))
    params = load_params(source, model, lambda text: pytest.fail(text))
    tokens = np.random.default_rng(0).integers(1, BASE.vocab_size, (2, 9)).astype(np.int32)
    states = theirs(torch.tensor(tokens.astype(np.int64)), output_hidden_states=True).hidden_states
    out: Any = model.apply({"params": params}, jnp.asarray(tokens), hidden_states=True)
    assert len(out.hidden_states) == len(states) == BASE.num_hidden_layers + 1
    for i, state in enumerate(states):
        close(out.hidden_states[i], state, f"state {i}")
