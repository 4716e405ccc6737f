"""Counts the kernels of a program that was compiled for a GPU, and the bytes that they move.

The source is the text of the compiled program (`compiled.as_text()`), where every instruction
outside a fusion is a kernel, a copy, or nothing at run time.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from compiled_text import NAME, Instruction, Program, called_by, size

# Seconds from one kernel to the next if they have nothing to do, in a CUDA graph or not. From the
# one frame that was measured, on an H200: 8.8 ms for 3742 kernels, of which 420, the products of
# large matrices, take 1.8 ms for their bytes.
LAUNCH_SECONDS = 2.1e-6

_NO_KERNEL = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
# What reads as much of its first operand as it returns.
_READS_A_PART = {"dynamic-slice", "gather", "slice"}

_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"\bcondition=%([^\s,{}]+), body=%([^\s,{}]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Memory without content.
_ALLOCATES = 'custom_call_target="AllocateBuffer"'
# What a kernel in Pallas says of itself (`csm_jax.model.kernels.launch`).
_STATED_BYTES = re.compile(r"bytes_moved\\22: \\22(\d+)")
# Space for the libraries' own use, which they return beside the result.
_SCRATCH = re.compile(r", [su]8\[\d+\]\{0\}\)$")


@dataclass(frozen=True)
class Cost:
    """What a program does on a card.

    Attributes:
      kernels: launches, of copies also.
      bytes: read from memory and written to it.
      seconds: a lower bound, of launches and bytes; arithmetic counts as nothing.
    """

    kernels: int
    bytes: int
    seconds: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.kernels + other.kernels, self.bytes + other.bytes, self.seconds + other.seconds
        )

    def times(self, count: int) -> "Cost":
        """The cost of so many runs."""
        return Cost(self.kernels * count, self.bytes * count, self.seconds * count)


NOTHING = Cost(0, 0, 0.0)


def cost_of_program(program: Program, bandwidth: float) -> Cost:
    """The cost of one call. A loop whose trips are not known to the compiler is run once.

    Args:
      bandwidth: of the card's memory, bytes/s.
    """
    return _cost(program, program.entry, bandwidth)


def cost_of_pass(program: Program, bandwidth: float) -> Cost:
    """The cost of one pass of the loops in ENTRY whose trips are not known to the compiler."""
    loops = [
        _cost_of_instruction(program, {}, instruction, bandwidth)
        for instruction in program.computations[program.entry]
        if instruction.opcode == "while" and not _TRIPS.search(instruction.attributes)
    ]
    return sum(loops, NOTHING)


def _cost(program: Program, computation: str, bandwidth: float) -> Cost:
    instructions = program.computations[computation]
    by_name = {instruction.name: instruction for instruction in instructions}
    costs = (
        _cost_of_instruction(program, by_name, instruction, bandwidth)
        for instruction in instructions
    )
    return sum(costs, NOTHING)


def _cost_of_instruction(
    program: Program, around: dict[str, Instruction], instruction: Instruction, bandwidth: float
) -> Cost:
    """The cost of an instruction of the computation `around`."""
    opcode, attributes = instruction.opcode, instruction.attributes
    if opcode in _NO_KERNEL or opcode.endswith(("-done", "-update")) or _ALLOCATES in attributes:
        return NOTHING
    if opcode == "while":
        condition, body = (_cost(program, name, bandwidth) for name in _loop(instruction))
        trips = _TRIPS.search(attributes)
        # With known trips, the loop runs without its condition.
        return body.times(int(trips[1])) if trips else condition + body
    called = called_by(instruction)
    if opcode == "conditional":
        branches = _BRANCHES.search(attributes)
        names = NAME.findall(branches[1]) if branches else called
        return max(
            (_cost(program, name, bandwidth) for name in names), key=lambda cost: cost.seconds
        )
    if opcode in ("call", "async-start"):
        return _cost(program, called[0], bandwidth)
    stated = _STATED_BYTES.search(attributes)
    moved = int(stated[1]) if stated else sum(_bytes_moved(program, around, instruction))
    return Cost(1, moved, max(LAUNCH_SECONDS, moved / bandwidth))


def _loop(instruction: Instruction) -> tuple[str, str]:
    found = _LOOP.search(instruction.attributes)
    if found is None:
        raise ValueError(f"the loop {instruction.name} has no condition and body")
    return found[1], found[2]


def _bytes_moved(
    program: Program, around: dict[str, Instruction], instruction: Instruction
) -> Iterator[int]:
    """Bytes that a kernel reads of each operand, and then those that it writes."""
    operands = [around[name] for name in instruction.operands]
    if instruction.opcode == "fusion":
        inside = program.computations[called_by(instruction)[0]]
    else:
        # As if the instruction were the only one of a fusion.
        inside = [
            *(
                Instruction(operand.name, operand.shape, "parameter", (), "", False)
                for operand in operands
            ),
            instruction._replace(is_root=True),
        ]
    for parameter in (each for each in inside if each.opcode == "parameter"):
        yield _bytes_read(inside, parameter)
    by_name = {each.name: each for each in inside}
    for result in _results(by_name, next(each for each in inside if each.is_root)):
        yield _bytes_written(by_name, result)


def _bytes_read(inside: list[Instruction], parameter: Instruction) -> int:
    """Of all that is read of an array, or all of it where that is less."""
    read = 0
    for use in inside:
        for position, name in enumerate(use.operands):
            if name == parameter.name:
                read += _bytes_read_by(inside, use, position, size(parameter.shape))
    return min(read, size(parameter.shape))


def _bytes_read_by(inside: list[Instruction], use: Instruction, position: int, whole: int) -> int:
    if use.opcode == "bitcast":
        return _bytes_read(inside, use)
    if use.opcode in _READS_A_PART and position == 0:
        return size(use.shape)
    # What is updated in place is not read.
    return 0 if position < _updated_in_place(use) else whole


def _updated_in_place(instruction: Instruction) -> int:
    """How many operands, from the first one on, the instruction changes a part of."""
    if instruction.opcode == "scatter":  # as many arrays, the indices, and as many updates
        return len(instruction.operands) // 2
    return 1 if instruction.opcode == "dynamic-update-slice" else 0


def _results(by_name: dict[str, Instruction], root: Instruction) -> list[Instruction]:
    if root.opcode == "tuple":
        return [by_name[name] for name in root.operands]
    return [root]


def _bytes_written(by_name: dict[str, Instruction], result: Instruction) -> int:
    while result.opcode == "bitcast":
        result = by_name[result.operands[0]]
    if updated := _updated_in_place(result):
        # The parts follow the arrays, those of a scatter after the indices.
        begin = updated + (result.opcode == "scatter")
        return sum(size(by_name[name].shape) for name in result.operands[begin:][:updated])
    if result.opcode == "custom-call":
        return size(_SCRATCH.sub(")", result.shape))
    return size(result.shape)
