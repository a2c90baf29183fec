"""Layers with gradients of their own, against plain autodiff of their formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.layers import ACTIVATIONS, Compute, affine, dropout, einsum, layer_norm


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def test_layer_norm_has_the_gradient_of_its_formula() -> None:
    x, g = arrays(5, (4, 6, 16), (4, 6, 16))
    scale, bias = arrays(6, (16,), (16,))

    def formula(x, scale, bias):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias

    ours, vjp = jax.vjp(lambda x, scale, bias: layer_norm(x, scale, bias, 1e-5), 3 * x + 5, scale, bias)
    wanted, wanted_vjp = jax.vjp(formula, 3 * x + 5, scale, bias)
    np.testing.assert_allclose(ours, wanted, atol=2e-6)
    for got, expected in zip(vjp(g), wanted_vjp(g), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name", [None, "gelu", "relu", "gelu_new"])
def test_affine_has_the_gradient_of_its_parts(name: str | None) -> None:
    act = (lambda x: x) if name is None else ACTIVATIONS[name]
    x, w, b, g = arrays(7, (2, 5, 16), (16, 12), (12,), (2, 5, 12))
    compute = Compute()
    ours, vjp = jax.vjp(lambda x, w, b: affine("bsf,fd->bsd", x, w, b, compute, None if name is None else act), x, w, b)
    wanted, wanted_vjp = jax.vjp(lambda x, w, b: einsum("bsf,fd->bsd", act(x), w, compute) + b, x, w, b)
    np.testing.assert_array_equal(ours, wanted)
    for got, expected in zip(vjp(g), wanted_vjp(g), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_affine_keeps_its_input_not_the_activation() -> None:
    x, w, b = arrays(8, (2, 5, 16), (16, 12), (12,))
    act = ACTIVATIONS["gelu"]
    kept = jax.eval_shape(
        lambda *x: jax.vjp(lambda x, w, b: affine("bsf,fd->bsd", x, w, b, Compute(), act), *x)[1], x, w, b
    )
    assert sum(leaf.size == x.size for leaf in jax.tree.leaves(kept)) == 1


def test_hash_dropout_keeps_its_rate_and_the_same_elements_backwards() -> None:
    x, g = arrays(9, (8, 64, 96), (8, 64, 96))
    out, vjp = jax.vjp(lambda x: dropout(x, 0.25, jax.random.key(1), "hash"), x)
    kept = np.asarray(out) != 0
    assert abs(kept.mean() - 0.75) < 5 * (0.25 * 0.75 / x.size) ** 0.5
    np.testing.assert_allclose(out, np.where(kept, x / 0.75, 0), rtol=1e-4)
    np.testing.assert_allclose(vjp(g)[0], np.where(kept, g / 0.75, 0), rtol=1e-4)
    other = dropout(x, 0.25, jax.random.key(2), "hash")
    assert 0.55 < ((np.asarray(other) != 0) == kept).mean() < 0.7  # 0.625 expected


def test_hash_dropout_keeps_nothing_for_its_backward_pass() -> None:
    x = jnp.ones((4, 16, 32))
    kept = jax.eval_shape(lambda x: jax.vjp(lambda x: dropout(x, 0.1, jax.random.key(0), "hash"), x)[1], x)
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) == 2


@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 4, 96)])
def test_hash_dropout_of_any_rank(shape: tuple[int, ...]) -> None:
    out = dropout(jnp.ones(shape), 0.5, jax.random.key(4), "hash")
    assert out.shape == shape
    assert set(np.unique(out)) == {0.0, 2.0}


@pytest.mark.parametrize("act", [None, "gelu"])
def test_gradients_of_weights_in_bfloat16_are_those_of_float32_rounded_once(act: str | None) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, g = (jax.random.normal(k, shape) for k, shape in zip(keys, ((2, 5, 8), (8, 6), (2, 5, 6)), strict=True))

    def gradients(gradient_dtype: str | None) -> tuple[jax.Array, ...]:
        compute = Compute(gradient_dtype=gradient_dtype)
        function = ACTIVATIONS[act] if act else None
        return jax.vjp(lambda x, w: affine("bsf,fd->bsd", x, w, None, compute, function), x, w)[1](g)

    (dx, dw), (same_dx, rounded) = gradients(None), gradients("bfloat16")
    np.testing.assert_array_equal(same_dx, dx)
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, dw.astype(jnp.bfloat16).astype(jnp.float32))
    assert (rounded != dw).any()
