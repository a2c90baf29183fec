"""The weight table: fused tensors, tensors of some layers, patterns; read by devices and as stored, written bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.errors import UserError
from jaxft.hub.convert import export_tensors, import_params, stored_params
from jaxft.hub.weights import TensorOut, open_weights, write_safetensors
from jaxft.models.layout import Layout, Rule
from jaxft.models.patterns import Pattern, parsed
from jaxft.trees import nested, paths_of

L, D, N, K, H, F = 3, 8, 4, 2, 3, 10
QKV = ("layers/q", "layers/k", "layers/v")
RULES = (
    Rule(QKV, "m.{layer}.qkv", "(n h) d -> d n h"),
    Rule(("layers/gate", "layers/up"), "m.{layer}.wi", "o i -> i o"),
    Rule(("pair/a", "pair/b"), "m.pair"),
    Rule("layers/norm", "m.{layer}.norm", layers=(1, None)),
    Rule("layers/early", "m.{layer}.early", layers=(0, 2)),
)
LAYOUT = Layout(RULES, "m.")
SHAPES: dict[str, tuple[int, ...]] = {
    "layers/q": (L, D, N, H),
    "layers/k": (L, D, K, H),
    "layers/v": (L, D, K, H),
    "layers/gate": (L, D, F),
    "layers/up": (L, D, F),
    "pair/a": (5,),
    "pair/b": (2,),
    "layers/norm": (L - 1, D),
    "layers/early": (2, D),
}


def tree(dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(0)
    return nested({path: rng.normal(size=shape).astype(dtype) for path, shape in SHAPES.items()})


def shapes() -> Any:
    return nested({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()})


def write(folder: Path, params: Any) -> dict[str, np.ndarray]:
    made = export_tensors(params, LAYOUT, bare=False)
    write_safetensors(folder, made)
    return {one.name: one.read() for one in made}


def test_several_of_ours_are_the_rows_of_one_of_theirs(tmp_path: Path) -> None:
    params = tree()
    made, flat = write(tmp_path, params), paths_of(params)
    assert len(made) == 2 * L + 1 + (L - 1) + 2
    for layer in range(L):
        qkv = made[f"m.{layer}.qkv"]
        assert qkv.shape == ((N + 2 * K) * H, D)
        np.testing.assert_array_equal(qkv[: N * H], flat["layers/q"][layer].reshape(D, N * H).T)
        np.testing.assert_array_equal(qkv[(N + K) * H :], flat["layers/v"][layer].reshape(D, K * H).T)
        np.testing.assert_array_equal(made[f"m.{layer}.wi"][F:], flat["layers/up"][layer].T)
    np.testing.assert_array_equal(made["m.1.norm"], flat["layers/norm"][0])
    np.testing.assert_array_equal(made["m.1.early"], flat["layers/early"][1])
    assert "m.0.norm" not in made
    assert "m.2.early" not in made


def test_each_device_gets_its_part_of_a_fused_tensor(tmp_path: Path) -> None:
    params = tree()
    write(tmp_path, params)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    split = {
        "layers/q": (None, "x", "y"),
        "layers/k": (None, "x", "y"),
        "layers/up": (None, "y", "x"),
        "layers/v": (None, "x"),
    }

    def place(path: str) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*split.get(path, ())))

    with open_weights(tmp_path) as weights:
        got = import_params(weights, LAYOUT, shapes(), place, np.float32)
    for path, leaf in paths_of(got.params).items():
        assert leaf.sharding == place(path)
        np.testing.assert_array_equal(leaf, paths_of(params)[path])


def test_only_the_rows_of_a_part_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, tree())
    with open_weights(tmp_path) as weights:
        read: list[Any] = []
        rows = weights.read_rows
        monkeypatch.setattr(weights, "read_rows", lambda *asked: (read.append(asked), rows(*asked))[1])
        monkeypatch.setattr(weights, "read", lambda name: pytest.fail(f"{name} was read whole"))
        flat = paths_of(stored_params(weights, LAYOUT, shapes()).params)
        assert flat["layers/k"][1].shape == (D, K, H)
        assert flat["pair/b"].shape == np.asarray(flat["pair/b"]).shape == (2,)
    assert read == [("m.1.qkv", N * H, (N + K) * H), ("m.pair", 5, 7)]


def test_stored_types_stay_and_mixed_ones_become_one_that_holds_them(tmp_path: Path) -> None:
    params = tree(ml_dtypes.bfloat16)
    before = write(tmp_path / "half", params)
    with open_weights(tmp_path / "half") as weights:
        stored = stored_params(weights, LAYOUT, shapes()).params
        for one in export_tensors(stored, LAYOUT, bare=False):
            assert one.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(one.read(), before[one.name])
    params["layers"]["k"] = params["layers"]["k"].astype(np.float32)
    mixed = next(one for one in export_tensors(params, LAYOUT, bare=False) if one.name == "m.0.qkv")
    assert mixed.dtype == mixed.read().dtype == np.float32
    np.testing.assert_array_equal(mixed.read(), before["m.0.qkv"].astype(np.float32))


def test_all_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    made = write(tmp_path / "whole", tree())
    made["m.0.qkv"] = made["m.0.qkv"][1:]
    made["m.0.norm"] = made.pop("m.1.norm")
    del made["m.2.wi"]
    tensors = [TensorOut(name, value.shape, value.dtype, lambda value=value: value) for name, value in made.items()]
    write_safetensors(tmp_path / "broken", tensors)
    with open_weights(tmp_path / "broken") as weights, pytest.raises(UserError) as caught:
        stored_params(weights, LAYOUT, shapes())
    said = str(caught.value).split("do not fit the model: ")[1]
    wrong = "m.0.qkv is [23, 8], expected [24, 8]"
    assert said == f"2 missing: m.2.wi, m.1.norm; 1 unused: m.0.norm; 1 mis-shaped: {wrong}"


def test_a_rule_of_other_layers_than_the_stack_is_a_fault_of_the_family(tmp_path: Path) -> None:
    params = tree()
    params["layers"]["early"] = params["layers"]["early"][:1]
    with pytest.raises(ValueError, match="layers 0 to 1, our stack has 1"):
        export_tensors(params, LAYOUT, bare=False)


@pytest.mark.parametrize(
    "text", ["(n h) d -> d n h", "d (n h) -> n h d", "o i -> i o", "(n h) -> n h", "a (b c) (d e) -> d b e a c"]
)
def test_patterns_are_those_of_einops(text: str) -> None:
    from einops import rearrange

    pattern, rng = parsed(text), np.random.default_rng(0)
    sizes = {name: int(rng.integers(2, 6)) for name in pattern.ours}
    ours = rng.normal(size=[sizes[name] for name in pattern.ours])
    left, right = text.split(" -> ")
    theirs = rearrange(ours, f"{right} -> {left}")
    assert pattern.their_shape(ours.shape) == theirs.shape
    np.testing.assert_array_equal(pattern.to_theirs(ours), theirs)
    np.testing.assert_array_equal(pattern.to_ours(theirs, ours.shape), ours)
    assert parsed(text) is pattern


@pytest.mark.parametrize("text", ["o i", "o i -> i", "o o -> o o", "a b -> b c"])
def test_patterns_that_lose_something_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="both sides must hold the same names"):
        Pattern(text)
