"""What limits a frame on a TPU: the bytes that it reads, and those that its program copies."""

from collections.abc import Iterator

from compiled_text import Instruction, Program, array_shapes, called_by, size

# Bytes a second of a chip's memory, from its data sheet.
BANDWIDTH = {"v5e": 819e9, "v6e": 1640e9}
# Smaller copies are of activations.
_LARGE = 1 << 20
_COPIES = {"copy", "copy-start"}
# The place of an array in a chip's vector memory, in its layout.
_VECTOR_MEMORY = "S(1)"


def frames_per_second(topology: str, num_bytes: int) -> float:
    """The frames of every row in a second, if reading so many bytes each were all that takes time.

    Args:
      topology: such as "v5e:1x1"; the bytes are those of one chip.
    """
    return BANDWIDTH[topology.partition(":")[0]] / num_bytes


def copied_bytes(program: Program) -> int:
    """Bytes that the instructions which copy large arrays write to a chip's memory.

    What is fetched into vector memory is not counted, because it has to be read in any case.
    """
    copies = (
        array_shapes(each.shape)[0] for each in _run(program) if _opcode(program, each) in _COPIES
    )
    return sum(size(to) for to in copies if _VECTOR_MEMORY not in to and size(to) >= _LARGE)


def _run(program: Program) -> Iterator[Instruction]:
    """The instructions outside of fusions, each of which writes its result to a memory."""
    everything = [each for body in program.computations.values() for each in body]
    fused = {name for each in everything if each.opcode == "fusion" for name in called_by(each)}
    for name, body in program.computations.items():
        if name not in fused:
            yield from body


def _opcode(program: Program, instruction: Instruction) -> str:
    """What an instruction does; of a fusion, what it does last."""
    if instruction.opcode != "fusion":
        return instruction.opcode
    inside = program.computations[called_by(instruction)[0]]
    return next(each.opcode for each in inside if each.is_root)
