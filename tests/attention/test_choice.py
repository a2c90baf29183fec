"""Who computes what: refusals name the reason and the backends that can; `auto` follows the measured table and says so."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import pytest

from jaxft.attention import NAMES, MaskSpec, Request, attend, choices, choose, described
from jaxft.attention import choice as module
from jaxft.config import MeshConfig, ModelConfig
from jaxft.errors import UserError
from jaxft.layers import Compute
from jaxft.parallel.sharding import make_mesh

CPU = Request("cpu", length=128, heads=4, key_heads=4, size=64, operands="float32")
TPU = dataclasses.replace(CPU, platform="tpu", operands="bfloat16")


@pytest.mark.parametrize(
    ("wanted", "change", "reason"),
    [
        ("jax", {"dropout": "hash"}, "jax has no dropout; use (native or )?blockwise or xla or reference, or auto"),
        ("jax", {"soft_cap": True}, "jax has no soft cap"),
        ("blockwise", {"bias": True}, "blockwise adds no bias; use xla or jax or reference"),
        ("splash", {}, "splash runs on TPUs only"),
        ("splash", {"platform": "tpu", "dropout": "threefry"}, "splash has no dropout"),
        ("flash", {"platform": "tpu", "window": 5}, "flash has no sliding window; use fused or splash"),
        ("fused", {"platform": "tpu", "dropout": "threefry"}, "fused makes bits of dropout by hash only"),
        ("fused", {"platform": "tpu", "length": 4096}, "fused holds whole rows of at most 2048 tokens; use splash"),
        ("fused", {"platform": "tpu", "device": "TPU v4"}, "fused needs more vector memory than a TPU v4 has"),
        ("cudnn", {"platform": "gpu"}, r"cudnn takes 16-bit operands only \(model.matmul_dtype\)"),
        ("cudnn", {"platform": "gpu", "operands": "bfloat16", "size": 129}, "multiples of 8"),
        ("cudnn", {"platform": "gpu", "operands": "bfloat16", "length": 127}, "even lengths only"),
        ("ring", {}, "ring needs a mesh that splits rows over context"),
        ("xla", {"context": 2}, "xla needs whole rows on a device, .*; use ring or all_to_all, or auto"),
        (
            "ring",
            {"context": 2, "bias": True},
            "ring adds no bias; use xla, or auto$",
        ),
        (
            "all_to_all",
            {"context": 4, "heads_split": 2},
            r"needs query and key heads \(4 and 4\) .* \(8\); use ring, or auto",
        ),
        ("blockwise", {"split_alike": False}, "split over the same mesh axes"),
        ("blockwize", {}, "unknown backend: .*blockwise"),
    ],
)
def test_more_than_a_backend_can_is_refused(wanted: str, change: dict, reason: str) -> None:
    with pytest.raises(UserError, match=f"model.attention='?{wanted}'?: .*{reason}"):
        choose(dataclasses.replace(CPU, **change), wanted)


def test_auto_refuses_what_none_can() -> None:
    reason = "needs query and key heads split over the same mesh axes"
    with pytest.raises(UserError, match=f"attention: no backend can do this: ring {reason}; all_to_all {reason}$"):
        choose(dataclasses.replace(CPU, context=2, split_alike=False))


def test_a_bias_on_split_rows_is_added_by_xla() -> None:
    assert choose(dataclasses.replace(CPU, context=2, bias=True)).backend.name == "xla"


def test_auto_takes_the_fastest_that_honours_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"platform": "cpu", "operands": "float32", "size": 64, "dropout": False}
    rows = [
        row | {"length": 128, "ms": {"xla": 1.0, "blockwise": 2.0, "jax": 0.5}},
        row | {"length": 2048, "ms": {"xla": 9.0, "blockwise": 3.0}},
        row | {"length": 128, "platform": "tpu", "ms": {"splash": 0.1}},
    ]
    monkeypatch.setattr(module, "measured", lambda: rows)
    assert choose(CPU).backend.name == "jax"
    assert choose(CPU).why == "fastest of blockwise, xla, jax at 128 tokens"
    assert choose(dataclasses.replace(CPU, dropout="hash")).backend.name == "xla"  # jax has none
    assert choose(dataclasses.replace(CPU, length=4096)).backend.name == "blockwise"
    assert choose(dataclasses.replace(CPU, context=4)).backend.name == "ring"
    unmeasured = choose(dataclasses.replace(CPU, platform="gpu"))
    assert unmeasured.why == "first of those that can: nothing was measured for it"


def test_what_was_chosen_is_told() -> None:
    q = jnp.ones((1, 2, 16, 8))
    with choices() as seen:
        for length in (16, 8):
            jax.eval_shape(
                lambda q: attend(q, q, q, MaskSpec(), Compute(attention="xla", platform="cpu")), q[:, :, :length]
            )
    assert described(seen.values(), "xla") == "xla at 8, 16 tokens (asked for)"
    assert not described(seen.values(), "auto")
    with choices() as seen:
        pass
    assert not seen


def test_every_platform_has_a_backend_for_every_mask() -> None:
    for platform in ("cpu", "gpu", "tpu"):
        changes: list[dict[str, Any]] = [{}, {"dropout": "hash"}, {"soft_cap": True}, {"bias": True}, {"window": 3}]
        for change in changes:
            found = choose(dataclasses.replace(CPU, platform=platform, **change))
            assert found.backend.refuses(found.request) is None


def test_the_configuration_knows_every_backend() -> None:
    assert set(get_args(get_type_hints(ModelConfig)["attention"])) == {"auto", *NAMES}


def test_the_measured_table_names_backends_that_exist() -> None:
    for row in module.measured():
        assert set(row["ms"]) <= set(NAMES)
        assert {"platform", "operands", "size", "length", "dropout"} <= set(row)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scale": 0.0}, "scale=0.0: must be above 0"),
        ({"bias": jnp.ones((1, 3, 8, 8))}, "bias .*: must be"),
        ({"bias": jnp.ones((1, 2, 8, 1))}, "bias .*: must be"),
    ],
)
def test_options_that_do_not_fit(options: dict, reason: str) -> None:
    q = jnp.ones((1, 2, 8, 4))
    with pytest.raises(ValueError, match=reason):
        attend(q, q, q, MaskSpec(), Compute(), **options)


def test_a_window_holds_at_least_the_token_itself() -> None:
    with pytest.raises(ValueError, match="window=0"):
        MaskSpec(window=0)


def test_rows_that_no_mesh_divides_go_to_xla() -> None:
    q = jnp.ones((3, 2, 8, 4))
    with jax.set_mesh(make_mesh(MeshConfig(8))), choices() as seen:
        out = jax.jit(lambda q: attend(q, q, q, MaskSpec(), Compute()))(q)
    assert described(seen.values(), "auto").startswith("xla at 8 tokens")
    assert out.shape == q.shape
