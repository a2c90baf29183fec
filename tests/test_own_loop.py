"""Models in people's own loops: the page's code, dropout keys, meshes and transformations, jax's switches, states of all layers."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import make_folder, rows, run, write_csv

import jaxft
from jaxft.attention.native.compiled import unavailable
from jaxft.errors import UserError
from jaxft.layers import Compute
from jaxft.machine.platform import set_up_jax
from jaxft.models.families import bert, llama
from jaxft.models.initial import init_params

ROWS = 4
MODELS: dict[str, Any] = {
    # Heads of 16: the native backend takes them.
    "bert": bert.Model(bert.Config(40, 32, 1, 2, 64, max_position_embeddings=16), "classification"),
    "llama": llama.Model(
        llama.Config(40, 32, 64, 1, 2, 1, max_position_embeddings=16, attention_dropout=0.3), "causal_lm"
    ),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 40, (ROWS, 8)), jnp.int32)
MASK = jnp.asarray(np.arange(8) < np.array([[8], [5], [7], [8]]))


# What is done with a model is the same whatever its family.
@pytest.fixture(params=["bert", pytest.param("llama", marks=pytest.mark.slow)], scope="module")
def made(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model and parameters."""
    model = MODELS[request.param]
    return model, init_params(model, 0)


def loss(model: Any, params: Any, tokens: Any = TOKENS, mask: Any = MASK, key: Any = None) -> jax.Array:
    return jnp.sin(model.apply({"params": params}, tokens, mask, key=key).logits).sum()


def gradient(model: Any, key: Any = None) -> Any:
    return jax.value_and_grad(lambda params, tokens, mask: loss(model, params, tokens, mask, key))


@functools.cache
def usual(model: Any, seed: int | None = None) -> Any:
    """The loss and its gradient on one device, with dropout where there is a seed."""
    key = None if seed is None else jax.random.key(seed)
    return jax.jit(gradient(model, key))(init_params(model, 0), TOKENS, MASK)


def assert_same(found: Any, wanted: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * (1 + np.abs(other).max()))


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[1] / "docs/own_loop.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    make_folder(tmp_path / "model", "classification")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "own_loop"}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert_same(names["restored"], names["tuned"])
    assert names["step"]._cache_size() == 2  # one device, and two
    assert_same(names["mine"]["encoder"], names["encoder_params"])
    assert float(names["of_head"](names["head"])) < float(names["of_head"](names["fresh"]["Dense_0"]))
    moved = jax.tree.map(lambda one, other: float(np.abs(one - other).max()), names["together"], names["fresh"])
    assert moved["Dense_0"]["kernel"] > 0
    assert moved["encoder"]["layers"]["attention"]["value"]["kernel"] > 0


def test_a_step_over_loaded_parameters_compiles_once(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "classification")
    params = jaxft.load(str(folder), note=lambda text: None).params
    step: Any = jax.jit(lambda params: jax.tree.map(lambda x: x * 0.5, params))
    assert_same(step(step(params)), jax.tree.map(lambda x: x * 0.25, params))
    assert step._cache_size() == 1
    with jax.default_device(jax.devices()[1]):
        assert jaxft.load(str(folder), note=lambda text: None).params["pooler"]["kernel"].devices() == {
            jax.devices()[1]
        }


# ------------------------------------------------------------------------------------------------------------ dropout


def test_rngs_of_linen_turn_dropout_on(made: tuple[Any, Any]) -> None:
    model, params = made
    run = jax.jit(lambda key: model.apply({"params": params}, TOKENS, rngs={"dropout": key}).hidden)
    plain = model.apply({"params": params}, TOKENS).hidden
    one, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - plain).max() > 1e-3
    assert np.abs(one - other).max() > 1e-3
    with pytest.raises(UserError, match="two dropout keys"):
        model.apply({"params": params}, TOKENS, key=jax.random.key(0), rngs={"dropout": jax.random.key(0)})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("deterministic", "dropout is on where there is a key=, off without one"),
        ("train", "dropout is on where there is a key="),
        ("input_ids", "it is called tokens= here"),
        ("output_hidden_states", "it is called hidden_states= here"),
        ("maskk", "did you mean 'mask'"),
    ],
)
def test_arguments_of_others_are_refused_with_the_name_of_ours(made: tuple[Any, Any], name: str, said: str) -> None:
    model, params = made
    with pytest.raises(UserError, match=f"Model takes no {name}=: .*{re.escape(said)}"):
        model.apply({"params": params}, TOKENS, **{name: True})


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
@pytest.mark.parametrize("bits", ["hash", "threefry"])
def test_keys_of_any_kind(impl: str, bits: Any) -> None:
    model = MODELS["bert"].clone(compute=Compute(dropout_bits=bits))
    params = init_params(model, 0)
    keys = [jax.random.key(seed, impl=impl) for seed in (0, 0, 1)]
    keys.append(jax.random.fold_in(keys[0], 1))
    run = jax.jit(lambda key: model.apply({"params": params}, TOKENS, key=key).hidden)
    one, again, *others = (run(key) for key in keys)
    np.testing.assert_array_equal(one, again)
    assert all(np.abs(one - other).max() > 1e-3 for other in others)


