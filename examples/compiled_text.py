"""The text of a compiled program, `compiled.as_text()`: XLA's HLO format, for any platform."""

import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"\s*(?P<root>ROOT )?%(?P<name>\S+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][a-z0-9-]*)\("
)
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%([^\s,{}]+)")
NAME = re.compile(r"%([^\s,(){}]+)")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_ARRAY_WITH_LAYOUT = re.compile(_ARRAY.pattern + r"(\{[^}]*\})?")


class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
      shape: as it stands in the text.
      operands: names.
      attributes: what follows the operands.
      is_root: whether it is what the computation returns.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


class Program(NamedTuple):
    """Instructions by the name of their computation, and the name of the one that is run."""

    computations: dict[str, list[Instruction]]
    entry: str


def parse(text: str) -> Program:
    """The program of a text in XLA's HLO format."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if (heading := _COMPUTATION.match(line)) and not line.startswith(" "):
            current = computations.setdefault(heading["name"], [])
            entry = heading["name"] if heading["entry"] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_instruction(found, line))
    if not entry:
        raise ValueError("the text has no ENTRY computation, so it is not a program in HLO")
    return Program(computations, entry)


def _instruction(found: re.Match[str], line: str) -> Instruction:
    operands, attributes = _split_at_closing(line[found.end() :])
    return Instruction(
        found["name"],
        found["shape"],
        found["opcode"],
        tuple(NAME.findall(operands)),
        attributes,
        bool(found["root"]),
    )


def _split_at_closing(text: str) -> tuple[str, str]:
    """The text before and after the parenthesis that closes one opened before it."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return text[:index], text[index + 1 :]
    raise ValueError(f"the operands of an instruction do not end: {text[:80]}")


def called_by(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs, other than those of loops and of branches."""
    return _CALLED.findall(instruction.attributes)


def size(shape: str) -> int:
    """Bytes of an array or of a tuple of arrays, such as `(f32[8]{0}, bf16[2,4]{1,0})`."""
    return sum(_array_bytes(*found.groups()) for found in _ARRAY.finditer(shape))


def array_shapes(shape: str) -> list[str]:
    """The arrays of a tuple, or the one array, each with its layout."""
    return [found[0] for found in _ARRAY_WITH_LAYOUT.finditer(shape)]


def _array_bytes(kind: str, bits: str, dimensions: str) -> int:
    count = 1
    for dimension in dimensions.split(","):
        count *= int(dimension or 1)
    width = {"pred": 8, "token": 0, "opaque": 0}.get(kind) if not bits else int(bits)
    if width is None:
        raise ValueError(f"the size of the type {kind} is not known")
    return -(-count * width // 8)
