"""What every model family must satisfy. Families are found by themselves: a new one is tested by being there."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import TEXTS

from jaxft import models
from jaxft.config import MeshConfig
from jaxft.hub.convert import export_tensors, import_params
from jaxft.hub.weights import open_weights, write_safetensors
from jaxft.layers import Compute
from jaxft.models.example import example_batch
from jaxft.models.initial import init_params, shapes_and_axes
from jaxft.parallel.sharding import DEFAULT_RULES, make_mesh, shardings_of
from jaxft.trees import of_layers, paths_of

FAMILIES = models.families()
# What families' own tests hold too is slow here, and what they have of BERT's encoder.
MOST = [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("bert", "llama"))) for name in FAMILIES]
OF_TEXTS = [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("bert", "llama"))) for name in TEXTS]
HEADS = [(family, head) for family in FAMILIES for head in models.family(family).HEADS]

ROUND_TRIPS = [
    pytest.param(family, head, marks=[pytest.mark.slow] * (family != "bert" and head not in ("masked_lm", "causal_lm")))
    for family, head in HEADS
]


def tiny(family: str) -> Any:
    """The family's test configuration without dropout."""
    config = models.family(family).TINY
    fields = dataclasses.fields(config)
    off = {field.name: 0.0 for field in fields if "dropout" in field.name and field.default is not None}
    return dataclasses.replace(config, **off)


def head_to_train(family: str) -> str:
    """The first head that has logits."""
    return next(head for head in models.family(family).HEADS if head is not None)


@functools.cache
def params_of(family: str, head: str | None) -> Any:
    """Fresh parameters, which no test changes."""
    return init_params(models.family(family).Model(tiny(family), head), 0)


def result(out: Any) -> Any:
    return out.hidden if out.logits is None else out.logits


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_every_parameter_is_labelled_and_every_label_is_in_the_table(family: str, head: str | None) -> None:
    model: Any = models.family(family).Model(tiny(family), head)
    shapes, axes = shapes_and_axes(model)
    for path, leaf in paths_of(shapes).items():
        names: Any = axes
        for part in path.split("/"):
            names = names[part]
        assert len(names) == len(leaf.shape), path
        assert (of_layers(names[0])) == path.startswith(tuple(f"{one.path}/" for one in model.facts.stacks)), path
        assert {"layers" if of_layers(name) else name for name in names} <= {None, *dict(DEFAULT_RULES.table)}, path


def test_shapes_are_traced_once_and_are_the_callers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = models.family("bert")

    def shapes_of(size: int) -> Any:
        return shapes_and_axes(module.Model(dataclasses.replace(tiny("bert"), intermediate_size=size), None))[0]

    first = shapes_of(24)
    wanted = paths_of(first)
    first["layers"]["mlp"].clear()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "eval_shape", None)
        assert paths_of(shapes_of(24)) == wanted
    path = "layers/mlp/up/kernel"
    assert (wanted[path].shape[-1], paths_of(shapes_of(40))[path].shape[-1]) == (24, 40)


@pytest.mark.parametrize(("family", "head"), ROUND_TRIPS)
def test_round_trip_through_hugging_face_layout_is_bit_equal(family: str, head: str | None, tmp_path: Path) -> None:
    module = models.family(family)
    model = module.Model(tiny(family), head, Compute())
    shapes, _ = shapes_and_axes(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    layout = module.hf_layout(model.config, head)
    write_safetensors(tmp_path, export_tensors(params, layout, bare=head is None), shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with open_weights(tmp_path) as weights:
        again = import_params(weights, layout, shapes, lambda _: None, np.float32)
    assert not again.fresh
    assert not again.unused
    jax.tree.map(np.testing.assert_array_equal, params, again.params)


# Each way once with BERT or Llama. RoBERTa's layers are BERT's.
QUICK_MODES = {
    ("bert", "unrolled", "offload"),
    ("bert", "scanned", "dots"),
    *(("llama", "unrolled", remat) for remat in ("none", "dots")),
    *(("llama", "scanned", remat) for remat in ("full", "offload")),
}
MODES = [
    pytest.param(family, layers, remat, marks=[] if (family, layers, remat) in QUICK_MODES else [pytest.mark.slow])
    for family in FAMILIES
    for layers in ("unrolled", "scanned")
    for remat in ("none", "full", "dots", "offload")
]  # fmt: skip


@pytest.mark.parametrize(("family", "layers", "remat"), MODES)
def test_execution_modes_give_the_same_values_and_gradients(family: str, layers: Any, remat: Any) -> None:
    module = models.family(family)
    config = module.TINY  # with dropout: its bits must not depend on the mode either
    expected, ours = (
        _gradient(family, config, compute) for compute in (Compute(), Compute(layers=layers, remat=remat))
    )
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * scale), expected, ours)


