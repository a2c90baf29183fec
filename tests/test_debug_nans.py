"""``--debug-nans`` names the first operation whose NaN or infinity reaches the loss or a gradient, and nothing that is meant."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import Ready, fit, folder, ready, stored
from tiny_run import ARCH, config_of

from jaxft.__main__ import main
from jaxft.checkpoint import Checkpoints
from jaxft.errors import Diverged
from jaxft.parallel.sharding import make_mesh
from jaxft.training import loop, setup
from jaxft.training.diagnosis import first_operation
from jaxft.training.replay import first_not_finite
from jaxft.training.setup import Setup, Times
from jaxft.trees import map_paths

__all__ = ["folder", "ready"]  # fixtures


def found(loss: Callable[..., Any], **arguments: Any) -> str:
    """What is said of a loss and its gradients by all arguments, the test's own line left out."""
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in arguments.items()}

    def computed(*values: jax.Array) -> tuple[jax.Array, Any]:
        return jax.value_and_grad(lambda all_values: loss(*all_values))(values)

    said = first_not_finite(jax.make_jaxpr(computed)(*arrays.values()), arrays)
    return said.replace("tests/test_debug_nans.py", "HERE")


def norm(x: jax.Array, eps: float) -> jax.Array:
    centred = x - x.mean()
    return centred / jnp.sqrt(jnp.square(centred).mean() + eps)


@jax.custom_vjp
def doubled(x: jax.Array) -> jax.Array:
    return 2 * x


doubled.defvjp(lambda x: (2 * x, x), lambda x, g: (g / (x - x),))


@pytest.mark.parametrize(
    ("loss", "x", "what", "way"),
    [
        (lambda x: jnp.exp(x).sum(), [1.0, 100.0], "exp(100) = inf in 1 of 2 numbers", "forward"),
        (lambda x: jnp.log(x).sum(), [1.0, -1.0], "log(-1) = nan in 1 of 2 numbers", "forward"),
        (lambda x: norm(x, 0.0).sum(), [3.0, 3.0], "div(0, 0) = nan in 2 of 2 numbers", "forward"),
        (lambda x: jnp.sqrt(x).sum(), [1.0, 0.0], "div(0.5, 0) = inf in 1 of 2 numbers", "backward"),
        (lambda x: (x**3).sum(), [1.0, 1e30], "integer_pow(1e+30, 3) = inf in 1 of 2 numbers", "forward"),
        (lambda x: jnp.dot(x, x), [1e30, 1e30], "dot_general of numbers up to 1e+30 gave inf", "forward"),
        (lambda x: doubled(x).sum(), [1.0, 2.0], "div(1, 0) = inf in 2 of 2 numbers", "backward"),
        # Infinity from an earlier operation makes NaN of a later one: the earlier one is named.
        (lambda x: (jnp.exp(x) - jnp.exp(x)).sum(), [1.0, 100.0], "exp(100) = inf in 1 of 2 numbers", "forward"),
        # The logarithm of 0 is selected away; its derivative is not.
        (
            lambda x: jnp.where(x > 0, jnp.log(x), 0.0).sum(),
            [1.0, 0.0],
            "div(0, 0) = nan in 1 of 2 numbers",
            "backward",
        ),
    ],
)
def test_the_first_operation_is_named(loss: Callable[..., Any], x: list[float], what: str, way: str) -> None:
    said = found(loss, x=x)
    assert said.startswith(f"{what}, ")
    assert said.endswith(f", {way} pass")
    assert "HERE:" in said


def softmax(scores: jax.Array, seen: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(seen > 0, scores, -jnp.inf))


