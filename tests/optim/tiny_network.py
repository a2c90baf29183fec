"""A tiny parameter tree with its logical axes, and how the tests of this folder train it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.config import OptimConfig
from jaxft.training.optim import make_optimizer
from jaxft.trees import paths_of

NAMES = ("adamw", "adam", "sgd", "momentum", "nesterov", "adafactor", "lion", "muon")
L, D, N, H, F, V, C = 3, 8, 2, 6, 10, 7, 4

LAYOUT: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]] = {
    "embed/token/embedding": ((V, D), ("vocab", "embed")),
    "embed/norm/scale": ((D,), ("norm",)),
    "layers/attention/query/kernel": ((L, D, N, H), ("layers", "embed", "heads", None)),
    "layers/attention/query/bias": ((L, N, H), ("layers", "heads", None)),
    "layers/attention/out/kernel": ((L, N, H, D), ("layers", "heads", None, "embed")),
    "layers/mlp/up/kernel": ((L, D, F), ("layers", "embed", "mlp")),
    "layers/mlp/norm/scale": ((L, D), ("layers", "norm")),
    "head/classifier/kernel": ((D, C), ("embed", "classes")),
    "head/classifier/bias": ((C,), ("classes",)),
}


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        *parents, last = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


AXES = nest({path: axes for path, (_, axes) in LAYOUT.items()})


@functools.cache
def random_tree(seed: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return nest({path: jnp.asarray(rng.normal(size=shape), dtype) for path, (shape, _) in LAYOUT.items()})


def constant(rate: float) -> Callable[[Any], jax.Array]:
    return lambda step: jnp.full(jnp.shape(step), rate, jnp.float32)


def make(rate: float = 0.01, schedule: Any = None, **settings: Any) -> optax.GradientTransformation:
    plain: dict[str, Any] = {"clip_norm": None, "weight_decay": 0.0}
    config = OptimConfig(**(plain | settings))
    return make_optimizer(config, schedule or constant(rate), random_tree(0), AXES)


def train(
    optimizer: optax.GradientTransformation, steps: int = 4, dtype: Any = jnp.float32
) -> tuple[dict[str, Any], Any]:
    """Parameters by path after updates with fixed random gradients."""
    params = random_tree(0, dtype)
    state = jax.jit(optimizer.init)(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(random_tree(1 + step, dtype), state, params)
        params = optax.apply_updates(params, updates)
    return paths_of(params), state
