"""Kernels and bytes are counted by hand in small programs, in the format of XLA's HLO text."""

import pytest
from compiled_text import parse, size
from gpu_kernels import LAUNCH_SECONDS, Cost, cost_of_pass, cost_of_program

# Bytes take longer than the launch from 2.1 MB on.
BANDWIDTH = 1e12


def cost(text: str) -> Cost:
    return cost_of_program(parse(text), BANDWIDTH)


def test_bytes_of_shapes():
    assert size("f32[8,16]{1,0}") == 4 * 8 * 16
    assert size("bf16[3]{0:S(5)}") == 6
    assert size("pred[]") == 1
    assert size("s4[5]{0:E(4)}") == 3
    assert size("f8e4m3fn[7]") == 7
    assert size("(f32[2]{0}, /*index=1*/(s8[3]{0}, u32[]))") == 8 + 3 + 4
    assert size("(token[], f32[0]{0})") == 0


def test_a_text_without_a_program_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing")


FUSION = """HloModule jit_f, is_scheduled=true

%fused_add (p0: f32[1000], p1: f32[1000]) -> f32[1000] {
  %p0 = f32[1000]{0} parameter(0)
  %p1 = f32[1000]{0} parameter(1)
  %product = f32[1000]{0} multiply(%p0, %p1)
  ROOT %sum = f32[1000]{0} add(%product, %p0)
}

ENTRY %main (x: f32[1000], y: f32[10,100]) -> (f32[1000], f32[10,100]) {
  %x = f32[1000]{0} parameter(0), metadata={op_name="x(1)"}
  %y = f32[10,100]{1,0} parameter(1)
  %flat = f32[1000]{0} bitcast(%y)
  %fusion.1 = f32[1000]{0} fusion(%x, %flat), kind=kLoop, calls=%fused_add
  %copy.2 = f32[10,100]{1,0} copy(%y)
  ROOT %tuple = (f32[1000]{0}, f32[10,100]{1,0}) tuple(%fusion.1, %copy.2)
}
"""


def test_a_fusion_is_one_kernel_that_reads_each_operand_once():
    """The copy is another; views and tuples are none."""
    found = cost(FUSION)
    assert found.kernels == 2
    assert found.bytes == 3 * 4000 + 2 * 4000
    assert found.seconds == pytest.approx(2 * LAUNCH_SECONDS)


def test_a_large_kernel_takes_as_long_as_its_bytes():
    found = cost(FUSION.replace("1000]", "1000000]").replace("10,100]", "1000,1000]"))
    assert found.bytes == 3 * 4_000_000 + 2 * 4_000_000
    assert found.seconds == pytest.approx(20e-6)


LOOPS = """HloModule jit_loops

%inner_body (a: (s32[], f32[4])) -> (s32[], f32[4]) {
  %a = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%a), index=0
  %v = f32[4]{0} get-tuple-element(%a), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %e = f32[4]{0} exponential(%v)
  %n = f32[4]{0} negate(%e)
  ROOT %t = (s32[], f32[4]{0}) tuple(%next, %n)
}

%inner_condition (b: (s32[], f32[4])) -> pred[] {
  %b = (s32[], f32[4]{0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %thirty = s32[] constant(30)
  ROOT %less = pred[] compare(%j, %thirty), direction=LT
}

%outer_body (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %c = (s32[], f32[4]{0}) parameter(0)
  %w = f32[4]{0} get-tuple-element(%c), index=1
  %zero = s32[] constant(0)
  %sine = f32[4]{0} sine(%w)
  %begin = (s32[], f32[4]{0}) tuple(%zero, %sine)
  ROOT %while.1 = (s32[], f32[4]{0}) while(%begin), condition=%inner_condition, body=%inner_body, \
metadata={op_name="while"}, backend_config={"known_trip_count":{"n":"30"}}
}

%outer_condition (d: (s32[], f32[4])) -> pred[] {
  %d = (s32[], f32[4]{0}) parameter(0)
  %k = s32[] get-tuple-element(%d), index=0
  %limit = s32[] constant(9)
  ROOT %unequal = pred[] compare(%k, %limit), direction=NE
}

ENTRY %main (x: f32[4]) -> (s32[], f32[4]) {
  %x = f32[4]{0} parameter(0)
  %nothing = s32[] constant(0)
  %cosine = f32[4]{0} cosine(%x)
  %first = (s32[], f32[4]{0}) tuple(%nothing, %cosine)
  ROOT %while.2 = (s32[], f32[4]{0}) while(%first), condition=%outer_condition, body=%outer_body
}
"""


def test_loops_are_multiplied_by_their_trips():
    """A loop with unknown trips has one, with its condition; one with known trips needs none."""
    inner = 30 * 3
    program = parse(LOOPS)
    assert cost_of_pass(program, BANDWIDTH).kernels == 1 + inner + 1
    assert cost_of_program(program, BANDWIDTH).kernels == 1 + 1 + inner + 1
    inner_bytes = 30 * (8 + 4 + 32 + 32)  # one constant and the number, two vectors twice
    assert cost_of_pass(program, BANDWIDTH).bytes == 32 + inner_bytes + (4 + 4 + 1)


def test_a_program_without_such_a_loop_has_no_pass():
    assert cost_of_pass(parse(FUSION), BANDWIDTH) == Cost(0, 0, 0.0)


