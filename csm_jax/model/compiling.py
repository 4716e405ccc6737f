"""Compiling programs before they are needed.

`jit(f).lower(...).compile()` fills the cache that a call of the jitted function looks in, as long
as the arguments have the same shapes, types and places; it needs no memory for them.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from csm_jax.errors import RequestCancelledError

# A jitted function, its positional arguments (or their shapes), and its keyword arguments.
Program = tuple[Any, tuple[Any, ...], dict[str, Any]]

# XLA compiles without Python's lock, one program in a thread.
_MAX_THREADS = 8


def shape_of(array: jax.Array) -> jax.ShapeDtypeStruct:
    """An array's shape, type and place, without its memory."""
    place = array.sharding if array.committed else None
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


def compile_all(
    programs: Iterable[Program], should_stop: Callable[[], bool] = lambda: False
) -> None:
    """Compiles programs side by side; those that were compiled before take no time.

    Args:
      should_stop: asked before each program whether to give up.

    Raises:
      RequestCancelledError: `should_stop` returned True.
    """

    def compile_one(function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if should_stop():
            raise RequestCancelledError("compiling was cancelled")
        function.lower(*arguments, **named).compile()

    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads, "csm_jax.compile") as threads:
        for compiled in [threads.submit(compile_one, *program) for program in programs]:
            compiled.result()
