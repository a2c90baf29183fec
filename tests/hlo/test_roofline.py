"""Rooflines of small programs, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from jaxft.errors import UserError
from jaxft.planning.hlo.costs import costs_of
from jaxft.planning.hlo.roofline import OpBound, Peaks, roofline_of

# Round numbers: seconds are bytes, or FLOPs over 1000, 100 or 10.
PEAKS = Peaks(bf16=1000.0, tf32=100.0, float32=10.0, bytes_per_second=1.0)


def bounds(text: str) -> dict[str, OpBound]:
    return {op.name: op for op in roofline_of(text, PEAKS).ops}


def program(body: str, *computations: str) -> str:
    return "\n".join(["HloModule m", *computations, "ENTRY %main (x: f32[2]) -> f32[2] {", body, "}", ""])


def dot(dtype: str, more: str = "") -> str:
    return program(f"""
  %a = {dtype}[8,4]{{1,0}} parameter(0)
  %b = {dtype}[4,16]{{1,0}} parameter(1)
  ROOT %d = {dtype}[8,16]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}{more}""")


@pytest.mark.parametrize(
    ("text", "seconds", "by_matmul"),
    [
        (dot("bf16"), 2 * (8 * 4 + 4 * 16 + 8 * 16), False),  # 448 bytes, 1.024 s of products
        (dot("f32"), 4 * (8 * 4 + 4 * 16 + 8 * 16), False),  # 10.24 s, 896 bytes
        (dot("f32", ", operand_precision={highest,highest}"), 4 * (8 * 4 + 4 * 16 + 8 * 16), False),
    ],
)
def test_a_small_product_waits_for_memory(text: str, seconds: float, by_matmul: bool) -> None:
    found = bounds(text)["d"]
    assert (found.seconds, found.by_matmul) == (seconds, by_matmul)


@pytest.mark.parametrize(
    ("dtype", "more", "peak"),
    [
        ("bf16", "", 1000.0),
        ("f32", "", 100.0),
        ("f32", ", operand_precision={highest,highest}", 10.0),
    ],
)
def test_a_large_product_runs_at_the_peak_for_its_operands(dtype: str, more: str, peak: float) -> None:
    fast = Peaks(PEAKS.bf16, PEAKS.tf32, PEAKS.float32, bytes_per_second=1e9)
    (found,) = roofline_of(dot(dtype, more), fast).ops
    assert found.seconds == 2 * 8 * 4 * 16 / peak
    assert found.by_matmul


SLICED = """%fused (p0: f32[1000], p1: s32[], p2: f32[100]) -> f32[100] {
  %p0 = f32[1000]{0} parameter(0)
  %rows = f32[10,100]{1,0} bitcast(%p0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,100]{1,0} dynamic-slice(%rows, %p1, %zero), dynamic_slice_sizes={1,100}
  %flat = f32[100]{0} bitcast(%row)
  %p2 = f32[100]{0} parameter(2)
  ROOT %sum = f32[100]{0} add(%flat, %p2)
}"""


def test_a_fusion_reads_of_what_it_slices_only_the_slice() -> None:
    text = program(
        """
  %x = f32[1000]{0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[100]{0} parameter(2)
  ROOT %f = f32[100]{0} fusion(%x, %i, %y), kind=kLoop, calls=%fused""",
        SLICED,
    )
    assert bounds(text)["f"].seconds == 400 + 4 + 400 + 400  # one row of ten, the index, the other operand, the result


UPDATED = """%fused (p0: f32[1000], p1: f32[100], p2: s32[]) -> f32[1000] {
  %p0 = f32[1000]{0} parameter(0)
  %rows = f32[10,100]{1,0} bitcast(%p0)
  %p1 = f32[100]{0} parameter(1)
  %row = f32[1,100]{1,0} bitcast(%p1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %new = f32[10,100]{1,0} dynamic-update-slice(%rows, %row, %p2, %zero)
  ROOT %flat = f32[1000]{0} bitcast(%new)
}"""
CALL = """
  %x = f32[1000]{0} parameter(0)
  %y = f32[100]{0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[1000]{0} fusion(%x, %y, %i), kind=kLoop, calls=%fused"""


def test_an_update_in_place_writes_only_the_part() -> None:
    assert bounds(program(CALL, UPDATED))["f"].seconds == 0 + 400 + 4 + 400


def test_an_update_of_what_the_fusion_makes_writes_everything() -> None:
    made = UPDATED.replace("bitcast(%p0)", "add(%p0, %p0)")
    assert bounds(program(CALL, made))["f"].seconds == 4000 + 400 + 4 + 4000


def test_a_scatter_reads_and_writes_what_it_adds_to() -> None:
    text = program("""
  %x = f32[10,100]{1,0} parameter(0)
  %i = s32[2,1]{1,0} parameter(1)
  %y = f32[2,100]{1,0} parameter(2)
  ROOT %f = f32[10,100]{1,0} scatter(%x, %i, %y), update_window_dims={1}, to_apply=%sum""")
    assert (
        bounds(text)["f"].seconds == 800 + 8 + 800 + 800
    )  # two rows of ten, where they are, what is added, the rows again


def test_what_is_started_counts_once_and_what_is_awaited_nothing() -> None:
    text = program(
        """
  %x = f32[1000]{0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[100]{0} parameter(2)
  %s = ((f32[1000]{0}, s32[], f32[100]{0}), f32[100]{0}, u32[]) fusion-start(%x, %i, %y), kind=kLoop, calls=%fused
  ROOT %f = f32[100]{0} fusion-done(%s)""",
        SLICED,
    )
    assert {name: one.seconds for name, one in bounds(text).items()} == {"s": 1204}


LOOP = """%body (s: (s32[], f32[100])) -> (s32[], f32[100]) {
  %s = (s32[], f32[100]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %v = f32[100]{0} get-tuple-element(%s), index=1
  %double = f32[100]{0} add(%v, %v)
  ROOT %t = (s32[], f32[100]{0}) tuple(%next, %double)
}
%condition (s: (s32[], f32[100])) -> pred[] {
  %s = (s32[], f32[100]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %end = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}"""


def test_a_loop_counts_as_often_as_it_runs() -> None:
    text = program(
        """
  %x = f32[100]{0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[100]{0}) tuple(%zero, %x)
  ROOT %w = (s32[], f32[100]{0}) while(%t), condition=%condition, body=%body""",
        LOOP,
    )
    found = roofline_of(text, PEAKS)
    (double,) = (op for op in found.ops if op.name == "double")
    assert (double.times, double.seconds) == (7, 400 + 400)  # read once, though it stands there twice
    assert found.seconds == 7 * (800 + 12)  # and the counter: two read, one written


def attention(target: str, outputs: str, mask: str) -> str:
    config = (
        '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "16", "16"]}, '
        f'"mask_type": "{mask}", "sliding_window_length": 0'
    )
    return program(
        f"""
  %q = bf16[2,16,4,8]{{3,2,1,0}} parameter(0)
  %k = bf16[2,16,4,8]{{3,2,1,0}} parameter(1)
  %v = bf16[2,16,4,8]{{3,2,1,0}} parameter(2)
  ROOT %c = ({outputs}, u8[0]{{0}}) custom-call(%q, %k, %v), custom_call_target="{target}", """
        + (f'backend_config={{"cudnn_fmha_backend_config": {{{config}}}}}')
    )


FORWARDS = ("__cudnn$fmhaSoftmax", "bf16[2,4,16,8]{3,1,2,0}, f32[2,4,16]{2,1,0}")
BACKWARDS = ("__cudnn$fmhaSoftmaxBackward", ", ".join(["bf16[2,4,16,8]{3,1,2,0}"] * 3))


@pytest.mark.parametrize(
    ("call", "mask", "flops"),
    [
        (FORWARDS, "NO_MASK", 2 * 2 * 2 * 4 * 16 * 16 * 8),  # two products of 2 rows, 4 heads, 16 x 16 pairs, size 8
        (FORWARDS, "CAUSAL", 2 * 2 * 4 * 16 * 16 * 8),
        (BACKWARDS, "NO_MASK", 5 * 2 * 2 * 4 * 16 * 16 * 8),
    ],
)
def test_attention_of_cudnn_is_two_products_and_five_backwards(call: tuple[str, str], mask: str, flops: float) -> None:
    text = attention(*call, mask)
    assert costs_of(text).matmul_flops == flops
    found = roofline_of(text, Peaks(1000.0, 1.0, 1.0, bytes_per_second=1e9))
    assert found.seconds == flops / 1000
    assert found.opaque == ()
    one = 2 * 16 * 4 * 8 * 2  # bytes of the queries
    assert bounds(text)["c"].seconds == max(flops / 1000, 3 * one + (one + 512 if call is FORWARDS else 3 * one))


@pytest.mark.parametrize(
    ("dtype", "precision", "peak"),
    [("bf16", "DEFAULT", 1000.0), ("f32", "DEFAULT", 100.0), ("f32", "HIGHEST", 10.0)],
)
def test_a_product_of_cublas_counts_like_a_dot(dtype: str, precision: str, peak: float) -> None:
    dims = '{"lhs_contracting_dimensions": ["1"], "rhs_contracting_dimensions": ["0"]}'
    asked = f'{{"operand_precision":["{precision}","{precision}"]}}'
    config = f'{{"gemm_backend_config": {{"dot_dimension_numbers": {dims}, "precision_config": {asked}}}}}'
    text = program(
        f"""
  %a = {dtype}[8,4]{{1,0}} parameter(0)
  %b = {dtype}[4,16]{{1,0}} parameter(1)
  ROOT %c = ({dtype}[8,16]{{1,0}}, s8[1000]{{0}}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", """
        + (f'metadata={{op_name="jit(f)/high/dot"}}, backend_config={config}')
    )
    assert costs_of(text).matmul_flops == 2 * 8 * 4 * 16
    assert roofline_of(text, PEAKS).opaque == ()
    assert bounds(text)["c"].seconds == (2 if dtype == "bf16" else 4) * (
        8 * 4 + 4 * 16 + 8 * 16
    )  # without the workspace
    (found,) = roofline_of(text, Peaks(PEAKS.bf16, PEAKS.tf32, PEAKS.float32, bytes_per_second=1e9)).ops
    assert found.seconds == 2 * 8 * 4 * 16 / peak


def test_of_other_calls_the_bytes_count_and_they_are_named() -> None:
    text = program("""
  %a = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} custom-call(%a), custom_call_target="mosaic_gpu" """)
    found = roofline_of(text, PEAKS)
    assert found.seconds == 64
    assert found.opaque == ("c (mosaic_gpu)",)


def test_exchanges_are_priced_elsewhere() -> None:
    text = program("""
  %a = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%sum""")
    assert roofline_of(text, PEAKS).ops == ()


def test_what_runs_beside_an_exchange() -> None:
    text = program("""
  %a = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[64]{0}) all-gather-start(%a), replica_groups=[1,8]<=[8], dimensions={0}
  %one = f32[8]{0} negate(%a)
  %r = f32[8]{0} all-reduce-start(%one), replica_groups=[1,8]<=[8], to_apply=%sum
  %two = f32[8]{0} negate(%one)
  %g = f32[64]{0} all-gather-done(%s)
  %q = f32[8]{0} all-reduce-done(%r)
  ROOT %t = (f32[64]{0}, f32[8]{0}, f32[8]{0}) tuple(%g, %q, %two)""")
    assert roofline_of(text, PEAKS).beside == {"s": 64 + 64, "r": 64}


def test_what_runs_beside_an_exchange_in_a_loop_is_of_one_turn() -> None:
    body = LOOP.replace(
        "  %double = f32[100]{0} add(%v, %v)\n",
        "  %s1 = ((f32[100]{0}), f32[100]{0}) all-reduce-start(%v), replica_groups=[1,8]<=[8], to_apply=%sum\n"
        "  %double = f32[100]{0} add(%v, %v)\n"
        "  %e1 = f32[100]{0} all-reduce-done(%s1)\n",
    )
    text = program(
        """
  %x = f32[100]{0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[100]{0}) tuple(%zero, %x)
  ROOT %w = (s32[], f32[100]{0}) while(%t), condition=%condition, body=%body""",
        body,
    )
    assert roofline_of(text, PEAKS).beside == {"s1": 800}


def test_only_programs() -> None:
    with pytest.raises(UserError, match="not the text of a compiled program"):
        roofline_of("hello", PEAKS)
