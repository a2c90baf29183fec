"""`jaxft plan` for GPUs: real programs where jax's CUDA plug-in is installed, written ones everywhere."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_plan import BERT, LAYOUTS, SMALL, as_in_the_textbook, no_whole_weights, options, plan, recipe_of

from jaxft.config import load_config
from jaxft.machine.chips import parse_topology
from jaxft.machine.gpus import Gpu
from jaxft.planning.advice import advice_for
from jaxft.planning.hlo.costs import costs_of
from jaxft.planning.hlo.roofline import Peaks, roofline_of
from jaxft.planning.measure import Plan, make_plan
from jaxft.planning.table import plan_json, plan_text


@pytest.mark.slow
@pytest.mark.parametrize("mesh", LAYOUTS)
def test_exchanges_of_a_gpu_program_are_those_of_the_textbook(mesh: list[str], tmp_path: Path) -> None:
    pytest.importorskip("jax_cuda13_plugin")
    _, told = as_in_the_textbook(mesh, "h100-8", tmp_path)
    if mesh == ["mesh.data=1", "mesh.fsdp=8"]:
        no_whole_weights(told)


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.mark.parametrize(
    ("operands", "attention", "least"),
    [
        ("bfloat16", "cudnn", 0.9),
        # Of float32 operands, XLA gathers weights as small as these once for both passes.
        pytest.param("float32", "blockwise", 0.65, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_planned_for_gpus_that_are_not_there(
    operands: str, attention: str, least: float, tmp_path: Path
) -> None:
    pytest.importorskip("jax_cuda13_plugin")
    arch = SMALL | {"model.arch": json.dumps(BERT | NO_DROPOUT)}
    changes = (
        "mesh.data=1",
        "mesh.fsdp=8",
        "data.max_length=64",
        "train.batch_size=64",
        f"model.matmul_dtype={operands}",
    )
    out, err = plan(*options(*changes, base=arch), "--topology", "h100-8", "--json", str(tmp_path / "p.json"))
    assert err == ""
    told = json.loads((tmp_path / "p.json").read_text())
    assert told["topology"] == {"name": "h100-8", "chips": 8, "nodes": 1, "per_node": 8}
    assert told["memory_bytes"]["fits"]
    split = told["split_percent"] / 100
    assert split > 0.99
    assert told["memory_bytes"]["parameters"] == pytest.approx(
        4 * told["parameters"] * (split / 8 + 1 - split), rel=1e-3
    )
    assert told["attention"].startswith(f"{attention} at 64 tokens")
    sent = sum(one["bytes_sent"] for one in told["exchanges"])
    textbook = sum(told["textbook_bytes_sent"].values())
    print(f"{operands}: sent {sent / 2**20:.2f} MiB, textbook {textbook / 2**20:.2f} MiB")
    assert least * textbook < sent < 1.1 * textbook
    # The kernel's products are counted too: at most the scores again in the backward pass, half a product in four.
    assert told["useful_flops"] <= 1.02 * told["matmul_flops"] <= 1.1 * told["useful_flops"]
    assert told["seconds"]["roofline"] > told["useful_flops"] / 989e12
    assert "kernels chosen without autotuning" in out
    assert "est leaves out" not in out
    assert "jax-cuda13-plugin" in told["versions"]


def test_gpus_need_the_compiler_but_not_for_formulas() -> None:
    if importlib.util.find_spec("jax_cuda13_plugin") is not None:
        pytest.skip("the CUDA plug-in is installed")
    _, err = plan(*options("data.max_length=64"), "--topology", "h100-8", code=2)
    assert len(err.splitlines()) == 1, err
    assert 'pip install "jax[cuda13]"' in err
    assert "--analytic" in err
    out, _ = plan(*options("data.max_length=64"), "--topology", "h100-16", "--analytic")
    assert "plan for h100-16: 16 chips (2 nodes of 8)" in out
    assert "(75 % of the GPU: XLA_PYTHON_CLIENT_MEM_FRACTION)" in out
    assert "jaxft train will ask for mesh.slices=2" in out


GPU_PROGRAM = """HloModule m, num_partitions=16

