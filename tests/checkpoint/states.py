"""Small training states, and how to damage what is saved of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding

from jaxft.checkpoint import Checkpoints
from jaxft.config import OptimConfig
from jaxft.training.optim import make_optimizer
from jaxft.training.state import TrainState, init_state

AXES = {
    "embed": {"kernel": ("vocab", "embed")},
    "layers": {"mlp": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")}},
}
SHAPES = {"embed": {"kernel": (16, 8)}, "layers": {"mlp": {"kernel": (2, 8, 24), "bias": (2, 24)}}}


def random_params(seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def trained_state(seed: int = 0, dtype: Any = jnp.float32, **settings: Any) -> TrainState:
    """A state after one update, so that no part of it is trivial."""
    params: Any = random_params(seed, dtype)
    config = OptimConfig(**settings)
    optimizer = make_optimizer(config, lambda step: 0.01 * jnp.ones(jnp.shape(step)), params, AXES)
    state = init_state(params, optimizer, config.ema is not None)
    updates, opt_state = jax.jit(optimizer.update)(random_params(seed + 1, dtype), state.opt_state, params)
    moved: Any = optax.apply_updates(params, updates)
    return TrainState(jnp.int32(7), jnp.int32(2), jnp.int32(1), moved, opt_state, state.ema)


def shaped(state: Any, sharding: Any = None) -> Any:
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(store: Checkpoints, *steps: int, best: int | None = None) -> dict[int, Any]:
    states = {step: {"params": random_params(step), "step": jnp.int32(step)} for step in steps}
    for step, state in states.items():
        store.save(step, state, {"at": step}, best=step == best)
    store.wait()
    return states


LIKE = {"params": random_params(), "step": jnp.int32(0)}


def all_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    path.write_bytes(raw)


def damage_arrays(folder: Path) -> None:
    """Flips a bit in the largest file of array data."""
    flip(max(folder.rglob("d/*"), key=lambda path: path.stat().st_size), 99)
