"""The reference of the parity tests: models of `transformers` on torch, and what they give beside ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.hub.convert import import_params
from jaxft.hub.source import open_folder
from jaxft.layers import Compute
from jaxft.models.contract import Family, architecture_of, classes_of
from jaxft.models.example import example_batch
from jaxft.models.initial import shapes_and_axes
from jaxft.tasks.classification import cross_entropy
from jaxft.trees import paths_of

TOLERANCE = 2e-5


def close(ours: Any, theirs: Any, what: str, tolerance: float = TOLERANCE) -> None:
    """Within ``tolerance`` of the largest value compared, or absolutely where all values are below 1."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs.detach())
    assert ours.shape == theirs.shape, what
    limit = tolerance * max(1.0, float(np.abs(theirs).max()))
    worst = float(np.abs(ours - theirs).max())
    assert worst <= limit, f"{what}: {worst:.2e} > {limit:.2e}"


def make_reference(family: Family, config: Any, head: str | None, model_type: str, seed: int = 0) -> Any:
    """A randomly initialised model of the reference in which no parameter has a value that could hide a mistake."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    torch.manual_seed(seed)
    kind = getattr(transformers, architecture_of(family, head, model_type))
    classes = {} if classes_of(config) is None else {"num_labels": classes_of(config)}
    settings = kind.config_class(attn_implementation="eager", **classes, **family.config_to_hf(config))
    model = kind(settings).eval()
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad):
            # Fresh biases are all 0 and fresh norm scales all 1: swapped or dropped ones would not be noticed. Nor would rows of
            # padding that are 0.
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
    inner: Any = next((one for one in (model, *model.children()) if hasattr(one, "shared")), None)
    for side in ("encoder", "decoder"):  # which the reference ties only where it ties the vocabulary too
        if hasattr(inner, side):
            getattr(inner, side).embed_tokens.weight = inner.shared.weight
    return model


def ours_of(family: Family, model: Any, config: Any, head: str | None, folder: Path) -> tuple[Any, Any]:
    """Our model with the reference's parameters (or whatever stands in their place), through the files that users exchange."""
    model.save_pretrained(folder)
    kind: Any = family.Model
    mine = kind(config, head, Compute())
    shapes, _ = shapes_and_axes(mine)
    with open_folder(folder) as weights:
        got = import_params(weights, family.hf_layout(config, head), shapes, lambda _: None, np.float32)
    assert not got.fresh
    return mine, got.params