PARTS = """HloModule jit_parts

%fused_lookup (table: bf16[1000,64], row: s32[], column: s32[]) -> f32[64] {
  %table = bf16[1000,64]{1,0} parameter(0)
  %row = s32[] parameter(1)
  %column = s32[] parameter(2)
  %view = bf16[1000,1,64]{2,1,0} bitcast(%table)
  %slice = bf16[1,1,64]{2,1,0} dynamic-slice(%view, %row, %column, %column), \
dynamic_slice_sizes={1,1,64}
  %flat = bf16[64]{0} bitcast(%slice)
  ROOT %wide = f32[64]{0} convert(%flat)
}

%fused_write (cache: f32[500,64], value: f32[64], at: s32[]) -> f32[500,64] {
  %cache = f32[500,64]{1,0} parameter(0)
  %value = f32[64]{0} parameter(1)
  %at = s32[] parameter(2)
  %part = f32[1,64]{1,0} bitcast(%value)
  %written = f32[500,64]{1,0} dynamic-update-slice(%cache, %part, %at, %at)
  ROOT %result = f32[500,64]{1,0} bitcast(%written)
}

ENTRY %main (t: bf16[1000,64], c: f32[500,64], i: s32[]) -> (f32[500,64], f32[2,64]) {
  %t = bf16[1000,64]{1,0} parameter(0)
  %c = f32[500,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %looked_up = f32[64]{0} fusion(%t, %i, %i), kind=kLoop, calls=%fused_lookup
  %stored = f32[500,64]{1,0} fusion(%c, %looked_up, %i), kind=kLoop, calls=%fused_write
  %two = f32[2,64]{1,0} slice(%stored), slice={[0:2], [0:64]}
  ROOT %out = (f32[500,64]{1,0}, f32[2,64]{1,0}) tuple(%stored, %two)
}
"""


def test_a_lookup_reads_its_rows_and_an_update_in_place_writes_its_own():
    lookup = 128 + 4 + 4 + 256
    write = 256 + 4 + 256
    part = 512 + 512
    assert cost(PARTS).bytes == lookup + write + part
    assert cost(PARTS).kernels == 3


SCATTER = """HloModule jit_scatter

%fused_scatter (a: f32[900], b: s8[900], at: s32[7,1], c: f32[7], d: s8[7]) -> (f32[900], s8[900]) {
  %a = f32[900]{0} parameter(0)
  %b = s8[900]{0} parameter(1)
  %at = s32[7,1]{1,0} parameter(2)
  %c = f32[7]{0} parameter(3)
  %d = s8[7]{0} parameter(4)
  ROOT %set = (f32[900]{0}, s8[900]{0}) scatter(%a, %b, %at, %c, %d), update_window_dims={}, \
inserted_window_dims={0}, scatter_dims_to_operand_dims={0}, index_vector_dim=1, to_apply=%second
}

ENTRY %main (a: f32[900], b: s8[900], at: s32[7,1], c: f32[7], d: s8[7]) -> (f32[900], s8[900]) {
  %a = f32[900]{0} parameter(0)
  %b = s8[900]{0} parameter(1)
  %at = s32[7,1]{1,0} parameter(2)
  %c = f32[7]{0} parameter(3)
  %d = s8[7]{0} parameter(4)
  ROOT %f = (f32[900]{0}, s8[900]{0}) fusion(%a, %b, %at, %c, %d), kind=kInput, calls=%fused_scatter
}
"""


def test_a_scatter_reads_and_writes_its_updates():
    updates = 28 + 7
    assert cost(SCATTER).bytes == 28 + updates + updates


def test_an_array_that_is_also_read_as_a_whole_counts_once():
    whole = PARTS.replace(
        "  ROOT %wide = f32[64]{0} convert(%flat)\n",
        "  %wide = f32[64]{0} convert(%flat)\n"
        "  %largest = bf16[64]{0} reduce(%table, %row), dimensions={0}, to_apply=%largest_of\n"
        "  ROOT %sum = f32[64]{0} add(%wide, %largest)\n",
    )
    assert cost(whole).bytes - cost(PARTS).bytes == 1000 * 64 * 2 - 128


LIBRARIES = """HloModule jit_libraries

%called (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %t.1 = f32[8,8]{1,0} tanh(%p)
}

%small (p: f32[8,8]) -> f32[8,8] {
  ROOT %q = f32[8,8]{1,0} parameter(0)
}

%large (p: f32[8,8]) -> f32[8,8] {
  %r = f32[8,8]{1,0} parameter(0)
  %r1 = f32[8,8]{1,0} tanh(%r)
  ROOT %r2 = f32[8,8]{1,0} tanh(%r1)
}

ENTRY %main (x: f32[8,8], b: pred[]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %b = pred[] parameter(1)
  %gemm = (f32[8,8]{1,0}, s8[4194304]{0}) custom-call(%x, %x), \
custom_call_target="__cublas$lt$matmul"
  %product = f32[8,8]{1,0} get-tuple-element(%gemm), index=0
  %call = f32[8,8]{1,0} call(%product), to_apply=%called
  %start = ((f32[8,8]), f32[8,8], s32[]) async-start(%call), calls=%called
  %done = f32[8,8]{1,0} async-done(%start)
  ROOT %choice = f32[8,8]{1,0} conditional(%b, %done, %done), branch_computations={%small, %large}
}
"""


def test_libraries_calls_and_branches():
    """A product, a call, an asynchronous call, and the longer branch; no scratch space."""
    found = cost(LIBRARIES)
    assert found.kernels == 1 + 1 + 1 + 2
    assert found.bytes == 3 * 256 + 4 * 512
