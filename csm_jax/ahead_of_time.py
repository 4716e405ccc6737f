"""Compiling without weights, and for chips that are not there: a compiler wants shapes only.

The compiler of `jax[tpu]` (libtpu) runs on any Linux machine. What it proves is that a program
lowers, compiles and fits; it proves nothing about speed.
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.stages import Lowered

from csm_jax.checkpoint import Params, flatten, param_shapes, unflatten
from csm_jax.config import CSMConfig
from csm_jax.decode_step import GenerationState, init_state, prefill, run_frames
from csm_jax.mimi import codec
from csm_jax.precision import Precision
from csm_jax.sampling import Sampling, SamplingParams
from csm_jax.sharding import param_sharding, rows_sharding, state_sharding

# What libtpu would ask the cloud machine for that it takes this one to be; without a lock and
# logs in /tmp, which chips need that are there.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_devices(topology: str = "v5e:1x1") -> list[jax.Device]:
    """Chips to compile for; nothing is asked of the machine this runs on.

    Args:
      topology: generation and chips, such as "v5e:2x2" or "v6e:1x1"; one host has them all.
    """
    from jax.experimental import topologies

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    chips = [int(count) for count in topology.partition(":")[2].split("x")]
    description = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, chips_per_host_bounds=[*chips, 1]
    )
    return description.devices


@dataclass(frozen=True)
class Target:
    """A model on a mesh, of which only the shapes are known.

    Every method lowers a program as a generator would run it; `.compile()` is left to do.
    """

    config: CSMConfig
    precision: Precision
    mesh: Mesh

    @functools.cached_property
    def params(self) -> Params:
        """Shapes and places of all parameters."""
        shapes = param_shapes(self.config, self.precision)
        placed = {
            path: _placed(leaf, self._sharding(path, leaf.shape))
            for path, leaf in flatten(shapes).items()
        }
        return unflatten(placed, shapes)

    def prefill(self, batch: int, max_seq_len: int, length: int) -> Lowered:
        """Reading a prompt of `length` positions into a row."""
        columns = self.config.num_codebooks + 1
        return prefill.lower(
            self.params["csm"],
            self._state(batch, max_seq_len),
            np.zeros((length, columns), np.int32),
            np.zeros((length, columns), bool),
            np.int32(0),
            config=self.config,
            mesh=self.mesh,
        )

    def frame_loop(self, batch: int, max_seq_len: int) -> Lowered:
        """Frames of all rows, when at least one of them needs the whole cache."""
        sampling = SamplingParams.stack([Sampling()] * batch)
        return run_frames.lower(
            self.params["csm"],
            self._state(batch, max_seq_len),
            jax.tree.map(_placed, sampling, rows_sharding(sampling, self.mesh)),
            np.int32(0),
            np.bool_(False),
            config=self.config,
            kv_length=max_seq_len,
            mesh=self.mesh,
        )

    def codec_step(self, batch: int, num_frames: int) -> Lowered:
        """Decoding the next frames of all rows, on the codec's device."""
        config = self.config.codec
        state = jax.eval_shape(lambda: codec.abstract(config).init_decode_state(batch))
        codes = jax.ShapeDtypeStruct((batch, num_frames, self.config.num_codebooks), jnp.int32)

        def decode_step(params: Params, codes: jax.Array, state: Any):
            return codec.bind(config, params).decode_step(codes, state)

        return jax.jit(decode_step, donate_argnames="state").lower(
            self.params["codec"],
            *jax.tree.map(lambda leaf: _placed(leaf, self._one_device), (codes, state)),
        )

    @property
    def _one_device(self) -> Sharding:
        return SingleDeviceSharding(self.mesh.devices.flat[0])

    def _sharding(self, path: str, shape: tuple[int, ...]) -> Sharding:
        return param_sharding(path, shape, self.config, self.mesh) or self._one_device

    def _state(self, batch: int, max_seq_len: int) -> GenerationState:
        state = jax.eval_shape(
            lambda: init_state(
                config=self.config,
                batch=batch,
                max_seq_len=max_seq_len,
                dtype=self.precision.activations,
            )
        )
        return jax.tree.map(_placed, state, state_sharding(state, self.mesh))


def _placed(leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def measure(lower: Callable[[], Lowered]) -> dict[str, float | int]:
    """Compiles a program.

    Returns:
      Seconds to trace and to compile it, and bytes on every device: of its arguments, of what it
      needs beside them while it runs, and of the arguments that it gives back in place.
    """
    started = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    unaliased = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "trace_s": round(traced - started, 2),
        "compile_s": round(time.perf_counter() - traced, 2),
        "argument_bytes": memory.argument_size_in_bytes,
        "additional_bytes": memory.temp_size_in_bytes + unaliased,
        "donated_bytes": memory.alias_size_in_bytes,
    }
