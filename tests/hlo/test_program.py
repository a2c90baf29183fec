"""Corners of the program text that the compiled programs of the other tests do not reach."""

from __future__ import annotations

import pytest

from jaxft.errors import UserError
from jaxft.planning.hlo.costs import costs_of, where_of
from jaxft.planning.hlo.program import Shape, read_program, shapes_in


def program(body: str, before: str = "", header: str = "num_partitions=8") -> str:
    return f"HloModule m, is_scheduled=true, {header}\n\n{before}\nENTRY %main (p: f32[8,16]) -> f32[8,16] {{\n{body}\n}}\n"


def test_shapes_with_layouts() -> None:
    shapes = shapes_in("(bf16[8,128,1]{2,1,0:T(8,128)(2,1)S(1)}, /*index=1*/u32[]{:S(2)}, s4[3], pred[<=7]{0})")
    assert [(s.dtype, s.dims, s.space) for s in shapes] == [
        ("bf16", (8, 128, 1), 1),
        ("u32", (), 2),
        ("s4", (3,), 0),
        ("pred", (7,), 0),
    ]
    assert [s.bytes for s in shapes] == [2048, 4, 2, 7]


@pytest.mark.parametrize(
    ("dims", "layout", "stored"),
    [
        ((8, 128), "1,0:T(8,128)", 8 * 128 * 4),
        ((3, 64), "1,0:T(8,128)", 8 * 128 * 4),  # both sides round up
        ((3, 64), "0,1:T(8,128)", 64 * 128 * 4),  # the 3 is the minor one
        ((5, 3, 64), "2,1,0:T(4,128)", 5 * 4 * 128 * 4),
        ((100,), "0:T(256)", 256 * 4),
        ((3, 64), "1,0", 3 * 64 * 4),
        ((), ":T(128)", 4),
    ],
)
def test_stored_bytes_count_the_padding_of_tiles(dims: tuple[int, ...], layout: str, stored: int) -> None:
    assert Shape("f32", dims, layout).stored_bytes == stored


def test_bits() -> None:
    names = ("pred", "s4", "u8", "bf16", "f32", "c64", "f8e4m3fn", "token")
    assert [Shape(name, ()).bits for name in names] == [8, 4, 8, 16, 32, 64, 8, 0]


GROUPS = [
    ("{{0,1},{2,3},{4,5},{6,7}}", 2),
    ("{{0,1,2,3,4,5,6,7}}", 8),
    ("{}", 8),
    ("[4,2]<=[8]", 2),
    ("[2,4]<=[4,2]T(1,0)", 4),
    ("mesh['axis_0'=8] {'axis_0'}", 8),
    ("mesh['data'=2,'x'=4] {'x'}", 4),
    ("mesh['data'=2,'x'=4] {'data','x'}", 8),
    ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", 2),
    ("mesh['x'=8] {'x':(1)4}", 4),
]


@pytest.mark.parametrize(("groups", "size"), GROUPS)
def test_replica_groups(groups: str, size: int) -> None:
    body = f"""
  %p = f32[8,16]{{1,0}} parameter(0)
  ROOT %psum.1 = f32[8,16]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add"""
    (one,) = costs_of(program(body, ADD)).collectives
    assert (one.kind, one.group, one.bytes, one.shape, one.dtype) == ("all-reduce", size, 512, (8, 16), "f32")
    assert one.wire_bytes == 2 * (size - 1) / size * 512


ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


@pytest.mark.parametrize(
    ("pairs", "size"), [("{{0,1},{1,2},{2,3}}", 4), ("{{0,1},{1,0},{2,3},{3,2}}", 2), ("{{2,2}}", 1)]
)
def test_permutation(pairs: str, size: int) -> None:
    body = f"""
  %p = f32[8,16]{{1,0}} parameter(0)
  %start = (f32[8,16]{{1,0}}, f32[8,16]{{1,0}}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={pairs}
  ROOT %done = f32[8,16]{{1,0}} collective-permute-done(%start)"""
    (one,) = costs_of(program(body)).collectives
    assert (one.kind, one.count, one.group, one.asynchronous) == ("collective-permute", 1, size, True)
    assert (one.bytes, one.wire_bytes) == (512, 512)


