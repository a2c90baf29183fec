"""Stacks whose layers differ: what is scanned, and that values and gradients do not depend on how they are computed."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

from jaxft.layers import Compute, apply_stack, declare, dropout, stacked_params
from jaxft.layers.stacks import _period_of, _repeats

WIDTH = 4


class Layer(nn.Module):
    """A letter says what it does; a small one has no scale."""

    compute: Compute
    facts = None  # a layer of a family

    @nn.compact
    def __call__(self, x: Any, key: Any, shift: Any, kind: str, state: Any = None) -> Any:
        if kind.isupper():
            x = x * declare(self, "scale", nn.initializers.normal(1.0), ("norm",), (WIDTH,), "float32")
        y = (
            x @ declare(self, "kernel", nn.initializers.normal(0.5), ("embed", "mlp"), (WIDTH, WIDTH), "float32")
            + shift
        )
        y = dropout(y, 0.3, key)
        y = x + (jnp.tanh(y) if kind.upper() == "A" else jnp.sin(2 * y))
        return y if state is None else (y * state["gain"], {"mean": y.mean(-1), "seen": state["seen"] + 1})


class Stack(nn.Module):
    kinds: str
    compute: Compute
    stateful: bool = False

    @nn.compact
    def __call__(self, x: Any, key: Any) -> Any:
        begins = {"scale": sum(kind.islower() for kind in self.kinds)}
        layer, example = Layer(self.compute, parent=None), (x, None, 0.5, self.kinds[-1])
        params = stacked_params(self, "layers", layer, len(self.kinds), *example, begins=begins)
        stack = (layer, params, len(self.kinds), x, key, 0.5)
        state = None
        if self.stateful:
            numbers = jnp.arange(len(self.kinds))
            state = {"gain": 1.0 + numbers / 10, "seen": 7 * numbers}
        last, kept, said = apply_stack(*stack, keep=True, kinds=self.kinds, begins=begins, state=state)
        return (last, kept, said) if self.stateful else (last, kept)


def computed(kinds: str, **how: Any) -> Any:
    model: Any = Stack(kinds, Compute(**how))
    x = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
    params = Stack(kinds, Compute()).init(jax.random.key(0), x, None)["params"]

    def loss(params: Any, x: Any) -> Any:
        last, states = model.apply({"params": params}, x, jax.random.key(1))
        weights = jnp.arange(1.0, states.size + 1).reshape(states.shape)
        return (states * jnp.sin(weights)).sum(), (last, states)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)


SLOW = [
    pytest.param(kinds, marks=pytest.mark.slow) for kinds in ("AAAA", "aABABA", "ABBABBAB", "AB", "A", "aAB", "AABBB")
]


@pytest.mark.parametrize("kinds", ["aBBABBABBA", "aabBABA", "a", *SLOW])
def test_scanned_layers_are_the_unrolled_ones(kinds: str) -> None:
    expected, found = computed(kinds), computed(kinds, layers="scanned", remat="full")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), expected, found)
    (_, (last, states)), (gradient, _) = expected
    assert states.shape == (len(kinds) + 1, 3, WIDTH)
    np.testing.assert_array_equal(last, states[-1])
    scales = len(kinds) - sum(kind.islower() for kind in kinds)
    # What no layer has is no parameter.
    assert gradient["layers"].get("scale", np.zeros((0, WIDTH))).shape == (scales, WIDTH)


@pytest.mark.parametrize("kinds", ["AAAA", "aABABA", "aBBABBABBA", "AB", "A", "AABBB"])
def test_each_layer_has_its_own_state(kinds: str) -> None:
    x = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
    params = Stack(kinds, Compute()).init(jax.random.key(0), x, None)

    def run(**how: Any) -> Any:
        return jax.jit(Stack(kinds, Compute(**how), stateful=True).apply)(params, x, jax.random.key(1))

    expected, found = run(), run(layers="scanned")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), expected, found)
    last, kept, said = expected
    np.testing.assert_array_equal(said["seen"], 7 * np.arange(len(kinds)) + 1)
    gain = 1.0 + np.arange(len(kinds)) / 10
    np.testing.assert_allclose(said["mean"] * gain[:, None], np.asarray(kept[1:]).mean(-1), rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(last, kept[-1])


@pytest.mark.parametrize(
    ("kinds", "period"),
    [
        ("AAAA", (0, 1, 4)),
        ("A", (0, 1, 1)),
        ("AB", (2, 1, 0)),
        ("aBBA" + "BBA" * 6, (1, 3, 7)),
        ("aBBA" * 5, (0, 4, 5)),
        ("ABBABBAB", (0, 3, 2)),
        ("AABBB", (2, 1, 3)),
    ],
)
def test_as_few_layers_as_can_be_are_compiled(kinds: str, period: tuple[int, int, int]) -> None:
    assert _period_of(tuple(kinds)) == period


class Shared(nn.Module):
    """Layers that run at several places, or, with ``apart``, copies of them at each place."""

    order: tuple[int, ...]
    kinds: str
    compute: Compute
    apart: bool = False

    @nn.compact
    def __call__(self, x: Any, key: Any) -> Any:
        layer, count, length = Layer(self.compute, parent=None), max(self.order) + 1, len(self.order)
        params = stacked_params(self, "layers", layer, count, x, None, 0.5, "A")
        state = {"gain": 1.0 + jnp.arange(length) / 10, "seen": 7 * jnp.arange(length)}
        if self.apart:
            params = jax.tree.map(lambda leaf: leaf[np.array(self.order)], params)
        order = None if self.apart else self.order
        stack = (layer, params, length, x, key, 0.5)
        return apply_stack(*stack, keep=True, kinds=self.kinds, state=state, order=order)


@pytest.mark.parametrize(
    ("order", "kinds"),
    [
        ((0, 0, 0, 1, 1, 2), "AAAAAA"),
        pytest.param((0, 1, 0, 1, 0, 1, 2, 3, 2, 3), "ABABABABAB", marks=pytest.mark.slow),
        pytest.param((0, 0, 0, 0), "AABB", marks=pytest.mark.slow),
        pytest.param((0, 0), "AA", marks=pytest.mark.slow),
    ],
)
def test_layers_at_several_places_are_copies_whose_gradients_are_summed(order: tuple[int, ...], kinds: str) -> None:
    x = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
    params = Shared(order, kinds, Compute()).init(jax.random.key(0), x, None)["params"]

    def computed(**how: Any) -> Any:
        apart = how.pop("apart", False)
        model: Any = Shared(order, kinds, Compute(**how), apart)

        def loss(params: Any) -> Any:
            out = model.apply({"params": params}, x, jax.random.key(1))
            weights = jnp.arange(1.0, out[1].size + 1).reshape(out[1].shape)
            return (out[1] * jnp.sin(weights)).sum(), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    expected = computed(apart=True)
    assert expected[0][1][1].shape == (len(order) + 1, 3, WIDTH)
    for how in ({}, {"layers": "scanned", "remat": "full"}):
        found = computed(**how)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), expected, found)


@pytest.mark.parametrize(
    ("order", "pieces"),
    [
        ((0,) * 12, [(0, 1, 12)]),
        ((0, 0, 0, 1, 1, 1, 2, 2), [(0, 1, 3), (3, 1, 3), (6, 1, 2)]),
        ((0, 1, 0, 1, 2, 3, 2, 3), [(0, 2, 2), (4, 2, 2)]),
        ((0, 1, 2), [(0, 3, 1)]),
        ((0, 0, 1), [(0, 1, 2), (2, 1, 1)]),
    ],
)
def test_places_that_repeat_are_scanned_and_have_no_copies(order: tuple[int, ...], pieces: list[Any]) -> None:
    assert _repeats(order) == pieces


def test_orders_are_as_long_as_the_stack() -> None:
    with pytest.raises(ValueError, match="an order of 3 of 2 layers"):
        apply_stack(Layer(Compute()), {}, 2, jnp.ones((1, WIDTH)), None, order=(0, 0, 0))


def test_kinds_are_as_many_as_layers() -> None:
    with pytest.raises(ValueError, match="1 kinds of 2 layers"):
        apply_stack(Layer(Compute()), {}, 2, jnp.ones((1, WIDTH)), None, kinds="A")


def test_parameters_of_another_shape_or_of_more_layers_are_refused() -> None:
    model: Any = Stack("AB", Compute())
    x = np.zeros((3, WIDTH), np.float32)
    params = model.init(jax.random.key(0), x, None)["params"]
    assert model.apply({"params": params}, x, None)[0].shape == (3, WIDTH)
    wide = {"layers": params["layers"] | {"kernel": jnp.zeros((2, WIDTH, 5))}}
    more = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), params)
    for wrong, message in ((wide, r"\(4, 4\).*\(4, 5\)"), (more, r"\(2, 4, 4\).*\(4, 4, 4\)")):
        with pytest.raises(ScopeParamShapeError, match=message):
            model.apply({"params": wrong}, x, None)
    with pytest.raises(ScopeParamNotFoundError):
        model.apply({"params": {"layers": {"kernel": params["layers"]["kernel"]}}}, x, None)