@functools.cache
def _gradient(family: str, config: Any, compute: Compute) -> Any:
    model: Any = models.family(family).Model(config, None, compute)
    params, batch = params_of(family, None), example_batch(model.facts, 3)
    # A random cotangent: the sum of squares of a normalised vector has no gradient to speak of.
    hidden = jax.eval_shape(lambda p: model.apply({"params": p}, **batch).hidden, params)
    weights = np.random.default_rng(0).normal(size=hidden.shape).astype(np.float32)

    def loss(p: Any) -> Any:
        return (model.apply({"params": p}, **batch, key=jax.random.key(3)).hidden * weights).sum()

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("family", OF_TEXTS)
def test_padding_changes_nothing_for_real_tokens(family: str) -> None:
    model: Any = models.family(family).Model(tiny(family), None)
    params = params_of(family, None)
    batch = example_batch(model.facts, 2)
    short = {name: value[:, :20] for name, value in batch.items()}
    short["mask"] = np.ones_like(short["mask"])
    padded = {name: np.pad(value, ((0, 0), (0, 9))) for name, value in short.items()}
    junk = padded | {"tokens": np.where(padded["mask"] == 1, padded["tokens"], 11)}
    apply = jax.jit(model.apply)
    base = apply({"params": params}, **short).hidden
    for other in (padded, junk):
        np.testing.assert_allclose(apply({"params": params}, **other).hidden[:, :20], base, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", OF_TEXTS)
def test_packed_rows_equal_separate_ones(family: str) -> None:
    model: Any = models.family(family).Model(tiny(family), None)
    params = params_of(family, None)
    rng = np.random.default_rng(0)
    first, second = (rng.integers(5, model.config.vocab_size, (1, n)).astype(np.int32) for n in (7, 12))
    packed = np.concatenate([first, second, np.zeros((1, 3), np.int32)], axis=1)
    segments = np.array([[1] * 7 + [2] * 12 + [0] * 3], np.int32)
    positions = np.array([[*range(7), *range(12), 0, 0, 0]], np.int32)
    apply = jax.jit(model.apply)
    out = apply({"params": params}, packed, segments=segments, positions=positions).hidden
    np.testing.assert_allclose(out[:, :7], apply({"params": params}, first).hidden, rtol=0, atol=1e-5)
    np.testing.assert_allclose(out[:, 7:19], apply({"params": params}, second).hidden, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", MOST)
def test_rows_of_padding_alone_are_finite(family: str) -> None:
    model: Any = models.family(family).Model(tiny(family), head_to_train(family))
    params = params_of(family, head_to_train(family))
    batch = example_batch(model.facts, 2)
    batch = {name: np.concatenate([value, np.zeros_like(value)]) for name, value in batch.items()}

    def loss(p: Any) -> Any:
        return model.apply({"params": p}, **batch).logits.sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("family", MOST)
@pytest.mark.parametrize("mesh_config", [MeshConfig(2, 2, 2)], ids=str)
def test_eight_devices_equal_one(family: str, mesh_config: MeshConfig) -> None:
    model: Any = models.family(family).Model(tiny(family), head_to_train(family), Compute())
    params = params_of(family, head_to_train(family))
    batch = example_batch(model.facts, 8)

    def loss(p: Any, batch: Any) -> Any:
        return jnp.square(model.apply({"params": p}, **batch, key=jax.random.key(1)).logits).sum()

    expected = jax.jit(jax.value_and_grad(loss))(params, batch)
    mesh = make_mesh(mesh_config)
    shapes, axes = shapes_and_axes(model)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings_of(mesh, DEFAULT_RULES, shapes, axes))
        value, gradient = jax.jit(jax.value_and_grad(loss))(placed, batch)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(a).max())),
        expected[1],
        gradient,
    )


@pytest.mark.parametrize("family", MOST)
def test_bf16_operands_stay_near_float32(family: str) -> None:
    config = tiny(family)
    batch = example_batch(models.family(family).facts(config), 4)
    exact, rounded = (
        models.family(family).Model(config, None, Compute(matmul_dtype=kind)) for kind in ("float32", "bfloat16")
    )
    params = params_of(family, None)
    a, b = (jax.jit(m.apply)({"params": params}, **batch).hidden for m in (exact, rounded))
    assert a.dtype == b.dtype == jnp.float32
    seen = batch["mask"] == 1 if "mask" in batch else ...
    difference = np.abs(np.asarray(a - b))[seen].max()
    assert 0 < difference < 0.1


@pytest.mark.sampled(6)
@pytest.mark.parametrize("family", TEXTS)
def test_only_encoders_see_what_comes_later(family: str) -> None:
    model: Any = models.family(family).Model(tiny(family), None)
    params = params_of(family, None)
    tokens = np.random.default_rng(0).integers(5, model.config.vocab_size, (1, 20)).astype(np.int32)
    changed = tokens.copy()
    changed[0, 12] += 1 if tokens[0, 12] < model.config.vocab_size - 1 else -1
    two_sides = model.facts.start is not None  # all of the source is seen, targets no further than themselves
    apply = jax.jit(
        lambda x: model.apply(
            {"params": params}, tokens if two_sides else x, **({"decoder_tokens": x} if two_sides else {})
        )
    )
    before, after = (np.asarray(apply(x).hidden) for x in (tokens, changed))
    moved = np.abs(before - after).max(axis=(0, 2)) > 0
    assert moved[12:].any()
    assert moved[:12].any() == (not model.facts.stacks[-1].causal)