def test_asynchronous_all_gather_counts_its_result_once() -> None:
    body = """
  %p = f32[8,16]{1,0} parameter(0)
  %start = ((f32[8,16]{1,0}), (f32[64,16]{1,0})) all-gather-start(%p), replica_groups=[1,8]<=[8], dimensions={0}
  %done = f32[64,16]{1,0} all-gather-done(%start)
  ROOT %s = f32[8,16]{1,0} slice(%done), slice={[0:8], [0:16]}"""
    (one,) = costs_of(program(body)).collectives
    assert (one.shape, one.bytes, one.wire_bytes, one.asynchronous) == ((64, 16), 4096, 3584, True)


def test_wrapped_asynchronous_collective() -> None:
    wrapped = """
%wrapped (x: f32[8,16]) -> f32[1,16] {
  %x = f32[8,16]{1,0} parameter(0)
  ROOT %rs = f32[1,16]{1,0} reduce-scatter(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
}, execution_thread="other"
"""
    body = """
  %p = f32[8,16]{1,0} parameter(0)
  %start = ((f32[8,16]{1,0}), f32[1,16]{1,0}, u32[]) async-start(%p), async_execution_thread="other", calls=%wrapped
  %done = f32[1,16]{1,0} async-done(%start)
  ROOT %b = f32[8,16]{1,0} broadcast(%done), dimensions={0,1}"""
    (one,) = costs_of(program(body, ADD + wrapped)).collectives
    assert (one.kind, one.bytes, one.wire_bytes, one.asynchronous) == ("reduce-scatter", 512, 448, True)


SPREAD = 'backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}'
GATHER = "all-gather(%x), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, " + SPREAD
ASYNC_FUSIONS = f"""
%begin (x: f32[8,16]) -> (f32[8,16], f32[64,16], u32[]) {{
  %x = f32[8,16]{{1,0}} parameter(0)
  %g.1 = f32[64,16]{{1,0}} {GATHER}
  ROOT %c.1 = (f32[8,16]{{1,0}}, f32[64,16]{{1,0}}, u32[]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}}

%beside (x: f32[8,16], l: f32[8,16]) -> (f32[8,8], f32[64,16]) {{
  %x = f32[8,16]{{1,0}} parameter(0)
  %g.2 = f32[64,16]{{1,0}} {GATHER}
  %l = f32[8,16]{{1,0}} parameter(1)
  %m = f32[8,8]{{1,0}} convolution(%l, %l), dim_labels=bf_oi->bf
  ROOT %t = (f32[8,8]{{1,0}}, f32[64,16]{{1,0}}) tuple(%m, %g.2)
}}

%finish (x: f32[8,16]) -> f32[64,16] {{
  %x = f32[8,16]{{1,0}} parameter(0)
  %g.3 = f32[64,16]{{1,0}} {GATHER}
  ROOT %c.3 = f32[64,16]{{1,0}} custom-call(%x, %g.3), custom_call_target="AsyncCollectiveDone"
}}

%scatter (y: f32[8,16]) -> f32[1,16] {{
  %y = f32[8,16]{{1,0}} parameter(0)
  %r = f32[8,16]{{1,0}} all-reduce(%y), channel_id=6, replica_groups={{{{0,1,2,3,4,5,6,7}}}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[1,16]{{1,0}} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={{1,16}}
}}
"""


