"""Dropout rates that are arguments of a program give the bits of those that are compiled in: alone, in attention, in all families."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention.cases import NATIVE, Case
from kinds import KINDS, family_of, tiny_config

from jaxft import models
from jaxft.attention import attend
from jaxft.attention.fused import tpu
from jaxft.config import LoraConfig, MeshConfig
from jaxft.errors import UserError
from jaxft.layers import Compute, Rate, RunTimeRate, dropout, run_time_rate
from jaxft.models.adapters import adapted
from jaxft.models.example import example_batch
from jaxft.models.initial import shapes_and_axes
from jaxft.models.rates import chosen_rates, is_rate, model_with_rates, with_rates
from jaxft.parallel.sharding import make_mesh

STATIC = {
    *("drop_path_rate", "encoder_layerdrop", "decoder_layerdrop"),  # of whole layers
    *("mask_time_prob", "mask_feature_prob"),  # of spans of sound
}
ARCHS = (*models.families(), *KINDS)


def assert_same(found: Any, wanted: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("bits", ["hash", "threefry"])
def test_dropout_at_a_rate_that_is_an_argument(bits: Any) -> None:
    x, g = (jax.random.normal(jax.random.key(i), (3, 5, 33)) for i in range(2))

    def both(rate: Rate, key: jax.Array) -> tuple[jax.Array, ...]:
        out, vjp = jax.vjp(lambda x: dropout(x, rate, key, bits), x)
        return out, *vjp(g)

    traced = []
    compiled, key = jax.jit(lambda *given: [both(*given), traced.append(given)][0]), jax.random.key(7)
    for rate in (0.1, 0.5, 0.0, 0.99):
        assert_same(compiled(run_time_rate(rate), key), jax.jit(functools.partial(both, rate))(key))
    assert_same(compiled(run_time_rate(0.0), key), (x, g))
    assert len(traced) == 1


def attention(case: Case, backend: str, bits: Any, platform: str, rate: Rate, key: jax.Array) -> tuple[jax.Array, ...]:
    compute = Compute(attention=backend, dropout_bits=bits, platform=platform)
    q, k, v, g = case.arrays
    out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, case.mask, compute, rate, key), q, k, v)
    return out, *vjp(g)


@pytest.mark.parametrize(
    ("backend", "bits"),
    [
        *(("xla", "hash"), ("xla", "threefry"), ("blockwise", "hash"), ("blockwise", "threefry")),
        *(("reference", "hash"), pytest.param(*NATIVE.values, "hash", marks=NATIVE.marks)),
        pytest.param("fused", "hash", marks=pytest.mark.slow),
    ],
)
def test_attention_at_a_rate_that_is_an_argument(backend: str, bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu, "_INTERPRET", True)
    case = Case("causal", "padding", "gqa", 32, 48, "float32")
    run = functools.partial(attention, case, backend, bits, "tpu" if backend == "fused" else "cpu")
    traced = []
    compiled, key = jax.jit(lambda *given: [run(*given), traced.append(given)][0]), jax.random.key(3)
    # XLA divides by a constant otherwise than by an argument, and the kernel does, in its backward pass.
    close = 1e-6 if backend == "fused" else 0.0
    for rate in (0.1, 0.5)[: 1 if backend == "fused" else 2]:
        found, wanted = compiled(run_time_rate(rate), key), jax.jit(functools.partial(run, rate))(key)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=close)
    without = jax.jit(functools.partial(attention, case, "reference", bits, "cpu", 0.0))(key)
    for one, other in zip(compiled(run_time_rate(0.0), key), without, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("backend", "mesh"),
    [
        ("ring", MeshConfig(4, context=2)),
        ("all_to_all", MeshConfig(4, context=2)),
        pytest.param(*NATIVE.values, MeshConfig(4, tensor=2), marks=NATIVE.marks),
    ],
)
def test_on_a_mesh(backend: str, mesh: MeshConfig) -> None:
    case = Case("causal", "padding", "mha", 32, 48, "float32")
    two = dataclasses.replace(mesh, data=8 // (mesh.tensor * mesh.context) // 2, fsdp=1)
    run = functools.partial(attention, case, backend, "hash", "cpu")
    with jax.set_mesh(make_mesh(two, jax.devices()[:4])):
        found = jax.jit(run)(run_time_rate(0.3), jax.random.key(3))
        wanted = jax.jit(functools.partial(run, 0.3))(jax.random.key(3))
    assert_same(found, wanted)


@pytest.mark.parametrize("backend", [NATIVE])
def test_native_attention_of_rows_with_a_key_each(backend: str) -> None:
    """As a user's ``vmap`` over rows asks for it."""
    case = Case("bidirectional", "none", "mha", 32, 48, "float32")
    compute = Compute(attention=backend, dropout_bits="hash", platform="cpu")
    q, k, v, _ = case.arrays
    keys = jax.random.split(jax.random.key(0), 2)

    def rows(rate: Rate) -> jax.Array:
        def one(q: jax.Array, k: jax.Array, v: jax.Array, key: jax.Array) -> jax.Array:
            return attend(q[None], k[None], v[None], case.mask, compute, rate, key)

        return jax.vmap(one)(q, k, v, keys)

    assert_same(jax.jit(rows)(run_time_rate(0.3)), jax.jit(functools.partial(rows, 0.3))())


