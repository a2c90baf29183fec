"""What freezing, decay, clipping and layer-wise rates touch; the state of every optimizer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.config import OptimConfig
from jaxft.errors import UserError
from jaxft.training.optim import (
    decay_mask,
    frozen_mask,
    global_norm,
    init_ema,
    make_optimizer,
    map_state,
    update_count,
    update_ema,
)
from jaxft.trees import paths_of

from .tiny_network import AXES, LAYOUT, NAMES, C, D, H, L, N, V, constant, make, nest, random_tree, train


@pytest.mark.parametrize("name", NAMES)
def test_decay_is_decoupled_scheduled_and_by_axes(name: str) -> None:
    """With a zero gradient only decay is left: one rate x weight_decay per update, on kernels and embeddings."""
    optimizer = make(name=name, weight_decay=0.5, schedule=lambda step: 0.1 * (step + 1))
    params = random_tree(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(2):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    for path, leaf in paths_of(params).items():
        decays = name != "adam" and path.endswith(("kernel", "embedding"))
        factor = (1 - 0.1 * 0.5) * (1 - 0.2 * 0.5) if decays else 1.0
        np.testing.assert_allclose(leaf, factor * paths_of(random_tree(0))[path], rtol=1e-5, err_msg=path)


def test_decay_mask_needs_two_names() -> None:
    decaying = {path for path, decays in paths_of(decay_mask(random_tree(0), AXES)).items() if decays}
    assert decaying == {path for path in LAYOUT if path.endswith(("kernel", "embedding"))}


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_stay_and_have_no_moments(name: str) -> None:
    optimizer = make(name=name, weight_decay=0.1, clip_norm=1.0, freeze=("embed/*", "layers/0-1/*", "*/bias"))
    after, state = train(optimizer)
    before = paths_of(random_tree(0))
    for path, leaf in after.items():
        if path.startswith("embed/") or path.endswith("bias"):
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)
        elif path.startswith("layers/"):
            np.testing.assert_array_equal(leaf[:2], before[path][:2], err_msg=path)
            assert (leaf[2] != before[path][2]).any(), path
        else:
            assert (leaf != before[path]).any(), path
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert not shapes & {(V, D), (L, N, H), (C,)}  # shapes that only wholly frozen parameters have


def test_frozen_gradients_do_not_count_in_the_clip_norm() -> None:
    """Huge and even non-finite gradients of frozen layers change nothing for the others."""
    optimizer = make(1.0, name="sgd", clip_norm=1.0, freeze=("embed/*", "layers/1/*"))
    params, grads = random_tree(0), random_tree(1)
    loud = jax.tree.map(lambda g: g, grads)
    loud["embed"] = jax.tree.map(lambda g: g * 1e6, loud["embed"])
    loud["layers"] = jax.tree.map(lambda g: g.at[1].set(jnp.nan), loud["layers"])
    update = jax.jit(optimizer.update)
    quiet_step, _ = update(grads, optimizer.init(params), params)
    loud_step, _ = update(loud, optimizer.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, quiet_step, loud_step)
    assert float(global_norm(loud_step)) == pytest.approx(1.0, rel=1e-5)


def test_frozen_layers_that_add_up_are_a_frozen_stack() -> None:
    mask = paths_of(frozen_mask(random_tree(0), AXES, ["layers/0/*", "layers/1-2/mlp/*"]))
    assert mask["layers/mlp/up/kernel"] is True
    assert mask["embed/norm/scale"] is False
    np.testing.assert_array_equal(mask["layers/attention/query/bias"], [True, False, False])


def test_a_stack_without_the_first_layer_keeps_the_numbers_of_its_layers() -> None:
    params = {"layers": {"norm": {"scale": jnp.ones((L - 1, D))}, "up": {"kernel": jnp.ones((L, D, 5))}}}
    axes = {"layers": {"norm": {"scale": ("layers:1", "norm")}, "up": {"kernel": ("layers", "embed", "mlp")}}}
    mask = paths_of(frozen_mask(params, axes, ["layers/0-1/*"]))
    np.testing.assert_array_equal(mask["layers/norm/scale"], [True, False])
    np.testing.assert_array_equal(mask["layers/up/kernel"], [True, True, False])
    settings = OptimConfig(name="sgd", clip_norm=None, weight_decay=0.1, layer_decay=0.5)
    optimizer = make_optimizer(settings, constant(1.0), params, axes)
    step = paths_of(optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)[0])
    np.testing.assert_allclose(step["layers/norm/scale"][:, 0], [-0.25, -0.5])  # no weight decay: it is a norm
    np.testing.assert_allclose(step["layers/up/kernel"][:, 0, 0], [-0.1375, -0.275, -0.55])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("embeddings/*", r"'embeddings/\*' matches no parameter: did you mean 'embed'\?"),
        ("layers", r"did you mean 'layers/\*'\?"),
        ("layers/0-1", r"did you mean 'layers/0-1/\*'\?"),
        ("layers/mlp/up/kernle", r"did you mean 'layers/mlp/up/kernel'\?"),
        ("layers/1-3/*", r"layers are numbered from 0 to 2"),
        ("layers/2-1/*", r"first before last"),
        ("layers/1/nothing/*", r"matches no parameter"),
        ("zzz", r"valid names: embed, head, layers"),
        ("*", r"freezes every parameter"),
    ],
)
def test_freeze_patterns_that_cannot_be_meant(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(freeze=(pattern,))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_layer_decay_scales_each_layer(name: str) -> None:
    before = paths_of(random_tree(0))
    plain, _ = train(make(name=name, weight_decay=0.1), 1)
    scaled, _ = train(make(name=name, weight_decay=0.1, layer_decay=0.5), 1)
    for path in LAYOUT:
        factor = {"embed": np.array(0.5 ** (L + 1)), "layers": 0.5 ** np.arange(L, 0, -1.0), "head": np.array(1.0)}
        rows = factor[path.split("/")[0]].reshape(-1, *[1] * (before[path].ndim - 1))
        moved, expected = scaled[path] - before[path], (plain[path] - before[path]) * rows
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=5e-7, err_msg=path)


def test_layer_decay_needs_layers() -> None:
    params, axes = {"head": {"kernel": jnp.ones((2, 3))}}, {"head": {"kernel": ("embed", "classes")}}
    with pytest.raises(UserError, match="no stacked layers"):
        make_optimizer(OptimConfig(layer_decay=0.9), constant(1.0), params, axes)
    with pytest.raises(UserError, match="no matrix inside the layers"):
        make_optimizer(OptimConfig(name="muon"), constant(1.0), params, axes)


@pytest.mark.parametrize("freeze", [(), ("embed/*", "layers/0/*", "*/bias")])
@pytest.mark.parametrize("name", NAMES)
def test_state_mirrors_parameters(name: str, freeze: tuple[str, ...]) -> None:
    """A sharding for every leaf of the state can be read off its parameter's, without making an array."""
    optimizer = make(name=name, freeze=freeze, clip_norm=1.0, weight_decay=0.1)
    params = jax.eval_shape(lambda: random_tree(0))
    paths = nest({path: path for path in LAYOUT})
    state = jax.eval_shape(optimizer.init, params)
    seen: list[str] = []

    def check(leaf: Any, path: str) -> str:
        shape = LAYOUT[path][0]
        assert leaf.ndim == len(shape)
        assert all(size in (1, whole) for size, whole in zip(leaf.shape, shape, strict=True)), path
        if name != "adafactor":
            assert leaf.shape == shape
        seen.append(path)
        return path

    mapped = map_state(optimizer, check, state, paths, other=lambda leaf: leaf.size <= 3)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert all(label is True or isinstance(label, str) for label in jax.tree.leaves(mapped))
    trained = {path for path in LAYOUT if not (freeze and (path.endswith("bias") or path.startswith("embed/")))}
    assert set(seen) == (set() if name == "sgd" else trained)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_state_keeps_its_types(name: str) -> None:
    optimizer = make(name=name, weight_decay=0.1, clip_norm=1.0, layer_decay=0.9, freeze=("layers/0/*",))
    initial = jax.eval_shape(optimizer.init, random_tree(0, jnp.bfloat16))
    after, state = train(optimizer, 3, jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), initial) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {leaf.dtype for leaf in after.values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_half_precision_goes_the_same_way(name: str) -> None:
    optimizer = make(name=name, weight_decay=0.1)
    after, _ = train(optimizer, 3, jnp.bfloat16)
    exact, _ = train(optimizer, 3)
    for path, leaf in after.items():
        # Parameters are rounded (2^-9 of them) at each update.
        np.testing.assert_allclose(leaf.astype(jnp.float32), exact[path], atol=0.08, err_msg=path)


@pytest.mark.parametrize("freeze", [(), ("embed/*",)])
@pytest.mark.parametrize("name", NAMES)
def test_count_is_that_of_updates(name: str, freeze: tuple[str, ...]) -> None:
    schedule = lambda step: 0.01 * (step + 1)
    _, state = train(make(name=name, schedule=schedule, freeze=freeze), 3)
    assert int(update_count(state)) == 3


def test_foreign_state_is_refused() -> None:
    with pytest.raises(ValueError, match="not a state of make_optimizer"):
        update_count(optax.adam(0.1).init(random_tree(0)))


def test_global_norm_sums_in_float32() -> None:
    ones = {"a": jnp.ones(1000, jnp.bfloat16), "b": jnp.ones(1, jnp.bfloat16)}
    assert float(global_norm(ones)) == pytest.approx(1001**0.5, rel=1e-6)


@pytest.mark.parametrize("settings", [{"weight_decay": -1.0}, {"eps": 0.0}, {"momentum": 1.0}, {"layer_decay": 0.0}])
def test_ranges(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"optim.{next(iter(settings))}="):
        make(**settings)


def test_axes_must_fit_shapes() -> None:
    with pytest.raises(ValueError, match="a/b: 1 logical axes"):
        decay_mask({"a": {"b": jnp.ones((2, 3))}}, {"a": {"b": ("embed",)}})


def test_ema_follows_in_float32() -> None:
    params = {"a": jnp.zeros(2, jnp.bfloat16)}
    average = init_ema(params)
    for count in range(50):
        average = jax.jit(update_ema, static_argnums=2)(average, {"a": jnp.ones(2, jnp.bfloat16)}, 0.9, count)
    expected = 1 - np.prod([min(0.9, (1 + c) / (10 + c)) for c in range(50)])
    assert average["a"].dtype == jnp.float32
    np.testing.assert_allclose(average["a"], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "momentum", "lion", "muon"])
def test_first_moments_can_be_stored_in_half_the_bytes(name: str) -> None:
    wide, narrow = (
        make(name=name).init(random_tree(0)),
        make(name=name, momentum_dtype="bfloat16").init(random_tree(0)),
    )
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(state)) for state in (wide, narrow)]
    momentum = sum(leaf.nbytes for leaf in jax.tree.leaves(random_tree(0)))
    assert sizes[0] - sizes[1] == momentum // 2
    ours, _ = train(make(name=name, momentum_dtype="bfloat16"), 6)
    exact, _ = train(make(name=name), 6)
    start = paths_of(random_tree(0))
    for path, leaf in ours.items():
        moved, error = (
            np.abs(np.asarray(x, np.float64) - np.asarray(y)).mean()
            for x, y in ((exact[path], start[path]), (exact[path], leaf))
        )
        assert 0 <= error < 0.05 * moved, path


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_an_optimizer_without_first_moments_refuses_a_type_for_them(name: str) -> None:
    with pytest.raises(UserError, match=rf"optim.momentum_dtype=bfloat16: {name} has no first moments"):
        make(name=name, momentum_dtype="bfloat16")