ENTRY %main (x: f32[2]) -> f32[2] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  %b = bf16[4096,4096]{1,0} parameter(1)
  %g = bf16[4096,4096]{1,0} all-reduce(%a), replica_groups=[8,2]<=[2,8]T(1,0), to_apply=%sum
  %c = bf16[512,4096]{1,0} parameter(2)
  %h = bf16[4096,4096]{1,0} all-gather(%c), replica_groups=[2,8]<=[16], dimensions={0}
  ROOT %d = bf16[4096,4096]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


DOT = "  %d = bf16[8192,8192]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"


def gpu_plan(text: str) -> Plan:
    """A plan for two nodes of eight H100 as if this were its program."""
    gpus = parse_topology("h100-16")
    assert isinstance(gpus.chip, Gpu)
    peaks = Peaks(gpus.chip.flops, gpus.chip.tf32_flops, gpus.chip.float32_flops, gpus.chip.hbm_bandwidth)
    return replace(
        make_plan(recipe_of(SMALL), gpus, 32, 64, compiled=False),
        source="compiled",
        collectives=costs_of(text).collectives,
        roofline=roofline_of(text, peaks),
        unpriced=("k (kernel)",),
    )


@pytest.mark.parametrize(("ops", "share"), [("", 1.0), ("  %n = bf16[2048,4096]{1,0} negate(%e)\n", None), (DOT, 0.0)])
def test_only_computation_hides_an_exchange(ops: str, share: float | None) -> None:
    """Started and awaited apart is not enough: what lies between has to last as long."""
    found = gpu_plan(f"""HloModule m, num_partitions=16

ENTRY %main (x: f32[2]) -> f32[2] {{
  %e = bf16[2048,4096]{{1,0}} parameter(0)
  %c = bf16[512,4096]{{1,0}} parameter(1)
  %a = bf16[8192,8192]{{1,0}} parameter(2)
  %s = (bf16[512,4096]{{1,0}}, bf16[4096,4096]{{1,0}}) all-gather-start(%c), replica_groups=[2,8]<=[16], dimensions={{0}}
{ops}  ROOT %h = bf16[4096,4096]{{1,0}} all-gather-done(%s)
}}
""")
    whole = 7 * 2 * 512 * 4096 / 450e9
    share = (whole - 2 * 2 * 2048 * 4096 / 3352e9) / whole if share is None else share
    (one,) = plan_json(found, [], {})["exchanges"]
    assert one["open_share"] == pytest.approx(share)
    assert found.step_seconds(1.0) == pytest.approx(1.0 + share * whole)
    assert re.search(rf"all-gather +1 +8 +32\.0 +28\.0 +{100 * (1 - share):.0f} %", plan_text(found, []))


def test_table_and_json_of_a_gpu_plan() -> None:
    found = gpu_plan(GPU_PROGRAM)
    config = load_config(None, options("mesh.slices=2"))
    text, told = plan_text(found, advice_for(found, config)), plan_json(found, [], {})
    assert re.search(r"all-reduce +1 +2 of 2 nodes +32\.0 +32\.0 +no", text)
    assert re.search(r"all-gather +1 +8 +32\.0 +28\.0 +no", text)
    # 2 n^3 at the peak; half of the all-reduce twice over one network card, seven of eight parts are gathered over NVLink.
    product, reduced, gathered = 2 * 4096**3 / 989e12, 2 * 4096**2 / 50e9, 7 * 2 * 512 * 4096 / 450e9
    assert told["seconds"] == {"roofline": pytest.approx(product + reduced + gathered)}
    assert told["exchange_seconds"] == pytest.approx(reduced + gathered)
    step = 1e3 * (product + reduced + gathered)
    assert re.search(rf"step, roofline +{step:.2f} ms  MFU at most 0\.0 %", text)
    assert "est leaves out" not in text
    assert "slices=2" not in text  # as it is
