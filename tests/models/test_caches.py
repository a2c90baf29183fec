"""Decoding with a cache: what a model says of further tokens is what it says of the whole text."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import LoraConfig, MeshConfig
from jaxft.errors import UserError
from jaxft.layers import Compute, unlabel
from jaxft.models import adapters
from jaxft.models.caches import Cache, init_cache
from jaxft.models.families import bert, llama
from jaxft.models.initial import initialisable
from jaxft.parallel.sharding import make_mesh

LENGTHS = (9, 4, 7)
MORE = 6  # tokens that follow each prompt
CUTS = (1, 1, 3, 1)  # of which so many are read at a time
PLACES = max(LENGTHS) + MORE + 2
TEXTS = [np.random.default_rng(i).integers(5, 96, n + MORE).astype(np.int32) for i, n in enumerate(LENGTHS)]


def model_of(**how: Any) -> Any:
    return llama.Model(llama.TINY, "causal_lm", Compute(**how))


@functools.cache
def params() -> Any:
    model = model_of()
    return jax.jit(lambda key: initialisable(model).init(key, jnp.zeros((1, 2), jnp.int32))["params"])(
        jax.random.key(0)
    )


@functools.cache
def whole() -> tuple[np.ndarray, ...]:
    """Logits of each text, read by itself and without a cache."""
    padded = np.stack([np.pad(text, (0, PLACES - len(text))) for text in TEXTS])
    mask = np.stack([np.arange(PLACES) < len(text) for text in TEXTS])
    logits = jax.jit(model_of(attention="reference").apply)({"params": params()}, padded, mask).logits
    return tuple(np.asarray(logits[i, : len(text)]) for i, text in enumerate(TEXTS))


def prompts(side: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask) of all prompts, padded on one side."""
    longest = max(LENGTHS)
    tokens, mask = np.zeros((2, len(LENGTHS), longest), np.int32)
    for i, n in enumerate(LENGTHS):
        at = slice(0, n) if side == "right" else slice(longest - n, longest)
        tokens[i, at], mask[i, at] = TEXTS[i][:n], 1
    return tokens, mask


def decoded(model: Any, side: str, dtype: Any = None, tree: Any = None) -> tuple[list[np.ndarray], Cache]:
    """Logits of every token, read with a cache: the prompts, then the rest in small steps."""
    run = jax.jit(lambda params, cache, *batch: model.apply({"params": params}, *batch, cache=cache))
    tree = params() if tree is None else tree
    tokens, mask = prompts(side)
    out = run(tree, init_cache(model, len(LENGTHS), PLACES, dtype), tokens, mask)
    rows = [[np.asarray(out.logits)[i, mask[i] == 1]] for i in range(len(LENGTHS))]
    done = 0
    for count in CUTS:
        step = np.stack([text[n + done : n + done + count] for n, text in zip(LENGTHS, TEXTS, strict=True)])
        out = run(tree, out.cache, step)
        for row, logits in zip(rows, np.asarray(out.logits), strict=True):
            row.append(logits)
        done += count
    return [np.concatenate(row) for row in rows], out.cache


SLOW = [{"attention": "xla", "layers": "scanned"}, {"attention": "jax"}, {"remat": "full", "layers": "scanned"}]


@pytest.mark.parametrize(
    ("side", "how"),
    [
        ("left", {}),
        ("right", {"layers": "scanned", "attention": "blockwise"}),
        *(pytest.param(side, how, marks=pytest.mark.slow) for side in ("left", "right") for how in SLOW),
    ],
    ids=str,
)
def test_steps_with_a_cache_say_what_the_whole_text_says(side: str, how: dict[str, Any]) -> None:
    found, cache = decoded(model_of(**how), side)
    for one, wanted in zip(found, whole(), strict=True):
        np.testing.assert_allclose(one, wanted, atol=2e-5, rtol=2e-5)
    assert int(cache.filled) == max(LENGTHS) + MORE
    np.testing.assert_array_equal(cache.mask.sum(-1), [n + MORE for n in LENGTHS])


