"""`jaxft plan`: exact memory, FLOPs by closed forms, exchanges by the textbook, and answers instead of tracebacks."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from tiny_plan import BASE, BERT, LAYOUTS, LLAMA, SMALL, as_in_the_textbook, no_whole_weights, options, plan, recipe_of

from jaxft.data.batch import text_shape
from jaxft.machine.chips import parse_topology
from jaxft.planning.measure import DoesNotFit, largest_batch, make_plan
from jaxft.planning.table import plan_text
from jaxft.training.flops import model_flops


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # whose attention is a kernel
@pytest.mark.parametrize("layers", ["model.layers=unrolled", "model.layers=scanned", "model.remat=full"])
def test_useful_flops_of_an_encoder(layers: str, platform: str) -> None:
    rows, length, d, f, v, n = 16, 40, 128, 256, 512, 3
    found = model_flops(recipe_of(SMALL, layers, platform=platform), text_shape(rows, length))
    tokens, predicted = rows * length, rows * round(0.15 * length)
    assert found.dense == 3 * 2 * (n * tokens * (4 * d * d + 2 * d * f) + predicted * (d * d + d * v))
    assert found.attention == 3 * n * 4 * rows * length**2 * d


def test_useful_flops_of_a_decoder_are_of_half_the_attention() -> None:
    rows, length, d, f, v, n = 16, 64, 1024, 2816, 4096, 3
    found = model_flops(recipe_of(BASE), text_shape(rows, length))
    assert found.dense == 3 * 2 * rows * length * (n * (4 * d * d + 3 * d * f) + d * v)
    assert found.attention == 3 * n * 4 * rows * length**2 * d / 2


@pytest.mark.parametrize("ema", ["optim.ema=null", "optim.ema=0.9"])
def test_fsdp_divides_parameters_and_optimizer_by_the_chips(ema: str) -> None:
    base = "{hidden_size: 768, num_hidden_layers: 12, num_attention_heads: 12, intermediate_size: 3072}"
    recipe = recipe_of(SMALL | {"model.arch": base}, "mesh.data=1", "mesh.fsdp=8", "model.layers=scanned", ema)
    found = make_plan(recipe, parse_topology("cpu:8"), 32, 64, compiled=False)
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(recipe.shapes))
    copies = 4 if ema == "optim.ema=0.9" else 3
    mine = found.memory.parameters + found.memory.optimizer + found.memory.average
    assert mine == pytest.approx(copies * total / 8, rel=0.05)
    assert found.split_percent > 99


def test_the_plan_of_cpu_devices_is_of_the_compiled_step(tmp_path: Path) -> None:
    out, _ = plan(
        *options("mesh.fsdp=4", "data.max_length=64", "model.attention=xla"),
        "--topology",
        "cpu:8",
        "--json",
        str(tmp_path / "p.json"),
    )
    assert "plan for cpu:8: 8 chips (8), mesh data 2 x fsdp 4" in out
    told = json.loads((tmp_path / "p.json").read_text())
    assert told["source"] == "compiled"
    memory = told["memory_bytes"]
    assert memory["total"] >= memory["parameters"] + memory["optimizer"] + memory["batch"]
    # The compiled program does the useful work and little besides (products inside a kernel would not be seen).
    assert told["useful_flops"] <= told["matmul_flops"] <= 1.05 * told["useful_flops"]
    assert told["mfu"] == {}
    assert {one["kind"] for one in told["exchanges"]} >= {"all-gather", "all-reduce"}
    assert told["versions"]["jax"] == jax.__version__


def test_a_program_that_this_jax_cannot_read_is_told_by_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax 0.10 of some asynchronous exchanges that libtpu writes."""

    def refuses(self: object) -> str:
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure (hlo_instruction.cc:390) 1 operands but sees 3")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", refuses)
    tiny = BERT | {"num_hidden_layers": 1}
    recipe = recipe_of(SMALL | {"model.arch": json.dumps(tiny)}, "mesh.fsdp=8", "mesh.data=1", "model.attention=xla")
    found = make_plan(recipe, parse_topology("cpu:8"), 8, 16, compiled=True)
    assert found.source == "unread"
    assert found.memory.temporaries > 0
    assert found.compile_seconds is not None
    text = plan_text(found, [])
    assert "this jax cannot read the program: its memory is the compiler's, the rest formulas" in text
    assert "of the compiled program" in text
    assert "exchanges per step, by formula" in text