def test_collectives_that_tpu_fuses() -> None:
    # A gather that runs beside a matmul appears three times, and is one; an all-reduce sliced at once is a reduce-scatter.
    body = """
  %p = f32[8,16]{1,0} parameter(0)
  %a = (f32[8,16]{1,0}, f32[64,16]{1,0}, u32[]) fusion(%p), kind=kCustom, calls=%begin
  %b = (f32[8,8]{1,0}, f32[64,16]{1,0}) fusion(%p, %p), kind=kOutput, calls=%beside
  %c = f32[64,16]{1,0} fusion(%p), kind=kCustom, calls=%finish
  %d = f32[1,16]{1,0} fusion(%p), kind=kCustom, calls=%scatter, metadata={op_name="jit(step)/jvp()/mean"}
  ROOT %s = f32[8,16]{1,0} slice(%c), slice={[0:8], [0:16]}"""
    costs = costs_of(program(body, ADD + ASYNC_FUSIONS))
    gather, scatter = sorted(costs.collectives, key=lambda c: c.kind)
    assert (gather.kind, gather.count, gather.bytes, gather.asynchronous) == ("all-gather", 1, 4096, True)
    assert (scatter.kind, scatter.bytes, scatter.wire_bytes, scatter.asynchronous) == (
        "reduce-scatter",
        512,
        448,
        False,
    )
    assert scatter.where == "jvp()/mean"
    assert costs.matmul_flops == 2 * 8 * 8 * 16
    assert costs.unpriced == ()


LOOP = """
%cond (s: (s32[], f32[8,16], s32[])) -> pred[] {{
  %s = (s32[], f32[8,16]{{1,0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %end = s32[] get-tuple-element(%s), index=2
  ROOT %go = pred[] compare(%i, %end), direction={direction}
}}

%body (t: (s32[], f32[8,16], s32[])) -> (s32[], f32[8,16], s32[]) {{
  %t = (s32[], f32[8,16]{{1,0}}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %step = s32[] constant({step})
  %next = s32[] add(%j, %step)
  %x = f32[8,16]{{1,0}} get-tuple-element(%t), index=1
  %m = f32[16,16]{{1,0}} dot(%x, %x), lhs_contracting_dims={{0}}, rhs_contracting_dims={{0}}
  %last = s32[] get-tuple-element(%t), index=2
  ROOT %r = (s32[], f32[8,16]{{1,0}}, s32[]) tuple(%next, %x, %last)
}}
"""


@pytest.mark.parametrize(
    ("start", "end", "step", "direction", "trips"),
    [(0, 7, 1, "LT", 7), (1, 8, 2, "LE", 4), (9, 0, -3, "GT", 3), (0, 10, 5, "NE", 2), (3, 3, 1, "LT", 0)],
)
def test_trips_by_running_the_counter(start: int, end: int, step: int, direction: str, trips: int) -> None:
    body = f"""
  %p = f32[8,16]{{1,0}} parameter(0)
  %start = s32[] constant({start})
  %copied = s32[] copy(%start)
  %end.1 = s32[] constant({end})
  %init = (s32[], f32[8,16]{{1,0}}, s32[]) tuple(%copied, %p, %end.1)
  %while = (s32[], f32[8,16]{{1,0}}, s32[]) while(%init), condition=%cond, body=%body
  ROOT %out = f32[8,16]{{1,0}} get-tuple-element(%while), index=1"""
    costs = costs_of(program(body, LOOP.format(step=step, direction=direction)))
    assert costs.matmul_flops == 2 * 16 * 16 * 8 * trips
    assert costs.unknown_trips == ()


def test_loop_that_depends_on_data_is_told() -> None:
    body = """
  %p = f32[8,16]{1,0} parameter(0)
  %start = s32[] constant(0)
  %end.1 = s32[] custom-call(%p), custom_call_target="Length"
  %init = (s32[], f32[8,16]{1,0}, s32[]) tuple(%start, %p, %end.1)
  %while.3 = (s32[], f32[8,16]{1,0}, s32[]) while(%init), condition=%cond, body=%body
  ROOT %out = f32[8,16]{1,0} get-tuple-element(%while.3), index=1"""
    costs = costs_of(program(body, LOOP.format(step=1, direction="LT")))
    assert costs.unknown_trips == ("while.3",)
    assert costs.matmul_flops == 2 * 16 * 16 * 8
    assert costs.unpriced == ("end.1 (Length)",)


