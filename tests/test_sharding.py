"""Meshes: training on 8 devices is training on one, parameters really are split, and impossible layouts say why."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxft.config import MeshConfig, OptimConfig, RunConfig
from jaxft.errors import UserError
from jaxft.layers import Compute
from jaxft.models.families import bert
from jaxft.models.initial import init_params, shapes_and_axes
from jaxft.parallel.sharding import (
    DEFAULT_RULES,
    AxisRules,
    batch_sharding,
    check_split,
    make_mesh,
    make_rules,
    replicated,
    sharding_of,
    shardings_of,
)
from jaxft.tasks.classification import Task, fields
from jaxft.training.gradients import of_batch
from jaxft.training.optim import make_optimizer, make_schedule
from jaxft.training.state import init_state, state_shardings
from jaxft.training.step import make_train_step
from jaxft.trees import leaves_of, map_paths, paths_of

CONFIG = dataclasses.replace(bert.TINY, num_hidden_layers=2, num_labels=3, initializer_range=0.1)
MODEL = bert.Model(CONFIG, "classification", Compute(layers="scanned"))
SHAPES, AXES = shapes_and_axes(MODEL)
TASK = Task(("a", "b", "c"))
FIELDS = fields(RunConfig(), 0)
NAMES = {path: leaf.axes for path, leaf in leaves_of(SHAPES, AXES).items()}


def _random(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    rng = np.random.default_rng(len(path))
    return np.asarray(rng.normal(size=leaf.shape) * 0.1 + path.endswith("scale"), np.float32)


START = map_paths(_random, SHAPES)
MESHES = {
    "data8": MeshConfig(8, 1, 1),
    "fsdp8": MeshConfig(1, 8, 1),
    "data2_tensor4": MeshConfig(2, 1, 4),
    "2x2x2": MeshConfig(2, 2, 2),
}


def batches() -> list[dict[str, np.ndarray]]:
    rng, made = np.random.default_rng(0), []
    for step in range(5):
        mask = (np.arange(12) < rng.integers(2, 13, (16, 1))).astype(np.int32)
        weights = np.ones(16, np.float32)
        weights[16 - 3 * (step == 4) :] = 0
        mask[weights == 0] = 0
        made.append(
            {
                "tokens": rng.integers(1, 96, (16, 12)).astype(np.int32) * mask,
                "mask": mask,
                "types": np.zeros((16, 12), np.int32),
                "labels": rng.integers(0, 3, 16).astype(np.int32),
                "weights": weights,
            }
        )
    return made


def trained(mesh: jax.sharding.Mesh) -> tuple[Any, list[dict[str, np.ndarray]]]:
    """The state after 5 steps with dropout, and what each step logged."""
    # A large eps: Adam would scale the rounding errors of gradients near 0 up to whole steps.
    config = OptimConfig(learning_rate=1e-3, warmup_steps=0, schedule="constant", ema=0.9, eps=1e-3)
    schedule = make_schedule(config, 5)
    optimizer = make_optimizer(config, schedule, SHAPES, AXES)
    places = shardings_of(mesh, DEFAULT_RULES, SHAPES, AXES)

    def start(params: Any) -> Any:
        return init_state(params, optimizer, True)

    with jax.set_mesh(mesh):
        of_state = state_shardings(jax.eval_shape(start, SHAPES), optimizer, places, mesh)
        state = jax.jit(start, out_shardings=of_state)(jax.device_put(START, places))
        step = jax.jit(
            make_train_step(
                TASK,
                of_batch(MODEL, TASK, param_shardings=places if mesh.size > 1 else None),
                optimizer,
                schedule,
                ema=0.9,
            ),
            donate_argnums=0,
            out_shardings=(of_state, replicated(mesh)),
            compiler_options={"xla_backend_optimization_level": 0},  # halves the time to compile
        )
        seed = jax.device_put(np.uint32(3), replicated(mesh))
        log = []
        for batch in batches():
            placed = {
                k: jax.device_put(v, batch_sharding(mesh, DEFAULT_RULES, FIELDS[k].axes)) for k, v in batch.items()
            }
            state, metrics = step(state, placed, seed)
            log.append(jax.device_get(metrics))
    return state, log


@pytest.fixture(scope="module")
def single() -> tuple[Any, Any]:
    return trained(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))


@pytest.fixture(scope="module", params=MESHES)
def spread(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    return (request.param, *trained(make_mesh(MESHES[request.param])))


def test_same_course_on_every_mesh(single: Any, spread: Any) -> None:
    (one, log_one), (_, many, log_many) = single, spread
    for a, b in zip(log_one, log_many, strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "weight"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
        assert a["tokens"] == b["tokens"]
    for field in ("params", "ema"):
        wanted, found = (paths_of(getattr(state, field)) for state in (one, many))
        for path, leaf in wanted.items():
            # The key bias shifts all logits of a softmax alike: its gradient is 0 but for rounding, which Adam scales up.
            if path != "layers/attention/key/bias":
                np.testing.assert_allclose(leaf, found[path], rtol=1e-5, atol=3e-6, err_msg=path)


def test_parameters_and_moments_are_split(spread: Any) -> None:
    name, state, _ = spread
    fsdp, tensor = MESHES[name].fsdp, MESHES[name].tensor
    ways: dict[str | None, int] = {"embed": fsdp, "heads": tensor, "mlp": tensor, "vocab": tensor}
    for tree in (state.params, state.ema, *_trees_like(state.params, state.opt_state)):
        for path, leaf in paths_of(tree).items():
            split = int(np.prod([ways.get(axis, 1) for axis in NAMES[path]]))
            assert all(shard.data.size * split == leaf.size for shard in leaf.addressable_shards), path


def _trees_like(params: Any, state: Any) -> list[Any]:
    structure = jax.tree.structure(params)
    found = jax.tree.leaves(state, is_leaf=lambda node: jax.tree.structure(node) == structure)
    trees = [node for node in found if jax.tree.structure(node) == structure]
    assert len(trees) == 2  # both moments of Adam
    return trees


def test_fsdp_divides_the_bytes() -> None:
    mesh = make_mesh(MeshConfig(1, 8, 1))
    params = jax.device_put(START, shardings_of(mesh, DEFAULT_RULES, SHAPES, AXES))
    leaves = paths_of(params)
    shardable = [path for path in leaves if "embed" in NAMES[path]]
    total = sum(leaf.nbytes for leaf in leaves.values())
    on_first = {path: leaf.addressable_shards[0].data.nbytes for path, leaf in leaves.items()}
    assert sum(on_first[path] for path in shardable) * 8 == sum(leaves[path].nbytes for path in shardable)
    assert sum(leaves[path].nbytes for path in shardable) > 0.9 * total
    assert sum(on_first.values()) < 0.2 * total


def test_random_weights_do_not_depend_on_the_mesh() -> None:
    small = bert.Model(dataclasses.replace(CONFIG, num_hidden_layers=1), "classification", Compute())
    shapes, axes = shapes_and_axes(small)
    mesh = make_mesh(MESHES["2x2x2"])
    made = [init_params(small, 5, shardings_of(mesh, DEFAULT_RULES, shapes, axes)), init_params(small, 5)]
    for a, b in zip(*map(jax.tree.leaves, made), strict=True):
        assert np.array_equal(a, b)


def refusal(*arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        sharding_of(*arguments)
    return str(caught.value)


def test_indivisible_dimension_says_tensor_dimension_sizes_and_fix() -> None:
    mesh = make_mesh(MeshConfig(1, 1, 8))
    message = refusal(mesh, DEFAULT_RULES, (3, 32, 4, 8), ("layers", "embed", "heads", None), "layers/query/kernel")
    assert message == (
        "layers/query/kernel: dimension 'heads' of size 4 cannot be split 8 ways over mesh axes ('tensor',); "
        "choose a mesh size that divides 4, or leave it whole: mesh.rules.heads=[]"
    )
    with pytest.raises(UserError, match=r"^layers/attention/key/bias: dimension 'heads' of size 4"):
        shardings_of(mesh, DEFAULT_RULES, SHAPES, AXES)


def test_unknown_logical_name() -> None:
    mesh = make_mesh(MeshConfig())
    message = refusal(mesh, DEFAULT_RULES, (4, 4), ("embd", None), "head/kernel")
    assert message == "head/kernel: unknown logical axis 'embd': did you mean 'embed'?"


def test_one_mesh_axis_twice() -> None:
    mesh = make_mesh(MeshConfig())
    message = refusal(mesh, DEFAULT_RULES, (8, 8), ("heads", "mlp"), "odd/kernel")
    assert message.startswith("odd/kernel ('heads', 'mlp'): mesh axis 'tensor' is used by both 'heads' and 'mlp'")


def test_mesh_sizes() -> None:
    assert make_mesh(MeshConfig()).devices.shape == (1, 8, 1, 1, 1)
    assert make_mesh(MeshConfig(2, -1, 2)).devices.shape == (1, 2, 2, 1, 2)
    assert make_mesh(MeshConfig(1, context=-1)).devices.shape == (1, 1, 1, 8, 1)
    with pytest.raises(UserError, match="only one size may be -1, found data and fsdp"):
        make_mesh(MeshConfig(-1, -1, 1))
    for config in (MeshConfig(3, 1, 1), MeshConfig(-1, 3, 1), MeshConfig(4, 1, 1), MeshConfig(16, 1, 1)):
        with pytest.raises(UserError, match=r"mesh \w+=.* does not fit 8 devices; set one size to -1"):
            make_mesh(config)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a slice, as far as meshes look at it."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "chip"


def test_slices_are_the_outermost_axis() -> None:
    mesh = make_mesh(MeshConfig(1, 2, 2, slices=2))
    assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 2, "context": 1, "tensor": 2}
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    # Chips that come interleaved are put together by slice.
    chips: list[Any] = [Chip(i, i % 2) for i in range(8)]
    spread = make_mesh(MeshConfig(4, slices=2), chips).devices
    assert [{chip.slice_index for chip in part.flat} for part in spread] == [{0}, {1}]
    with pytest.raises(UserError, match=r"mesh.slices=1, but the devices are of 2 slices; set mesh.slices=2"):
        make_mesh(MeshConfig(8), chips)


def test_rules_can_be_replaced_by_row() -> None:
    rules = make_rules(MeshConfig(rules={"vocab": (), "embed": ("tensor",)}))
    assert rules.spec(("vocab", "embed")) == PartitionSpec(None, "tensor")
    assert rules.spec(("heads",)) == PartitionSpec("tensor")
    with pytest.raises(UserError, match=r"^mesh.rules.vocabulary: unknown logical axis: did you mean 'vocab'"):
        make_rules(MeshConfig(rules={"vocabulary": ()}))
    with pytest.raises(UserError, match=r"^mesh.rules.vocab: unknown mesh axis 'fdsp': did you mean 'fsdp'"):
        make_rules(MeshConfig(rules={"vocab": ("fdsp",)}))


def test_a_large_parameter_left_whole_is_refused() -> None:
    shapes = {
        "embed": {"table": jax.ShapeDtypeStruct((2**16, 128), jnp.float32)},
        "small": jax.ShapeDtypeStruct((8,), "f4"),
    }
    axes = {"embed": {"table": ("vocab", "embed")}, "small": ("norm",)}
    whole = make_rules(MeshConfig(rules={"embed": (), "heads": ("fsdp",), "vocab": ()}))
    mesh = make_mesh(MeshConfig(1, 8, 1))
    check_split(mesh, DEFAULT_RULES, shapes, axes)
    check_split(make_mesh(MeshConfig(8)), whole, shapes, axes)  # plain data parallelism: asked for
    check_split(mesh, whole, shapes, axes, ("embed/*",))
    with pytest.raises(UserError) as caught:
        check_split(mesh, whole, shapes, axes)
    assert str(caught.value) == (
        "embed/table ('vocab', 'embed'): 32 MiB would lie whole on each of 8 devices, though mesh axes ['fsdp'] split "
        "parameters; change mesh.rules, or allow it: mesh.replicate=[embed/table]"
    )


def test_rules_are_part_of_the_jit_key() -> None:
    mesh = make_mesh(MeshConfig(8, 1, 1))

    @functools.partial(jax.jit, static_argnums=1)
    def constrained(x: jax.Array, rules: AxisRules) -> jax.Array:
        return rules.constrain(x + 1, "batch", "length")

    def placed(rules: AxisRules) -> PartitionSpec:
        with jax.set_mesh(mesh):
            return constrained(jnp.zeros((8, 8)), rules).sharding.spec

    assert placed(DEFAULT_RULES) == PartitionSpec("data")
    assert placed(AxisRules((("batch", ()), ("length", ("data",))))) == PartitionSpec(None, "data")