# ----------------------------------------------------------------------------------------------------------- families


def said(config: Any, rates: dict[str, Any]) -> str:
    """What refuses these rates; empty: nothing does."""
    try:
        with_rates(config, rates)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("family", models.families())
def test_what_a_family_checks_as_a_rate_is_named_as_one(family: str) -> None:
    config = models.family(family).TINY
    checked = set()
    for field in dataclasses.fields(config):
        if "float" in str(field.type) and "must lie in 0..1" in said(config, {field.name: -0.25}):
            checked.add(field.name)
    fixed = getattr(config, "FIXED", {})
    named = {field.name for field in dataclasses.fields(config) if is_rate(field.name) and field.name not in fixed}
    assert checked - STATIC == named
    assert with_rates(config, dict.fromkeys(named, run_time_rate(0.5)))
    for name in named:
        for rate in (1.0, float("nan"), 0.999999):
            with pytest.raises(UserError, match=name):
                with_rates(config, {name: rate})


@pytest.mark.sampled(11)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_whose_rates_are_arguments(arch: str) -> None:
    family, config = models.family(family_of(arch)), tiny_config(arch)
    head = next((name for name, head in family.HEADS.items() if head.classes == "rows"), [*family.HEADS][-1])
    numbers = chosen_rates({field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    rates = {name: 0.15 + 0.05 * i for i, name in enumerate(sorted(numbers)) if not said(config, {name: 0.2})}
    assert rates
    model = adapted(family.Model(config, head, Compute(layers="scanned", remat="full")), LoraConfig(rank=None))
    batch, rng = example_batch(model.facts, 2, length=12), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), shapes_and_axes(model)[0])

    def gradient(rates: dict[str, RunTimeRate], params: Any) -> Any:
        whole = model_with_rates(model, rates)
        return jax.grad(lambda p: whole.apply({"params": p}, **batch, key=jax.random.key(1)).hidden.sum())(params)

    def told(rates: Mapping[str, Rate], key: jax.Array) -> jax.Array:
        out = model_with_rates(model, rates).apply({"params": params}, **batch, key=key)
        return out.hidden if out.logits is None else out.logits

    arguments, key = {name: run_time_rate(rate) for name, rate in rates.items()}, jax.random.key(1)
    compiled = jax.jit(told)
    found, wanted = compiled(arguments, key), jax.jit(functools.partial(told, rates))(key)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    assert (found != compiled(jax.tree.map(jnp.array, dict.fromkeys(rates, run_time_rate(0.0))), key)).any()
    # No rule of a gradient has an argument that it was not given.
    assert jax.tree.structure(jax.eval_shape(gradient, arguments, params)) == jax.tree.structure(params)


def test_adapters_pass_rates_on() -> None:
    family = models.family("bert")
    model = adapted(family.Model(family.TINY, None, Compute()), LoraConfig(rank=2))
    other = model_with_rates(model, {"hidden_dropout_prob": 0.4})
    assert other.config.hidden_dropout_prob == 0.4
    assert jax.tree.structure(shapes_and_axes(other)[0]) == jax.tree.structure(shapes_and_axes(model)[0])


def test_a_rate_that_is_an_argument_is_above_0_and_nothing_else_is_known() -> None:
    rate = run_time_rate(0.25)
    assert rate > 0.0
    assert rate != 0.0
    assert (int(rate.keep), float(rate.scale)) == (49152, float(np.float32(4 / 3)))
    with pytest.raises(TypeError, match=r"cannot be compared with 0\.5"):
        rate > 0.5  # noqa: B015
    assert jnp.shape(rate.keep) == ()
    with pytest.raises(UserError, match="train each rate by itself"):
        nn.Dropout(cast(float, rate), deterministic=False).apply({}, jnp.ones(3), rngs={"dropout": jax.random.key(0)})
