"""Exact round trips, donation, other meshes, retention, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxft.checkpoint import Checkpoints
from jaxft.errors import UserError

from .states import LIKE, assert_same, random_params, saved, shaped, trained_state

OPTIMIZERS = ("adamw", "adam", "sgd", "momentum", "nesterov", "adafactor", "lion", "muon")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "extra", [{}, {"dtype": jnp.bfloat16, "ema": 0.9, "freeze": ("embed/*",)}], ids=["plain", "rich"]
)
def test_every_optimizer_state_comes_back_bit_exact(store: Checkpoints, name: str, extra: dict[str, Any]) -> None:
    state = trained_state(name=name, **extra)
    store.save(7, state, {"data": {"epoch": 1}})
    step, found, meta = store.restore(shaped(state))
    assert_same(found, state)
    assert step == 7
    assert meta["data"] == {"epoch": 1}
    assert isinstance(meta["versions"], dict)
    assert set(meta["versions"]) == {"jaxft", "jax", "orbax"}


def test_buffers_may_be_donated_right_after_save(store: Checkpoints) -> None:
    wanted = {"w": np.random.default_rng(0).normal(size=(64, 256, 256)).astype(np.float32), "step": np.int32(3)}
    state = jax.device_put(wanted, SingleDeviceSharding(jax.devices()[0]), may_alias=False)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    like = shaped(jax.block_until_ready(state))
    overwrite.lower(like).compile()
    store.save(1, state, {})
    overwritten = jax.block_until_ready(overwrite(state))
    assert state["w"].is_deleted()
    assert store._saving is not None
    assert (np.asarray(overwritten["w"]) == -1).all()
    assert_same(jax.tree.map(np.asarray, store.restore(like).state), jax.tree.map(np.asarray, wanted))


def meshes() -> dict[str, Callable[[], Any]]:
    def mesh(*sizes: int) -> Any:
        names = ("data", "fsdp")[: len(sizes)]
        return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))

    return {
        "1": lambda: SingleDeviceSharding(jax.devices()[3]),
        "8": lambda: NamedSharding(mesh(8), PartitionSpec(None, "data")),
        "2x4": lambda: NamedSharding(mesh(2, 4), PartitionSpec("data", "fsdp")),
    }


@pytest.mark.parametrize("source", meshes())
def test_restores_onto_any_mesh(store: Checkpoints, source: str) -> None:
    values = {"params": {"kernel": np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)}}
    store.save(1, jax.device_put(values, meshes()[source]()), {})
    for make in meshes().values():
        found = store.restore(shaped(values, make())).state
        assert_same(found, jax.tree.map(jnp.asarray, values))
        assert found["params"]["kernel"].sharding == make()


def test_steps_best_and_retention(store: Checkpoints) -> None:
    assert store.steps() == ()
    assert store.best() is None
    states = saved(store, 10, 20, best=10)
    saved(store, 30, 40)
    assert store.steps() == (10, 30, 40)
    assert store.best() == 10
    assert_same(store.restore(LIKE, 10).state, states[10])
    saved(store, 50, best=50)
    assert store.steps() == (40, 50)
    assert store.best() == Checkpoints(store.folder, keep=2).best() == 50
    assert sorted(path.name for path in store.folder.iterdir()) == ["40", "50"]


def test_multiples_stay_besides_the_newest_and_the_best(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=1, keep_every=20)
    saved(store, 10, 20, 30, 40, 50, 60, best=30)
    saved(store, 70)
    assert store.steps() == (20, 30, 40, 60, 70)


def test_steps_of_an_abandoned_future_do_not_push_out_new_ones(tmp_path: Path) -> None:
    saved(Checkpoints(tmp_path, keep=3), 10, 20, 30)
    store = Checkpoints(tmp_path, keep=1)
    store.restore(LIKE, 10)
    saved(store, 15)
    assert store.steps() == (15, 20, 30)


def test_existing_step_is_refused(store: Checkpoints) -> None:
    saved(store, 10)
    with pytest.raises(UserError, match="10 already exists"):
        store.save(10, LIKE, {})


def test_nothing_there(store: Checkpoints) -> None:
    with pytest.raises(UserError, match="no checkpoint here"):
        store.restore(LIKE)
    saved(store, 10)
    with pytest.raises(UserError, match="no checkpoint of step 5; there are: 10"):
        store.restore(LIKE, 5)


def other(**changes: Any) -> dict[str, Any]:
    return {"params": random_params() | changes, "step": LIKE["step"]}


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (other(embed={"kernel": jnp.zeros((16, 9))}),
         r"params/embed/kernel: float32\[16, 8\] in the checkpoint, expected float32\[16, 9\]"),
        (other(embed={"kernel": jnp.zeros((16, 8), jnp.bfloat16)}), r"float32\[16, 8\].* expected bfloat16\[16, 8\]"),
        (other(embed={}), r"params/embed/kernel: float32\[16, 8\] in the checkpoint, not expected"),
        (other(head={"bias": jnp.zeros(3)}), r"params/head/bias: not in the checkpoint, expected float32\[3\]"),
        ({f"x{i}": jnp.zeros(i) for i in range(9)}, r"and 9 more$"),
    ],
)  # fmt: skip
def test_other_trees_are_refused(store: Checkpoints, like: Any, message: str) -> None:
    saved(store, 10, 20)
    with pytest.raises(UserError, match=message) as error:
        store.restore(like)
    assert "\n" not in str(error.value)


def test_restoring_wants_shardings(store: Checkpoints) -> None:
    saved(store, 10)
    with pytest.raises(ValueError, match="explicit sharding"):
        store.restore(jax.eval_shape(lambda: LIKE))


@pytest.mark.parametrize("meta", [{"a": (1, 2)}, {1: 2}, {"a": float("nan")}, {"a": {1}}, {"a": [(1,)]}])
def test_meta_must_be_json(store: Checkpoints, meta: Any) -> None:
    with pytest.raises(TypeError):
        store.save(1, LIKE, meta)


def test_what_is_no_array_is_refused(store: Checkpoints) -> None:
    with pytest.raises(TypeError, match="not int"):
        store.save(1, {"a": 3}, {})
    with pytest.raises(TypeError, match="PRNG key"):
        store.save(1, {"a": jax.random.key(0)}, {})
    with pytest.raises(ValueError, match="cannot be stored"):
        store.save(1, {"a/b": jnp.zeros(2)}, {})


def test_meta_is_copied(store: Checkpoints) -> None:
    meta = {"data": {"position": 1}}
    store.save(1, LIKE, meta)
    meta["data"]["position"] = 2
    assert store.restore(LIKE).meta["data"] == {"position": 1}
