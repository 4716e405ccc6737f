"""Copies are counted by hand in a small program, in the format of XLA's HLO text for a TPU."""

import pytest
from compiled_text import array_shapes, parse
from tpu_limits import copied_bytes, frames_per_second

TEXT = """HloModule test

%copies (part: f32[1024,512]) -> f32[1024,512] {
  %part = f32[1024,512]{1,0:T(8,128)} parameter(0)
  ROOT %copy.1 = f32[1024,512]{0,1:T(8,128)} copy(%part)
}

%multiplies (row: f32[1024,512]) -> f32[1024,512] {
  %row = f32[1024,512]{1,0:T(8,128)} parameter(0)
  %inside = f32[1024,512]{1,0:T(8,128)S(1)} fusion(%row), kind=kLoop, calls=%copies
  ROOT %product = f32[1024,512]{1,0:T(8,128)} multiply(%inside, %inside)
}

ENTRY %main (x: f32[1024,512]) -> f32[1024,512] {
  %x = f32[1024,512]{1,0:T(8,128)} parameter(0)
  %fetch = (f32[1024,512]{1,0:T(8,128)S(1)}, f32[1024,512], u32[]) copy-start(%x)
  %fetched = f32[1024,512]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %small = f32[8,128]{1,0:T(8,128)} copy(%x)
  %product = f32[1024,512]{1,0:T(8,128)} fusion(%fetched), kind=kOutput, calls=%multiplies
"""
END = "  ROOT %result = f32[1024,512]{1,0:T(8,128)} add(%product, %product)\n}\n"
ARRAY = 1024 * 512 * 4


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", 0),
        ("  %c = f32[1024,512]{0,1:T(8,128)} copy(%product)\n", ARRAY),
        ("  %c = f32[1024,512]{0,1:T(8,128)} fusion(%product), kind=kLoop, calls=%copies\n", ARRAY),
        (
            "  %c = (f32[1024,512]{1,0:T(8,128)}, f32[1024,512]{1,0:T(8,128)S(1)}, u32[]{:S(2)})"
            " copy-start(%fetched)\n",
            ARRAY,
        ),
    ],
    ids=["none", "copy", "fusion", "back"],
)
def test_copies_of_large_arrays_to_memory_are_counted(line, expected):
    assert copied_bytes(parse(TEXT + line + END)) == expected


def test_arrays_of_a_tuple_keep_their_layouts():
    assert array_shapes("(s8[2,3]{1,0:T(8,128)S(1)}, f32[]{:S(2)})") == [
        "s8[2,3]{1,0:T(8,128)S(1)}",
        "f32[]{:S(2)}",
    ]


def test_the_bound_is_bandwidth_over_bytes():
    assert frames_per_second("v6e:1x1", 820_000_000) == 2000
