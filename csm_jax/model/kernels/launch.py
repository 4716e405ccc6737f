"""How kernels are launched."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Whether XLA runs the bodies of the kernels as ordinary operations, on any device: for tests.
INTERPRET = False

_STAGES = 3


def launch(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    outputs: Any,
    *inputs: Any,
    in_place: int = 0,
    bytes_moved: int | None = None,
    num_warps: int = 4,
    **static: Any,
) -> Any:
    """Runs a kernel.

    Args:
      kernel: is given references to the inputs and then to the outputs, and `static` by name.
      grid: programs along each axis.
      outputs: shapes, a tree.
      inputs: arrays or trees of them.
      in_place: how many of the first input arrays are also the last outputs.
      bytes_moved: read and written, where that is not all of the inputs and outputs; it stands in
        the compiled program (`examples/gpu_kernels.py` reads it).
      num_warps: of a program.
    """
    num_outputs = len(jax.tree.leaves(outputs))
    aliases = {index: num_outputs - in_place + index for index in range(in_place)}
    call = pl.pallas_call(
        functools.partial(kernel, **static),
        grid=grid,
        out_shape=outputs,
        input_output_aliases=aliases,
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=_STAGES),
        interpret=INTERPRET,
        name=kernel.__name__.strip("_"),
        metadata=None if bytes_moved is None else {"bytes_moved": str(bytes_moved)},
    )
    return call(*inputs)


def size_of(*trees: Any) -> int:
    """Bytes of arrays or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))


def shape_of(x: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape and type of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
