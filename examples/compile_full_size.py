"""How long XLA takes to compile the full-size model. Needs no weights, only their shapes.

    python examples/compile_full_size.py [--dtype=bfloat16]

Prints a JSON line per program: prefill of a 256-position prompt, and the frame loop after it.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import csm_jax
from csm_jax.checkpoint import param_shapes
from csm_jax.generation import prefill, run_frames
from csm_jax.sampling import Sampling, SamplingParams

PROMPT_LENGTH, CACHE_LENGTH = 256, 512


def report(name: str, lower: Callable[[], jax.stages.Lowered]) -> object:
    """Prints the times of one program, and returns the shapes of what it computes."""
    started = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    lowered.compile()
    compiled = time.perf_counter()
    times = {"trace_s": traced - started, "compile_s": compiled - traced}
    print(json.dumps({"program": name} | {key: round(s, 2) for key, s in times.items()}))
    return lowered.out_info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    dtype = jnp.dtype(parser.parse_args().dtype)
    config = csm_jax.csm_1b()
    params = param_shapes(config, dtype)["csm"]

    def shape(*dims: int, dtype: jnp.dtype = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    columns = config.num_codebooks + 1
    prompt = (shape(1, PROMPT_LENGTH, columns), shape(1, PROMPT_LENGTH, columns, dtype=bool))
    rows = (shape(1), shape(1, dtype=jnp.uint32))
    lower_prefill = functools.partial(
        prefill.lower, params, *prompt, *rows, config=config, cache_length=CACHE_LENGTH
    )
    state = report("prefill", lower_prefill)
    sampling = SamplingParams.stack([Sampling()])
    lower_loop = functools.partial(
        run_frames.lower, params, state, sampling, np.int32(25), config=config
    )
    report("frame loop", lower_loop)


if __name__ == "__main__":
    main()