CONVOLUTIONS = [
    # A matmul, the way TPU writes it.
    ("f32[8,16]", "f32[16,32]", "f32[8,32]", "dim_labels=bf_io->bf", 8 * 16 * 32),
    # One axis of 10, kernel of 3, same padding: the two outputs at the ends miss one product each.
    ("f32[1,10,4]", "f32[3,4,5]", "f32[1,10,5]", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 28 * 4 * 5),
    # Eight products of [6, 16] and [16, 32]: the batch is an axis of which each output meets one element.
    (
        "f32[6,8,16]",
        "f32[8,16,32]",
        "f32[6,8,32]",
        "window={size=8 stride=7 lhs_dilate=8}, dim_labels=b0f_0io->b0f",
        8 * 6 * 16 * 32,
    ),
    (
        "f32[2,9,6]",
        "f32[3,1,6]",
        "f32[2,7,6]",
        "window={size=3}, dim_labels=b0f_0io->b0f, feature_group_count=6",
        2 * 7 * 3 * 6,
    ),
]


@pytest.mark.parametrize(("left", "right", "out", "attributes", "products"), CONVOLUTIONS)
def test_convolution_flops(left: str, right: str, out: str, attributes: str, products: int) -> None:
    body = f"""
  %p = {left} parameter(0)
  %k = {right} parameter(1)
  ROOT %c = {out} convolution(%p, %k), {attributes}"""
    assert costs_of(program(body)).matmul_flops == 2 * products


def test_estimates_and_operations_without() -> None:
    estimated = 'backend_config={"window_config":{"estimated_cycles":"500","iteration_bounds":["8"]}}'
    body = f"""
  %p = f32[8,16]{{1,0}} parameter(0)
  %a = f32[8,16]{{1,0}} custom-call(), custom_call_target="AllocateBuffer"
  %k = f32[8,16]{{1,0}} custom-call(%p, %a), custom_call_target="tpu_custom_call", backend_config={{"body":"a)\\"}}("}}
  %n = s32[] constant(3)
  %sort = f32[8,16]{{1,0}} sort(%k), dimensions={{1}}, to_apply=%add
  ROOT %e = f32[8,16]{{1,0}} exponential(%sort), {estimated}"""
    costs = costs_of(program(body, ADD))
    assert costs.estimated_cycles == 500
    assert costs.unpriced == ("k (tpu_custom_call)", "sort (sort)")


def test_matrix_constants_over_several_lines() -> None:
    body = """
  %c = s32[2,2]{1,0} constant({
    { 1, 2 },
    { 3, 4 }
  })
  ROOT %p = f32[8,16]{1,0} parameter(0)"""
    ops = read_program(program(body)).entry.ops
    assert list(ops) == ["c", "p"]
    assert "{ 3, 4 }" in ops["c"].inside


def test_metadata_of_pallas_kernels_goes_over_lines() -> None:
    body = """
  %p = f32[8,16]{1,0} parameter(0)
  %k = f32[8,16]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 1024, \\"f(\\": 1}"
}}, metadata={op_name="jit(f)/pallas_call" stack_frame_id=5}
  ROOT %e = f32[8,16]{1,0} exponential(%k)"""
    ops = read_program(program(body)).entry.ops
    assert list(ops) == ["p", "k", "e"]
    assert (ops["k"].target, ops["k"].op_name) == ("tpu_custom_call", "jit(f)/pallas_call")


def test_where_is_short() -> None:
    path = "jit(step)/transpose(jvp())/while/body/closed_call/" + "x" * 100
    body = f"""
  ROOT %p = f32[8,16]{{1,0}} parameter(0), metadata={{op_name="{path}" stack_frame_id=3}}"""
    where = where_of(read_program(program(body)).entry.ops["p"])
    assert len(where) == 80
    assert where.endswith("x")


@pytest.mark.parametrize(
    "text", ["", "HloModule m\n", "module @jit_f {\n}\n", program("  ROOT %p = f32[8 parameter(0")]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        read_program(text)
