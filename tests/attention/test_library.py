"""Backends that are functions of other libraries: what they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxft.attention import MaskSpec, attend
from jaxft.attention.backends import library
from jaxft.attention.backends.scores import Call
from jaxft.layers import Compute

HIGHEST = jax.lax.Precision.HIGHEST


def arrays(length: int = 16) -> list[jax.Array]:
    """q, k, v and a cotangent: [2, 4, length, 8]."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((2, 4, length, 8)), jnp.float32) for _ in range(4)]


def products(jaxpr: Any) -> Iterator[Any]:
    """Every matrix product of a traced function, those of inner ones too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize("backend", ["jax", "xla", "blockwise", "reference"])
def test_products_of_float32_are_asked_for_at_full_precision(backend: str) -> None:
    """On an H100, gradients of backend `jax` were 5e-4 off: GPUs round float32 operands to TF32 unless told otherwise."""
    compute = Compute(attention=backend, platform="gpu")

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, MaskSpec(causal=True), compute), q, k, v)
        return out, *back(g)

    found = list(products(jax.make_jaxpr(both)(*arrays()).jaxpr))
    assert len(found) >= 6  # two forwards, four backwards
    assert {equation.params["precision"] for equation in found} == {(HIGHEST, HIGHEST)}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_cudnn_is_told_lengths_where_padding_is_last(monkeypatch: Any, causal: bool, last: bool) -> None:
    """The call is cuDNN's; XLA's implementation of the same function computes it here."""
    asked: list[dict[str, Any]] = []
    real = jax.nn.dot_product_attention

    def elsewhere(*args: Any, **given: Any) -> jax.Array:
        asked.append(given)
        return real(*args, **given | {"implementation": "xla"})

    monkeypatch.setattr(jax.nn, "dot_product_attention", elsewhere)
    q, k, v, g = arrays()
    padding = jnp.arange(16) < jnp.array([[11], [0]])  # the second row is padding alone
    mask = MaskSpec(padding, causal=causal)

    def of(compute: Compute) -> Any:
        call = Call(compute, 8**-0.5)
        out, back = jax.vjp(lambda q, k, v: library.cudnn(call, q, k, v, mask, None), q, k, v)
        return out, *back(g)

    found = of(Compute(platform="gpu", padding_last=last))
    assert [given["implementation"] for given in asked] == ["cudnn"]
    lengths, array = asked[0]["key_value_seq_lengths"], asked[0]["mask"]
    assert (lengths is None) == (not last)
    assert (array is None) == last
    exact = Compute(attention="reference")
    out, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask, exact), q, k, v)
    for ours, true in zip(found, (out, *back(g)), strict=True):
        np.testing.assert_allclose(ours, true, atol=2e-6)
    assert not np.any(found[0][1])