# ------------------------------------------------------------------------------------------- meshes, transformations


@pytest.mark.parametrize(
    ("shape", "axes", "known"),
    [
        pytest.param((4,), ("rows",), False, id="other names, by its arrays"),
        pytest.param((4,), ("rows",), True, id="other names, as a context"),
        pytest.param((2, 2), ("data", "model"), True, id="ours and others"),
    ],
)
def test_a_mesh_of_ones_own(made: tuple[Any, Any], shape: tuple[int, ...], axes: tuple[str, ...], known: bool) -> None:
    model, params = made
    key = jax.random.key(1)
    wanted = usual(model, 1)
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes), devices=jax.devices()[:4])
    tokens, mask = jax.device_put((TOKENS, MASK), NamedSharding(mesh, PartitionSpec(axes[0])))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh) if known else contextlib.nullcontext():
        run = jax.jit(gradient(model, key)).lower(params, tokens, mask).compile()
        assert "all-gather(" not in str(run.as_text())  # native attention too: each device has rows of its own
        assert_same(run(params, tokens, mask), wanted)
        if known:
            jax.eval_shape(model.init, key, tokens)


def test_a_mesh_of_explicit_axes_is_refused_with_what_to_do(made: tuple[Any, Any]) -> None:
    model, params = made
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec("rows")))

    def logits(tokens: Any) -> Any:
        return model.apply({"params": params}, tokens).logits

    with jax.set_mesh(mesh):
        with pytest.raises(UserError, match=r"explicit axes \(rows\).*auto_axes"):
            jax.jit(logits)(tokens)
        inside = jax.jit(jax.sharding.auto_axes(logits, out_sharding=PartitionSpec("rows")))(tokens)
    assert_same(inside, jax.jit(logits)(TOKENS))


def on_each_device(model: Any) -> Any:
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    split, everywhere = PartitionSpec("rows"), PartitionSpec()

    def part(params: Any, tokens: Any, mask: Any) -> Any:
        return jax.lax.psum(gradient(model)(params, tokens, mask), "rows")

    places = {"in_specs": (everywhere, split, split), "out_specs": everywhere, "check_vma": False}
    return jax.shard_map(part, mesh=mesh, **places)


def by_pmap(model: Any) -> Any:
    def part(params: Any, tokens: Any, mask: Any) -> Any:
        return jax.lax.psum(gradient(model)(params, tokens, mask), "rows")

    run = jax.pmap(part, axis_name="rows", in_axes=(None, 0, 0), devices=jax.devices()[:ROWS])
    return lambda params, *rows: jax.tree.map(lambda x: x[0], run(params, *(x[:, None] for x in rows)))


def by_vmap(model: Any) -> Any:
    each = jax.vmap(lambda *x: gradient(model)(x[0], x[1][None], x[2][None]), (None, 0, 0))
    return lambda *x: jax.tree.map(lambda y: y.sum(0), each(*x))


def checkpointed(model: Any) -> Any:
    return jax.value_and_grad(jax.checkpoint(lambda params, *rows: loss(model, params, *rows)))


@pytest.mark.parametrize("way", [on_each_device, by_pmap, by_vmap, checkpointed])
def test_a_transformation_changes_no_value(made: tuple[Any, Any], way: Any) -> None:
    model, params = made
    wanted = usual(model)
    run = way(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of pmap
        assert_same((run if way is by_pmap else jax.jit(run))(params, TOKENS, MASK), wanted)


def test_vmap_over_parameters_and_over_keys(made: tuple[Any, Any]) -> None:
    model, params = made
    two = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), params)
    keys = jax.random.split(jax.random.key(0), 2)

    def each(params: Any, key: Any) -> Any:
        return jax.value_and_grad(lambda params: loss(model, params, key=key))(params)

    found = jax.jit(jax.vmap(each))(two, keys)
    one = jax.jit(each)
    for i in range(2):
        wanted = one(jax.tree.map(lambda x, i=i: x[i], two), keys[i])
        assert_same(jax.tree.map(lambda x, i=i: x[i], found), wanted)