def test_formulas_need_neither_libtpu_nor_data(tmp_path: Path) -> None:
    changes = ("train.batch_size=512", "data.max_length=64", "data.train=not-there.csv")
    out, _ = plan(*options(*changes), "--topology", "v5p-64", "--analytic", "--json", str(tmp_path / "p.json"))
    assert "source: formulas only: nothing was compiled" in out
    told = json.loads((tmp_path / "p.json").read_text())
    assert told["topology"]["chips"] == 32
    whole = told["memory_bytes"]["parameters"]
    assert told["textbook_bytes_sent"]["gradients_reduced"] == pytest.approx(2 * 31 / 32 * whole)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("changes", "row"),
    [
        (("task.name=image_classification", "model.family=vit"), "of 224x224 pixels"),
        (("task.name=speech_to_text", "model.family=whisper"), "x 3000 frames and 128 tokens of targets"),
        (("task.name=seq2seq", "model.family=t5"), "x 128 tokens and 128 tokens of targets"),
    ],
)
def test_a_plan_says_what_its_rows_are(changes: tuple[str, ...], row: str) -> None:
    out, _ = plan(*changes, "train.batch_size=16", "train.steps=10", "--topology", "v5e-8", "--analytic")
    assert f"16 rows {row} a step" in out


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--topology", "v7-16"], "--topology 'v7-16': unknown chip 'v7'"),
        (["--topology", "cpu:8", "--fit"], "--fit: nothing says how much memory cpu:8 has"),
        (["--topology", "h100-12"], "--topology 'h100-12': one node has 1, 2, 4 or 8 GPUs"),
        (["--topology", "h200-8", "--llo"], "--llo: there is no price of machine code for GPUs (h200-8)"),
        (["--topology", "cpu:8", "mesh.tensor=3"], "mesh data=-1 x tensor=3 does not fit 8 devices"),
        (["--topology", "cpu:8", "mesh.tensor=8"], "cannot be split 8 ways over mesh axes ('tensor',)"),
        (["--topology", "cpu:8", "train.batch_size=12"], "= 12 cannot be split 8 ways"),
        (["--topology", "cpu:8", "data.max_length=100"], "beyond the model's position table of 64"),
    ],
)
def test_one_line_says_what_is_wrong(arguments: list[str], problem: str) -> None:
    _, err = plan(*options(), *arguments, code=2)
    assert len(err.splitlines()) == 1, err
    assert problem in err