def test_what_is_meant_is_not_named() -> None:
    x, seen = [[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [1.0, 1.0]]
    assert found(lambda x, seen: softmax(x, seen).max(), x=x, seen=seen) == ""
    # A row that sees nothing: minus infinity less minus infinity.
    said = found(lambda x, seen: softmax(x, seen).sum(), x=x, seen=[[1.0, 1.0], [0.0, 0.0]])
    assert said.startswith("sub(-inf, -inf) = nan in 2 of 4 numbers, ")
    # A fault elsewhere in the same array, beside masks and a logarithm of 0 that is not read.
    said = found(lambda x, seen: softmax(jnp.sqrt(x), seen).sum(), x=[[1.0, 2.0], [3.0, -4.0]], seen=seen)
    assert said.startswith("sqrt(-4) = nan in 1 of 4 numbers, ")

    def beside(x: jax.Array) -> jax.Array:
        unread = jax.lax.stop_gradient(jnp.log(x))
        return jnp.concatenate([unread, jnp.exp(x)])[2:].sum()

    assert found(beside, x=[0.0, 100.0]).startswith("exp(100) = inf in 1 of 2 numbers, ")


def test_arguments_and_constants_are_named() -> None:
    assert found(lambda x, y: (x * y).sum(), x=[1.0, np.inf], y=[1.0, 1.0]) == "x is not finite"
    assert found(lambda x, y: x.sum(), x=[1.0, 1.0], y=[1.0, np.nan]) == ""  # nothing reads it
    assert found(lambda x: (x * np.array([1.0, np.nan], np.float32)).sum(), x=[1.0, 1.0]).startswith("a constant")


@pytest.mark.parametrize("kind", ["scan", "reverse", "while", "cond", "checkpoint", "jit", "map"])
def test_inside_of_programs(kind: str) -> None:
    def step(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        return carry + jnp.log(row), row

    def loss(x: jax.Array) -> jax.Array:
        if kind in ("scan", "reverse"):
            return jax.lax.scan(step, jnp.float32(0), x, reverse=kind == "reverse")[0]
        if kind == "while":
            body = lambda pair: (pair[0] + 1, jax.lax.stop_gradient(jnp.log(x[pair[0]])))
            return x.sum() * jax.lax.while_loop(lambda pair: pair[0] < 3, body, (0, jnp.float32(0)))[1]
        if kind == "cond":
            return jax.lax.cond(x[0] > 0, lambda x: jnp.log(x).sum(), lambda x: x.sum(), x)
        if kind == "map":
            return jax.lax.map(jnp.log, x).sum()
        inside: Any = jax.checkpoint if kind == "checkpoint" else jax.jit
        return inside(lambda x: jnp.log(x).sum())(x)

    said = found(loss, x=[1.0, 2.0, -3.0])
    assert said.startswith("log(-3) = nan")
    if kind in ("scan", "reverse", "map"):
        assert "turn 3 of 3 of the loop at HERE:" in said
    if kind == "while":
        assert "turn 3 of the loop at HERE:" in said


@functools.cache
def made(family: str, layers: str, folder: Path) -> Setup:
    arch = ARCH.replace("}", ", hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}")
    more = [f"model.layers={layers}", "optim.ema=null"]
    if family == "bert":
        more.append(arch)
    if family == "llama":
        more += [
            "model.family=llama",
            "model.arch={vocab_size: 48, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, "
            "num_key_value_heads: 1, intermediate_size: 32, max_position_embeddings: 32}",
        ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:2]))
        return setup.prepare(config_of(folder, *more), lambda text: None, Times())


def said_of(ready: Setup, change: Callable[[str, np.ndarray], np.ndarray]) -> str:
    params = jax.device_get(ready.start_params(0, lambda text: None))
    spoilt: Any = map_paths(lambda path, leaf: change(path, np.array(leaf)), params)
    return first_operation(ready, spoilt, ready.train_batches(0)[0], 0, 0)


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        pytest.param("bert", "scanned", marks=pytest.mark.slow),
        pytest.param("bert", "unrolled", marks=pytest.mark.slow),
        pytest.param("llama", "scanned", marks=pytest.mark.slow),
        pytest.param("llama", "unrolled", marks=pytest.mark.slow),
    ],
)
def test_module_and_layer_are_named(family: str, layers: str, folder: Path) -> None:
    """On a mesh of two devices."""
    ready = made(family, layers, folder)

    def large(name: str, layer: int, value: float) -> Callable[[str, np.ndarray], np.ndarray]:
        def change(path: str, leaf: np.ndarray) -> np.ndarray:
            if path.startswith("layers/") and name in path and path.endswith("kernel"):
                leaf[layer] = value
            return leaf

        return change

    said = said_of(ready, large("mlp/up", 1, 3e38))
    assert said.startswith("dot_general of numbers up to 3e+38 gave ")
    assert ", in layers/mlp/up, layer 1, jaxft/layers/matmul.py:" in said
    assert said.endswith(", forward pass")
    assert ", in layers/attention, layer 0, jaxft/" in said_of(ready, large("attention/", 0, 1e25))
    assert said_of(ready, large("mlp/down", 1, np.inf)) == "parameter layers/mlp/down/kernel is not finite"
    assert said_of(ready, lambda path, leaf: leaf) == "computed again, operation by operation, everything was finite"


def test_a_run_ends_and_goes_on_without(ready: Ready, tmp_path: Path) -> None:
    """A batch whose weights are not finite; with the batch as it is on disk, the parameters are to blame, or nothing."""
    ready = ready.but(eval={"every": 5})
    bad = ready.setup.train_batches(0)[6]

    def call(program: Any, state: Any, batch: Any, seed: Any) -> Any:
        weights = batch["weights"] * (np.nan if np.array_equal(batch["tokens"], bad["tokens"]) else 1.0)
        return program(state, batch | {"weights": weights}, seed)

    programs = {shape: lambda *a, p=program: call(p, *a) for shape, program in ready.programs.train.items()}
    broken = Ready(ready.setup, dataclasses.replace(ready.programs, train=programs))
    seen: list[tuple[Any, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop, "first_operation", lambda s, params, batch, seed, step: seen.append((params, step)) or "WHAT"
        )
        with pytest.raises(Diverged) as raised:
            loop.fit(broken.setup, broken.programs, tmp_path, 0, lambda text: None, Times(), debug_nans=True)
    assert str(raised.value) == (
        "step 7: loss or gradient was not finite: WHAT; without --debug-nans the same command goes on"
    )
    assert raised.value.exit_code == 5
    assert [step for _, step in seen] == [6]
    with Checkpoints(tmp_path / "checkpoints", keep=99) as store:
        assert store.steps() == (5,)
    assert fit(ready, tmp_path).result.step == 30
    assert int(stored(ready, tmp_path, 30)[0].skipped) == 0


def test_it_is_refused_beside_restarts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--debug-nans", "--restarts", "2", f"train.out={tmp_path / 'run'}"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