def test_a_program_can_be_exported(made: tuple[Any, Any]) -> None:
    model, params = made
    plain = model.clone(compute=Compute(attention="xla"))

    def logits(params: Any, tokens: Any) -> Any:
        return plain.apply({"params": params}, tokens).logits

    # Refuses calls of functions that are not part of jax, as the native backend's.
    assert_same(
        jax.export.export(jax.jit(logits))(params, TOKENS).call(params, TOKENS), jax.jit(logits)(params, TOKENS)
    )


@pytest.mark.parametrize("switch", ["strict", "rank", "transfers", pytest.param("no jit", marks=pytest.mark.slow)])
def test_switches_of_jax(made: tuple[Any, Any], switch: str) -> None:
    model, params = made
    key = jax.random.key(1)
    wanted = usual(model, 1)
    with {
        "strict": lambda: jax.numpy_dtype_promotion("strict"),
        "rank": lambda: jax.numpy_rank_promotion("raise"),
        "transfers": lambda: jax.transfer_guard("disallow"),
        "no jit": jax.disable_jit,
    }[switch]():
        assert_same(jax.jit(gradient(model, key))(params, TOKENS, MASK), wanted)


@pytest.mark.skipif(unavailable() is not None, reason=f"native {unavailable()}")
def test_auto_takes_the_native_backend_here() -> None:
    """Else the tests above would not be of it."""
    text = jax.jit(gradient(MODELS["bert"])).lower(init_params(MODELS["bert"], 0), TOKENS, MASK).as_text()
    assert "jaxft_attention_backward" in text


# ---------------------------------------------------------------------------------------- states, someone else's module


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_states_of_all_layers_end_in_the_last(made: tuple[Any, Any], layers: Any) -> None:
    model, params = made
    model = model.clone(compute=Compute(layers=layers))
    plain, out = (
        jax.jit(lambda params, keep=keep: model.apply({"params": params}, TOKENS, hidden_states=keep))(params)
        for keep in (False, True)
    )
    assert plain.hidden_states is None
    assert out.hidden_states.shape == (2, ROWS, 8, 32)
    assert_same((out.hidden_states[-1], out.logits), (plain.hidden, plain.logits))


class Theirs(nn.Module):
    """A module of someone else's, in whose tree ours is a part."""

    part: nn.Module

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        return nn.Dense(1)(self.part(tokens).hidden[:, 0])


def test_parameters_inside_someone_elses_module_are_plain_arrays(made: tuple[Any, Any]) -> None:
    model, params = made
    theirs = Theirs(model)
    inside = jax.jit(theirs.init)(jax.random.key(0), TOKENS)["params"]["part"]
    assert jax.tree.map(jnp.shape, inside) == jax.tree.map(jnp.shape, params)
    assert all(
        isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(inside, is_leaf=lambda x: not isinstance(x, dict))
    )
    found = jax.jit(theirs.apply)(
        {"params": {"part": params, "Dense_0": {"kernel": jnp.ones((32, 1)), "bias": jnp.zeros(1)}}}, TOKENS
    )
    wanted = jax.jit(model.apply)({"params": params}, TOKENS).hidden[:, 0].sum(-1, keepdims=True)
    assert_same(found, wanted)


# ------------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("name", "found", "usual"),
    [
        ("jax_numpy_dtype_promotion", "strict", "standard"),
        ("jax_numpy_rank_promotion", "raise", "allow"),
        ("jax_transfer_guard", "disallow", "allow"),
        ("jax_disable_jit", True, False),
    ],
)
def test_a_command_sets_switches_aside_and_says_so(
    name: str, found: Any, usual: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = getattr(jax.config, name)
    jax.config.update(name, found)
    try:
        set_up_jax(None)
        assert getattr(jax.config, name) == usual
        assert capsys.readouterr().err == f"{name.upper()}={found} is set aside: this command needs {usual}\n"
        set_up_jax(None)
        assert capsys.readouterr().err == ""
    finally:
        jax.config.update(name, before)


@pytest.mark.slow
def test_a_run_with_keys_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, data = make_folder(tmp_path / "model"), write_csv(tmp_path / "data.csv", rows(8))
    with jax.default_prng_impl("rbg"):
        code, _, error = run(
            capsys, "train", f"model.init={folder}", f"data.train={data}", f"data.eval={data}", "data.max_length=8",
            "data.buckets=[8]", "train.steps=1", "train.batch_size=8", "eval.batch_size=8", "train.compilation_cache=null",
            "log.progress=off", f"train.out={tmp_path / 'run'}",
        )  # fmt: skip
    assert code == 0, error
    assert (tmp_path / "run/export/model.safetensors").is_file()