@pytest.mark.parametrize("mesh", LAYOUTS)
def test_exchanges_of_a_tpu_program_are_those_of_the_textbook(mesh: list[str], tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    out, told = as_in_the_textbook(mesh, "v5e-8", tmp_path)
    if mesh == ["mesh.data=1", "mesh.fsdp=8"]:
        no_whole_weights(told)
    price = re.search(r"step, est +([\d.]+) ms +MFU ([\d.]+) %", out)
    assert price is not None
    assert math.isclose(float(price[2]), 100 * told["mfu"]["est"], abs_tol=0.06)


@pytest.mark.slow
def test_over_a_whole_slice_weights_are_gathered_and_their_products_stay_whole(tmp_path: Path) -> None:
    # Left to itself, libtpu passes parts of weights from neighbour to neighbour and multiplies each by itself.
    pytest.importorskip("libtpu")
    wide = LLAMA | {"hidden_size": 2048, "intermediate_size": 7168, "num_hidden_layers": 2, "num_attention_heads": 16}
    changes = ("data.max_length=512", "train.batch_size=256", "mesh.data=1", "mesh.fsdp=16", "model.remat=full")
    plan(
        *options(*changes, base=BASE | {"model.arch": json.dumps(wide | {"num_key_value_heads": 16})}),
        "--topology", "v5e-16", "--json", str(tmp_path / "p.json"),
    )  # fmt: skip
    told = json.loads((tmp_path / "p.json").read_text())
    permuted = sum(one["bytes_sent"] for one in told["exchanges"] if one["kind"] == "collective-permute")
    textbook = told["textbook_bytes_sent"]
    print(f"permuted {permuted / 2**20:.1f} MiB, gradients {textbook['gradients_scattered'] / 2**20:.1f} MiB")
    assert permuted <= 1.1 * textbook["gradients_scattered"]


WIDE = BERT | {
    "vocab_size": 30522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
}


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        pytest.param(64, "float32", marks=pytest.mark.slow),
        pytest.param(1024, "float32", marks=pytest.mark.slow),
        pytest.param(64, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_under_fsdp_no_gradient_is_summed_up_whole(rows: int, dtype: str, tmp_path: Path) -> None:
    # A tied vocabulary that nothing divides, looked up by fewer and by more tokens than it has entries.
    pytest.importorskip("libtpu")
    changes = (
        "mesh.data=2",
        "mesh.fsdp=4",
        f"train.batch_size={rows}",
        "data.max_length=64",
        f"model.gradient_dtype={dtype}",
    )
    plan(
        *options(*changes, base=SMALL | {"model.arch": json.dumps(WIDE)}),
        "--topology", "v5e-8", "--json", str(tmp_path / "p.json"),
    )  # fmt: skip
    told = json.loads((tmp_path / "p.json").read_text())
    sent = {one["kind"]: 0.0 for one in told["exchanges"]}
    for one in told["exchanges"]:
        sent[one["kind"]] += one["bytes_sent"]
    textbook = told["textbook_bytes_sent"]
    # libtpu sums up whole what is below 4 MB: faster than to scatter it. The table alone is three fifths of all.
    small = textbook["gradients_scattered"] - sent["reduce-scatter"]
    assert abs(small) < 0.15 * textbook["gradients_scattered"]
    # The table's goes around twice between the groups: once from the look-up, once from the head.
    of_table = 30522 * 768 / 4 * np.dtype(dtype).itemsize
    assert sent["all-reduce"] < textbook["gradients_reduced"] + of_table + 2 * small + 2 * 2**20


@pytest.mark.parametrize("wobble", [0.0, 0.08])
@pytest.mark.parametrize("start", [8, 1000, 40_000])
def test_the_search_for_a_batch_ends_near_the_limit(start: int, wobble: float) -> None:
    """Whatever the start, and though compilers save memory near the limit: tried are few, and never far too many rows."""
    tried: list[int] = []

    def plan_of(rows: int) -> Any:
        tried.append(rows)
        used = 1.0 + rows * 0.01 * (1 - wobble * (rows % 3 == 0))
        if used > 20.0:
            raise DoesNotFit(used, 20.0)
        memory = SimpleNamespace(total=used, limit=20.0, fits=True)
        return SimpleNamespace(rows=rows, memory=memory)

    found = largest_batch(plan_of, start, 8, lambda _: None)
    assert found.rows == max(rows for rows in tried if 1.0 + rows * 0.01 * (1 - wobble * (rows % 3 == 0)) <= 20.0)
    assert len(tried) <= 12
    assert max(tried) <= max(start, 4000)
    if start < 40_000:
        assert found.rows >= 0.9 * 1900


@pytest.mark.slow
def test_the_largest_batch_that_fits_is_found_and_fits(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    wide = dict(BASE) | {"model.layers": "scanned", "model.remat": "full"}
    out, _ = plan(
        *options("data.max_length=512", "train.batch_size=256", base=wide),
        "--topology", "v5e-8", "--fit", "--json", str(tmp_path / "p.json"),
    )  # fmt: skip
    told = json.loads((tmp_path / "p.json").read_text())
    tried = {int(rows): fits == "fit" for rows, fits in re.findall(r"^(\d+) rows: .* GiB (fit|do not fit)$", out, re.M)}
    assert told["rows"] == max(rows for rows, fits in tried.items() if fits)
    assert told["rows"] % 8 == 0
    assert any(not fits and rows <= 1.1 * told["rows"] + 8 for rows, fits in tried.items()) or (
        told["memory_bytes"]["total"] > 0.9 * told["memory_bytes"]["limit"]
    )


@pytest.mark.slow
def test_long_rows_several_on_a_chip_fit_its_vector_memory() -> None:
    """Kernels hold blocks of the next row beside those of this one."""
    pytest.importorskip("libtpu")
    arch = {"max_position_embeddings": 8192, "num_hidden_layers": 2}
    base = SMALL | {"model.family": "modernbert", "model.arch": json.dumps(arch)}
    more = ("data.max_length=8192", "data.packing=best_fit", "train.batch_size=8", "eval.batch_size=8")
    out, _ = plan(*options(*more, base=base), "--topology", "v5e-4")
    assert "attention: splash at 8192 tokens" in out