def test_a_bfloat16_cache_rounds_keys_and_values_alone() -> None:
    found, cache = decoded(model_of(), "left", "bfloat16")
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    scale = max(np.abs(one).max() for one in whole())
    worst = max(np.abs(one - wanted).max() for one, wanted in zip(found, whole(), strict=True))
    assert 2e-5 * scale < worst < 2**-7 * scale


def test_steps_share_one_program() -> None:
    model, traced = model_of(), []

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params: Any, cache: Cache, tokens: Any) -> tuple[Any, Cache]:
        traced.append(tokens.shape)
        out = model.apply({"params": params}, tokens, cache=cache)
        return out.logits[:, -1].argmax(-1).astype(jnp.int32)[:, None], out.cache

    tokens, cache = jnp.full((2, 1), 7, jnp.int32), init_cache(model, 2, 12)
    for _ in range(6):
        tokens, cache = step(params(), cache, tokens)
    assert traced == [(2, 1)]
    assert int(cache.filled) == 6


def test_tokens_beyond_the_last_place_are_an_error_or_nan() -> None:
    model, tokens = model_of(), jnp.ones((2, 3), jnp.int32)
    with pytest.raises(UserError, match="cache of 2 places: no room for 3 tokens"):
        model.apply({"params": params()}, tokens, cache=init_cache(model, 2, 2))
    run = jax.jit(lambda params, cache: model.apply({"params": params}, tokens, cache=cache))
    first = run(params(), init_cache(model, 2, 5))
    assert np.isfinite(first.logits).all()
    assert np.isnan(run(params(), first.cache).logits).all()  # inside a program, no one knows
    with pytest.raises(UserError, match="cache of 5 places, 3 of them filled: no room for 3 tokens"):
        model.apply({"params": params()}, tokens, cache=first.cache)


def test_what_a_cache_does_not_go_with_is_refused() -> None:
    model, tokens = model_of(), jnp.ones((2, 3), jnp.int32)
    for options, message in (
        ({"segments": tokens}, "no segments with it"),
        ({"attentions": True}, "no attentions with it"),
        ({"cache": init_cache(model, 3, 8)}, "cache of 3 rows, tokens of 2"),
    ):
        with pytest.raises(UserError, match=message):
            model.apply({"params": params()}, tokens, **({"cache": init_cache(model, 2, 8)} | options))
    with pytest.raises(UserError, match="beyond the model's limit of 64 positions"):
        init_cache(model, 2, 65)
    with pytest.raises(UserError, match="keeps no cache"):
        init_cache(bert.Model(bert.TINY, None, Compute()), 2, 8)


@pytest.mark.slow
def test_gradients_go_through_a_cache() -> None:
    """As much of them as the tokens' own part in what follows."""
    model, text = model_of(), jnp.asarray(TEXTS[0])[None]
    weights = jnp.asarray(np.random.default_rng(0).standard_normal(96), jnp.float32)

    def at_once(params: Any) -> Any:
        return (model.apply({"params": params}, text).logits[:, 6:] * weights).sum()

    def in_two(params: Any) -> Any:
        first = model.apply({"params": params}, text[:, :6], cache=init_cache(model, 1, 15))
        return (model.apply({"params": params}, text[:, 6:], cache=first.cache).logits * weights).sum()

    one, other = (jax.jit(jax.grad(loss))(params()) for loss in (at_once, in_two))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max() + 2e-6), one, other)


@pytest.mark.slow
def test_adapters_and_meshes_leave_a_cache_alone() -> None:
    model: Any = adapters.adapted(model_of(), LoraConfig(rank=2))
    fresh = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]["lora"]
    tree = {"base": params(), "lora": unlabel(fresh)[0]}
    found, _ = decoded(model, "left", tree=tree)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, tensor=2, fsdp=1, context=1), jax.devices()[:2])):
        split, _ = decoded(model_of(), "right")
    for one, other, wanted in zip(found, split, whole(), strict=True):
        np.testing.assert_allclose(one, wanted, atol=2e-5, rtol=2e-5)
        np.testing.assert_allclose(other, wanted, atol=2e-5, rtol=2e-5)
