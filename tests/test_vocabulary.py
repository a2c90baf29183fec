"""The tiled vocabulary loss: the same numbers and gradients as from all logits at once, without holding them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import MeshConfig
from jaxft.errors import UserError
from jaxft.layers import Compute, score_tokens, vocabulary_logits
from jaxft.models.families import bert, llama
from jaxft.models.initial import init_params
from jaxft.parallel.sharding import make_mesh
from jaxft.tasks import causal_lm, masked_lm
from jaxft.tasks._tokens import token_cross_entropy
from jaxft.training.step import forward_of

B, M, D, V = 2, 5, 8, 23


def inputs(seed: int = 0) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    x, table, bias = (jnp.asarray(3 * rng.standard_normal(s), jnp.float32) for s in ((B, M, D), (V, D), (V,)))
    return x, table, bias, jnp.asarray(rng.integers(0, V, (B, M)), jnp.int32)


@pytest.mark.parametrize("tile", [1, 7, 23, 100])
@pytest.mark.parametrize("biased", [True, False])
def test_same_numbers_and_gradients(tile: int, biased: bool) -> None:
    x, table, bias, targets = inputs()
    g = jnp.asarray(np.random.default_rng(1).standard_normal((B, M)), jnp.float32)

    def whole(x: jax.Array, table: jax.Array, bias: jax.Array) -> jax.Array:
        logits = vocabulary_logits(x, table, bias if biased else None, Compute(), "length")
        return token_cross_entropy(logits, targets)

    def tiled(x: jax.Array, table: jax.Array, bias: jax.Array) -> jax.Array:
        return score_tokens(x, table, bias if biased else None, targets, Compute(vocab_tile=tile)).loss

    (wanted, wanted_vjp), (found, found_vjp) = (jax.vjp(f, x, table, bias) for f in (whole, tiled))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(found_vjp(g), wanted_vjp(g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    best = score_tokens(x, table, bias if biased else None, targets, Compute(vocab_tile=tile)).best
    np.testing.assert_array_equal(
        best, vocabulary_logits(x, table, bias if biased else None, Compute(), "length").argmax(-1)
    )


def test_no_array_of_all_logits_is_made() -> None:
    rows, vocabulary = 64, 4096
    shapes = [(1, rows, D), (vocabulary, D), (vocabulary,)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    targets = jax.ShapeDtypeStruct((1, rows), jnp.int32)

    def loss(x: Any, table: Any, bias: Any, targets: Any) -> Any:
        return score_tokens(x, table, bias, targets, Compute(vocab_tile=256)).loss.sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays, targets).compile()
    assert f"{rows},{vocabulary}]" not in (compiled.as_text() or "")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_models_and_tasks_give_the_same_either_way(tied: bool) -> None:
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(5, 96, (3, 12)), jnp.int32)
    batch = {"tokens": tokens, "mask": jnp.ones_like(tokens), "weights": jnp.ones(3)}
    pairs: list[tuple[Any, Any]] = [(bert, masked_lm.Task(4, (0, 2, 3, 4), 96)), (llama, causal_lm.Task())]
    for module, task in pairs:
        config = dataclasses.replace(module.TINY, tie_word_embeddings=tied)
        prepared = task.prepare(batch, jax.random.key(0))
        found = []
        for compute in (Compute(), Compute(vocab_tile=40)):
            model: Any = module.Model(config, task.head, compute)
            params = init_params(model, 0)

            def loss(params: Any, model: Any = model, task: Any = task, prepared: Any = prepared) -> Any:
                sums = task.sums(forward_of(model, params), prepared, None)
                return sums["loss"], sums["correct"]

            found.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
        ((value, hits), gradient), ((tiled_value, tiled_hits), tiled_gradient) = found
        np.testing.assert_allclose(tiled_value, value, rtol=1e-5)
        assert float(hits) == float(tiled_hits)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, tiled_gradient)


def test_a_split_vocabulary_is_refused() -> None:
    x, table, bias, targets = inputs()
    with (
        jax.set_mesh(make_mesh(MeshConfig(4, 1, 2))),
        pytest.raises(UserError, match="splits the vocabulary 2 ways already"),
    ):
        jax.eval_shape(lambda x, t: score_tokens(x, t, bias, targets, Compute(vocab_tile=4)).loss, x, table)


def test_capped_logits_in_tiles_are_those_at_once() -> None:
    rng = np.random.default_rng(0)
    x, table = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 8), (37, 8)))
    targets = jnp.asarray(rng.integers(0, 37, (2, 5)), jnp.int32)

    def at_once(x: Any, table: Any) -> Any:
        logits = vocabulary_logits(x, table, None, Compute(), "length", 1.5)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1).sum()

    def in_tiles(x: Any, table: Any) -> Any:
        return score_tokens(x, table, None, targets, Compute(vocab_tile=16), 1.5).loss.sum()

    one, other = (jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, table) for loss in (at_once, in_tiles))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), one, other)


@pytest.mark.parametrize("tile", [None, 40])
def test_the_z_loss_is_that_of_its_definition(tile: int | None) -> None:
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(5, 96, (2, 9)), jnp.int32)
    batch = {"tokens": tokens, "mask": jnp.ones_like(tokens), "weights": jnp.ones(2)}
    task, plain = causal_lm.Task(0.1), causal_lm.Task()
    model = llama.Model(llama.TINY, "causal_lm", Compute(vocab_tile=tile))
    params = init_params(model, 0)
    prepared = task.prepare(batch, jax.random.key(0))

    def ours(params: Any) -> Any:
        return task.sums(forward_of(model, params), prepared, None)["loss"]

    def defined(params: Any) -> Any:
        whole: Any = llama.Model(llama.TINY, "causal_lm", Compute())
        logits = whole.apply({"params": params}, tokens).logits[:, :-1]
        normaliser = jax.nn.logsumexp(logits, -1)
        loss = normaliser - jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
        return (loss + 0.1 * normaliser**2).sum()

    (value, gradient), (wanted, wanted_gradient) = (
        jax.jit(jax.value_and_grad(loss))(params) for loss in (ours, defined)
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, wanted_gradient)
    sums = [
        jax.jit(lambda params, one=one: one.sums(forward_of(model, params), prepared, None)) for one in (task, plain)
    ]
    told = [one.score(jax.device_get(summed(params))) for one, summed in zip((task, plain), sums, strict=True)]
    assert told[0]["loss"] == pytest.approx(told[1]["loss"], rel=1e-5)
