"""The model's programs, lowered without weights: a compiler needs shapes and shardings only.

The compiler of `jax[tpu]` (libtpu) runs on any Linux machine. It shows that a program lowers,
compiles and fits into memory; it shows nothing about speed.
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
from jax.stages import Compiled, Lowered

from csm_jax.checkpoints.native_format import flatten, param_shapes, unflatten
from csm_jax.config import CSMConfig
from csm_jax.inference.decode_step import GenerationState, init_state, prefill, run_frames
from csm_jax.mimi import codec
from csm_jax.model.kernels.choice import XLA
from csm_jax.model.layers import LowRank, Params
from csm_jax.model.lora import Adapters, LoRAConfig, adapter_shapes
from csm_jax.model.precision import Precision
from csm_jax.model.sampling import Sampling, SamplingParams
from csm_jax.model.sharding import param_sharding, rows_sharding, state_sharding
from csm_jax.train import step
from csm_jax.train.batches import Batch
from csm_jax.train.fsdp import fsdp_sharding

# What libtpu would ask the metadata server of a cloud machine for. Locks and logs are off, which
# only real chips need.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_devices(topology: str = "v5e:1x1") -> list[jax.Device]:
    """Chips to compile for; this machine needs none.

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

    Every method lowers a program as a generator runs it; its `.compile()` compiles it.
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
        """Prefill of a prompt of `length` positions."""
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

    def frame_loop(self, batch: int, max_seq_len: int, kernels: str = XLA) -> Lowered:
        """The frame loop, where at least one row needs the whole cache."""
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
            kernels=kernels,
        )

    def codec_step(self, batch: int, num_frames: int) -> Lowered:
        """Decoding of the next frames of all rows, on the codec's device."""
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


def weights_of_a_frame(config: CSMConfig, precision: Precision) -> int:
    """Bytes of the weights that a frame multiplies with, for any number of rows.

    The depth decoder takes a step for each codebook but the first; in each, a head is another one.
    """
    parts = dict.fromkeys(param_shapes(config, precision)["csm"], 0)
    for path, leaf in flatten(param_shapes(config, precision)["csm"]).items():
        parts[path.split("/")[0]] += leaf.size * leaf.dtype.itemsize
    steps = config.num_codebooks - 1
    once = parts["backbone"] + parts["codebook0_head"] + parts["depth_heads"]
    return once + steps * (parts["depth_decoder"] + parts["projection"])


def cache_bytes(config: CSMConfig, precision: Precision, batch: int, max_seq_len: int) -> int:
    """Bytes of the backbone's keys and values."""
    sizes = config.backbone
    per_position = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim
    return per_position * batch * max_seq_len * precision.activations.itemsize


def _placed(leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def lower_train_step(config: step.TrainStepConfig, rows: int, length: int) -> Lowered:
    """The training step on `config.mesh`, for batches of `rows` x `length` positions."""
    mesh = config.mesh
    if mesh is None:
        raise ValueError("a step is lowered for the devices of a mesh, and the config has none")
    frozen = None
    trainable: Params = param_shapes(config.model)["csm"]
    if config.lora is not None:
        frozen = _placed_to_train(param_shapes(config.model, config.precision)["csm"], mesh)
        trainable = _adapters(config.model, config.lora)
    state = jax.eval_shape(functools.partial(step.init_state, config=config), trainable)
    columns = config.model.num_codebooks + 1
    batch = Batch(
        frames=jax.ShapeDtypeStruct((rows, length, columns), jnp.int32),
        mask=jax.ShapeDtypeStruct((rows, length, columns), bool),
        loss_mask=jax.ShapeDtypeStruct((rows, length), bool),
    )
    batch = jax.tree.map(_placed, batch, rows_sharding(batch, mesh))
    state = _placed_to_train(state, mesh)
    return step.train_step.lower(state, frozen, batch, np.uint32(0), config=config)


def _adapters(config: CSMConfig, lora: LoRAConfig) -> Adapters:
    return {
        path: LowRank(
            jax.ShapeDtypeStruct((lora.rank, width), jnp.float32),
            jax.ShapeDtypeStruct((out, lora.rank), jnp.float32),
        )
        for path, (out, width) in adapter_shapes(config, lora.targets).items()
    }


def _placed_to_train(shapes: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda leaf: _placed(leaf, fsdp_sharding(leaf.shape, mesh)), shapes)


def measure(lower: Callable[[], Lowered]) -> tuple[Compiled, dict[str, float | int]]:
    """Compiles a program.

    Returns:
      It; and seconds to trace and to compile it, and bytes on every device: of its arguments, of
      what it needs beside them while it runs, and of the arguments that it gives back in place.
    """
    started = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    compiled = lowered.compile()
    finished = time.perf_counter()
    memory = compiled.memory_analysis()
    unaliased = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return compiled, {
        "trace_s": round(traced - started, 2),
        "compile_s": round(finished - traced, 2),
        "argument_bytes": memory.argument_size_in_bytes,
        "additional_bytes": memory.temp_size_in_bytes + unaliased,
        "donated_bytes": memory.alias_size_in_bytes,
    }
