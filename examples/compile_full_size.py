"""How long XLA takes to compile the full-size model. Needs no weights, only their shapes.

    python examples/compile_full_size.py [--dtype=bfloat16] [--tpu]

Prints a JSON line per program: prefill of a 256-position prompt, and the frame loop after it. With
--tpu it compiles for a v5e chip, which needs the compiler of jax[tpu] but no TPU.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import csm_jax
from csm_jax.checkpoint import param_shapes
from csm_jax.generation import prefill, run_frames
from csm_jax.sampling import Sampling, SamplingParams

PROMPT_LENGTH, CACHE_LENGTH = 256, 512


def v5e() -> jax.Device:
    """A chip to compile for; nothing is asked of the machine this runs on."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=[1, 1, 1]
    )
    return topology.devices[0]


def report(name: str, lower: Callable[[], jax.stages.Lowered]) -> Any:
    """Prints times and memory of one program, and returns the shapes of what it computes."""
    started = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    figures = {
        "program": name,
        "trace_s": round(traced - started, 2),
        "compile_s": round(time.perf_counter() - traced, 2),
        "argument_gb": round(memory.argument_size_in_bytes / 1e9, 2),
        "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 2),
    }
    print(json.dumps(figures))
    return lowered.out_info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tpu", action="store_true")
    arguments = parser.parse_args()
    device = v5e() if arguments.tpu else jax.devices()[0]
    placed = jax.sharding.SingleDeviceSharding(device)

    def on_device(shapes: Any) -> Any:
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed), shapes
        )

    def shape(*dims: int, dtype: jnp.dtype = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=placed)

    config = csm_jax.csm_1b()
    params = on_device(param_shapes(config, jnp.dtype(arguments.dtype))["csm"])
    columns = config.num_codebooks + 1
    prompt = (shape(1, PROMPT_LENGTH, columns), shape(1, PROMPT_LENGTH, columns, dtype=bool))
    rows = (shape(1), shape(1, dtype=jnp.uint32))
    lower_prefill = functools.partial(
        prefill.lower, params, *prompt, *rows, config=config, cache_length=CACHE_LENGTH
    )
    state = on_device(report("prefill", lower_prefill))
    sampling = on_device(jax.tree.map(np.asarray, SamplingParams.stack([Sampling()])))
    lower_loop = functools.partial(
        run_frames.lower, params, state, sampling, shape(), config=config
    )
    report("frame loop", lower_loop)


if __name__ == "__main__":
    main()