def torch_inputs(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """A batch as the reference takes it."""
    torch = pytest.importorskip("torch")
    names = {"tokens": "input_ids", "mask": "attention_mask", "types": "token_type_ids"}
    return {names[key]: torch.tensor(value.astype(np.int64)) for key, value in batch.items()}


def mean_loss(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    """Mean cross-entropy over labels that are not -100, as the reference computes it."""
    flat, wanted = logits.reshape(-1, logits.shape[-1]), jnp.asarray(labels.reshape(-1))
    loss = cross_entropy(flat, jnp.maximum(wanted, 0))
    return jnp.where(wanted >= 0, loss, 0.0).sum() / (wanted >= 0).sum()


def labels_for(logits_shape: tuple[int, ...], mask: np.ndarray) -> np.ndarray:
    """Random labels of rows, or of tokens, some of which have none."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, logits_shape[-1], logits_shape[:-1])
    if labels.ndim == 1:
        return labels
    chosen = (rng.random(mask.shape) < 0.5) & (mask == 1)
    chosen[:, 0] = True
    return np.where(chosen, labels, -100)


def compare(family: Family, config: Any, head: str, model_type: str, folder: Path) -> None:
    """Holds hidden states, logits, loss and the gradient of every parameter of a head against the reference's."""
    torch = pytest.importorskip("torch")
    theirs = make_reference(family, config, head, model_type)
    model, params = ours_of(family, theirs, config, head, folder / "values")
    batch = example_batch(model.facts, 4, length=20)
    seen = batch["mask"].astype(bool)
    shape = jax.eval_shape(lambda: model.apply({"params": params}, **batch)).logits.shape
    labels = labels_for(shape, batch["mask"])

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        out = model.apply({"params": params}, **batch)
        return mean_loss(out.logits, labels), out

    (loss, out), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    expected = theirs(**torch_inputs(batch), labels=torch.tensor(labels.astype(np.int64)), output_hidden_states=True)
    expected.loss.backward()
    states = expected.decoder_hidden_states if "decoder_hidden_states" in expected else expected.hidden_states
    close(out.hidden[seen], states[-1][torch.tensor(seen)], "hidden states")
    of_tokens = out.logits.ndim == 3
    close(
        *((out.logits[seen], expected.logits[torch.tensor(seen)]) if of_tokens else (out.logits, expected.logits)),
        "logits",
    )
    close(loss, expected.loss, "loss")
    _compare_gradients(family, theirs, config, head, gradient, folder)


def torch_pixels(batch: Mapping[str, np.ndarray]) -> Any:
    """Images as the reference takes them: channels first."""
    return pytest.importorskip("torch").tensor(batch["pixels"].transpose(0, 3, 1, 2).copy())


def compare_images(family: Family, config: Any, head: str | None, model_type: str, folder: Path) -> None:
    """Holds all states, vectors or logits, loss and the gradient of every parameter of a model of images against the reference's."""
    torch = pytest.importorskip("torch")
    theirs = make_reference(family, config, head, model_type)
    model, params = ours_of(family, theirs, config, head, folder / "values")
    batch, rng = example_batch(family.facts(config), 3), np.random.default_rng(1)
    out = theirs(torch_pixels(batch), output_hidden_states=True, output_attentions=True)
    vectors = ("last_hidden_state", "pooler_output") if head is None else ("logits",)
    expected = [getattr(out, name) for name in vectors]
    # Logits have labels. Vectors have a random cotangent: the sum of squares of what is normalised has no gradient to speak of.
    labels = rng.integers(0, classes_of(config) or 1, 3)
    weights = [rng.normal(size=tuple(one.shape)).astype(np.float32) for one in expected]

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        out = model.apply({"params": params}, **batch, hidden_states=True, attentions=True)
        if head is not None:
            return mean_loss(out.logits, labels), (out, [out.logits])
        found = [out.hidden, out.pooled]
        return jnp.stack([(one * weight).sum() for one, weight in zip(found, weights, strict=True)]).sum(), (out, found)

    (loss, (ours, found)), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    of_vectors = [(one * torch.tensor(weight)).sum() for one, weight in zip(expected, weights, strict=True)]
    of_labels = torch.nn.functional.cross_entropy
    wanted = torch.stack(of_vectors).sum() if head is None else of_labels(expected[0], torch.tensor(labels))
    wanted.backward()
    for name, one, other in zip(vectors, found, expected, strict=True):
        close(one, other, name)
    close(loss, wanted, "loss")
    for i, state in enumerate(out.hidden_states):
        close(ours.hidden_states[i], state, f"state {i}")
    for i, looked in enumerate(out.attentions):
        close(ours.attentions[i], looked, f"attention {i}")
    _compare_gradients(family, theirs, config, head, gradient, folder)


def compare_head(family: Family, config: Any, head: str, model_type: str, folder: Path) -> None:
    """Holds a head against the reference's, as its outputs are compared."""
    of_head = {
        "question_answering": compare_spans,
        "multiple_choice": compare_choices,
        "replaced_tokens": compare_replaced,
    }
    if head in of_head:
        of_head[head](family, config, model_type, folder)
    else:
        compare(family, config, head, model_type, folder)


def drawn(config: Any, values: Mapping[str, Sequence[Any]], number: int, count: int = 20) -> Any:
    """The Config of that number, of ``count`` random ones: each field takes each of its values about equally often."""
    changes = {
        name: some[np.random.default_rng(i).permutation(count)[number] % len(some)]
        for i, (name, some) in enumerate(values.items())
    }
    return dataclasses.replace(config, **changes)


def compare_replaced(family: Family, config: Any, model_type: str, folder: Path) -> None:
    """Holds one logit for each token, their loss and the gradient of every parameter against the reference's."""
    torch, head = pytest.importorskip("torch"), "replaced_tokens"
    theirs = make_reference(family, config, head, model_type)
    model, params = ours_of(family, theirs, config, head, folder / "values")
    batch = example_batch(family.facts(config), 4, length=20)
    seen, replaced = batch["mask"].astype(bool), np.random.default_rng(1).integers(0, 2, batch["mask"].shape)

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        logits = model.apply({"params": params}, **batch).logits
        each = jax.nn.softplus(logits[..., 0]) - logits[..., 0] * replaced
        return (each * seen).sum() / seen.sum(), logits

    (loss, logits), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    expected = theirs(**torch_inputs(batch), labels=torch.tensor(replaced))
    expected.loss.backward()
    close(logits[seen][:, 0], expected.logits[torch.tensor(seen)], "logits")
    close(loss, expected.loss, "loss")
    _compare_gradients(family, theirs, config, head, gradient, folder)


def compare_spans(family: Family, config: Any, model_type: str, folder: Path) -> None:
    """Holds the logits of starts and ends, their loss and the gradient of every parameter against the reference's."""
    torch = pytest.importorskip("torch")
    theirs = make_reference(family, config, "question_answering", model_type)
    model, params = ours_of(family, theirs, config, "question_answering", folder / "values")
    batch = example_batch(model.facts, 4, length=20)
    # Rows without padding: the reference's loss is of padding too, whose hidden states mean nothing.
    batch["mask"][:] = 1
    ends = np.array([[0, 3], [2, 5], [1, 1], [19, 19]])

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        logits = model.apply({"params": params}, **batch).logits
        first, last = (cross_entropy(logits[..., i], jnp.asarray(ends[:, i])).mean() for i in (0, 1))
        return (first + last) / 2, logits

    (loss, logits), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    starts, stops = torch.tensor(ends).T
    expected = theirs(**torch_inputs(batch), start_positions=starts, end_positions=stops)
    expected.loss.backward()
    assert logits.shape == (*batch["tokens"].shape, 2)
    for i, wanted in enumerate((expected.start_logits, expected.end_logits)):
        close(logits[..., i], wanted, "logits")
    close(loss, expected.loss, "loss")
    _compare_gradients(family, theirs, config, "question_answering", gradient, folder)


def compare_choices(family: Family, config: Any, model_type: str, folder: Path, padded_in_front: bool = False) -> None:
    """Holds the logits of two questions with two choices each, their loss and the gradient of every parameter against the reference's."""
    torch, head = pytest.importorskip("torch"), "multiple_choice"
    theirs = make_reference(family, config, head, model_type)
    model, params = ours_of(family, theirs, config, head, folder / "values")
    batch = example_batch(family.facts(config), 4, length=20)
    if padded_in_front:
        batch = {name: value[:, ::-1] for name, value in batch.items()}
    right = np.array([1, 0])

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        logits = model.apply({"params": params}, **batch).logits
        return cross_entropy(logits.reshape(2, 2), jnp.asarray(right)).mean(), logits

    (loss, logits), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    folded = {name: value.reshape(2, 2, -1) for name, value in torch_inputs(batch).items()}
    expected = theirs(**folded, labels=torch.tensor(right))
    expected.loss.backward()
    assert logits.shape == (4, 1)
    close(logits.reshape(2, 2), expected.logits, "logits")
    close(loss, expected.loss, "loss")
    _compare_gradients(family, theirs, config, head, gradient, folder)


def _compare_gradients(family: Family, theirs: Any, config: Any, head: str | None, gradient: Any, folder: Path) -> None:
    """Holds our gradients against those of the reference, laid out as ours by the same table."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    _, wanted = ours_of(family, theirs, config, head, folder / "gradients")
    ours = paths_of(gradient)
    for path, value in paths_of(wanted).items():
        close(ours[path], torch.tensor(np.asarray(value)), f"gradient of {path}")
