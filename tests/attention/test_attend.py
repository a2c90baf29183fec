"""`attend` against plain autodiff of the textbook formula: masks, dropout, devices, what is kept and what is refused."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.attention import MaskSpec, attend
from jaxft.attention.dropout import make_dropout
from jaxft.config import MeshConfig
from jaxft.errors import UserError
from jaxft.layers import Compute
from jaxft.parallel.sharding import make_mesh, make_rules

B, N, S, H = 3, 2, 11, 8


def textbook(q, k, v, mask: MaskSpec, rate: float, key) -> jax.Array:
    logits = jnp.einsum("bnsh,bnth->bnst", q, k, precision="highest") / np.sqrt(q.shape[-1])
    allowed = mask.allowed(q.shape[2])
    allowed = jnp.ones((1, 1, 1, 1), bool) if allowed is None else allowed
    weights = jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)
    weights = jnp.where(allowed.any(-1, keepdims=True), weights, 0.0)
    if key is not None:
        b, n, s, _ = weights.shape
        drop = make_dropout(key, rate, b, n, s, s, Compute().dropout_bits)
        kept, scale = drop.kept(jnp.arange(weights.shape[2]), 0, weights.shape[3]), drop.scale
        weights = jnp.where(kept, weights * scale, 0.0)
    return jnp.einsum("bnst,bnth->bnsh", weights, v, precision="highest")


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def passes(f: Callable[..., jax.Array], g: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    """Values and gradients, from one program: eager ones would be compiled operation by operation."""

    def run(g: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, ...]:
        out, vjp = jax.vjp(f, *inputs)
        return out, *vjp(g)

    return jax.jit(run)(g, *inputs)


def masks() -> dict[str, MaskSpec]:
    lengths = np.array([S, 4, 7])
    padding = jnp.asarray(np.arange(S) < lengths[:, None])
    segments = jnp.asarray(np.where(np.arange(S) < lengths[:, None], 1 + np.arange(S) // 3, 0))
    return {
        "none": MaskSpec(),
        "padding": MaskSpec(padding),
        "segments": MaskSpec(None, segments),
        "both": MaskSpec(padding.at[0, 5].set(False), segments),
    }


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_values_and_gradients_are_those_of_the_formula(kind: str, rate: float) -> None:
    q, k, v, g = arrays(0, *[(B, N, S, H)] * 4)
    mask, key = masks()[kind], jax.random.key(3) if rate else None
    ours, *gradients = passes(lambda q, k, v: attend(q, k, v, mask, Compute(), rate, key), g, q, k, v)
    wanted, *wanted_gradients = passes(lambda q, k, v: textbook(q, k, v, mask, rate, key), g, q, k, v)
    np.testing.assert_allclose(ours, wanted, atol=2e-6)
    if kind in ("none", "padding"):  # where a row may see nothing, the gradient of the formula is nan
        for got, expected in zip(gradients, wanted_gradients, strict=True):
            np.testing.assert_allclose(got, expected, atol=5e-6)


def test_segments_have_the_gradients_of_separate_sequences() -> None:
    q, k, v, g = arrays(1, *[(1, N, 9, H)] * 4)
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    _, *packed = passes(lambda q, k, v: attend(q, k, v, MaskSpec(None, segments), Compute(), 0.0, None), g, q, k, v)
    for part in (slice(0, 4), slice(4, 9)):
        cut = [x[:, :, part] for x in (q, k, v, g)]
        _, *alone = passes(lambda q, k, v: attend(q, k, v, MaskSpec(), Compute(), 0.0, None), cut[3], *cut[:3])
        for got, expected in zip(packed, alone, strict=True):
            np.testing.assert_allclose(got[:, :, part], expected, atol=5e-6)


def test_rows_that_see_nothing_give_zeros_and_no_gradient() -> None:
    q, k, v, g = arrays(2, *[(1, N, S, H)] * 4)
    mask = MaskSpec(jnp.zeros((1, S), bool))
    for x in passes(lambda q, k, v: attend(q, k, v, mask, Compute(), 0.0, None), g, q, k, v):
        np.testing.assert_array_equal(x, np.zeros_like(x))


def test_grouped_heads_are_repeated_heads() -> None:
    q, k, v, g = arrays(9, (B, 4, S, H), (B, 2, S, H), (B, 2, S, H), (B, 4, S, H))
    mask = dataclasses.replace(masks()["padding"], causal=True)

    def grouped(q, k, v):
        return attend(q, k, v, mask, Compute(), 0.3, jax.random.key(0))

    def repeated(q, k, v):
        return textbook(q, jnp.repeat(k, 2, axis=1), jnp.repeat(v, 2, axis=1), mask, 0.3, jax.random.key(0))

    (ours, *gradients), (wanted, *wanted_gradients) = (passes(f, g, q, k, v) for f in (grouped, repeated))
    np.testing.assert_allclose(ours, wanted, atol=2e-6)
    for got, expected in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, expected, atol=5e-6)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize(
    ("backend", "rate", "ways"), [("ring", 0.0, 4), ("ring", 0.3, 2), ("ring", 0.3, 8), ("all_to_all", 0.3, 2)]
)
def test_rows_split_over_devices_give_the_same(kind: str, causal: bool, backend: str, rate: float, ways: int) -> None:
    b, s = 8 // ways, 16
    q, k, v, g = arrays(10, (b, 4, s, H), (b, 2, s, H), (b, 2, s, H), (b, 4, s, H))
    mask = masks()[kind]

    def longer(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jnp.resize(jnp.pad(x, ((0, 0), (0, s - S))), (b, s))

    mask = MaskSpec(longer(mask.padding), longer(mask.segments), causal)
    key = jax.random.key(3) if rate else None

    def both(backend, q, k, v, g, mask):
        compute = Compute(attention=backend)
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask, compute, rate, key), q, k, v)
        return out, *vjp(g)

    wanted = jax.jit(functools.partial(both, "reference"))(q, k, v, g, mask)
    with jax.set_mesh(make_mesh(MeshConfig(8 // ways, context=ways))):
        found = jax.jit(functools.partial(both, backend))(q, k, v, g, mask)
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


def test_a_ring_needs_query_and_key_heads_split_alike() -> None:
    q, k = arrays(0, (2, 4, 8, H), (2, 1, 8, H))
    compute = Compute(rules=make_rules(MeshConfig(rules={"act_kv_heads": ()})))
    mesh = make_mesh(MeshConfig(2, tensor=2, context=2))
    with (
        jax.set_mesh(mesh),
        pytest.raises(
            UserError,
            match=r"attention: no backend can do this: ring needs query and key heads split over the same mesh axes",
        ),
    ):
        jax.jit(lambda q, k: attend(q, k, k, MaskSpec(), compute, 0.0, None))(q, k)


@pytest.mark.parametrize("keys", [(B, N, S, H + 1), (B + 1, N, S, H), (B, 3, S, H)])
def test_shapes_that_do_not_fit_are_refused(keys: tuple[int, ...]) -> None:
    q, k = arrays(0, (B, N, S, H), keys)
    with pytest.raises(ValueError, match="B and H must be equal, K divide N"):
        attend(q, k, k, MaskSpec(), Compute(), 0.0, None)


def test_large_logits_do_not_overflow() -> None:
    q, k, v, g = arrays(3, *[(1, N, S, H)] * 4)
    found = passes(lambda q, k, v: attend(q, k, v, MaskSpec(), Compute(), 0.0, None), g, 1e4 * q, 1e4 * k, v)
    assert all(np.isfinite(x).all() for x in found)


@jax.jit
def within_segments(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    return attend(q, k, v, MaskSpec(None, segments), Compute(), 0.0, None)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), cut=st.integers(1, S - 1))
def test_what_is_in_one_document_never_moves_another(seed: int, cut: int) -> None:
    q, k, v, other = arrays(seed, *[(1, N, S, H)] * 4)
    segments = np.where(np.arange(S) < cut, 1, 2)[None]
    before = within_segments(q, k, v, segments)
    first = (np.arange(S) < cut)[:, None]
    after = within_segments(*(np.where(first, 100 * other, x) for x in (q, k, v)), segments)
    np.testing.assert_array_equal(before[:, :, cut:], after[:, :, cut:])


def test_attention_keeps_nothing_of_size_s_times_t() -> None:
    length = 64
    q, k, v = arrays(4, *[(2, N, length, H)] * 3)
    kept = jax.eval_shape(
        lambda *x: jax.vjp(lambda q, k, v: attend(q, k, v, MaskSpec(), Compute(), 0.0, None), *x)[1], q, k, v
    )
    assert max(leaf.size for leaf in jax.tree.leaves(kept)) <= 2 * N * length * H
