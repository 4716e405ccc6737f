"""Cards to compile for with XLA's GPU compiler, on a machine that has none.

`pip install "jax[cuda12]"` brings the compiler. It needs to know of a card what its data sheet
says, and the limits of its compute capability (CUDA C++ Programming Guide, "Compute
Capabilities"). Without a card XLA cannot try several forms of a product and take the fastest, so a
program for the same card may differ in the tiles of its products, not in what is fused.
"""

from typing import NamedTuple

import jax

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {limits.shared_memory}
  shared_memory_per_block_optin: {limits.shared_memory_of_a_block}
  threads_per_core_limit: {limits.threads}
  core_count: {card.cores}
  fpus_per_core: {limits.float32_units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {card.bandwidth:.0f}
  l2_cache_size: {card.l2_cache}
  clock_rate_ghz: {card.clock_ghz}
  device_memory_size: {card.memory:.0f}
  cuda_compute_capability {{ major: {card.capability[0]} minor: {card.capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{card.name}"
"""


class Card(NamedTuple):
    """What a data sheet says of a GPU.

    Attributes:
      capability: its compute capability, which decides the instructions.
      cores: streaming multiprocessors.
      bandwidth: of its memory, bytes/s.
      memory, l2_cache: bytes.
      clock_ghz: at most.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    bandwidth: float
    memory: float
    l2_cache: int
    clock_ghz: float


class _Limits(NamedTuple):
    """What a streaming multiprocessor of a compute capability has."""

    shared_memory: int
    shared_memory_of_a_block: int
    threads: int
    float32_units: int


_LIMITS = {
    (7, 5): _Limits(64 << 10, 64 << 10, 1024, 64),
    (8, 0): _Limits(164 << 10, 163 << 10, 2048, 64),
    (8, 9): _Limits(100 << 10, 99 << 10, 1536, 128),
    (9, 0): _Limits(228 << 10, 227 << 10, 2048, 128),
}

CARDS = {
    "h100": Card("NVIDIA H100 SXM", (9, 0), 132, 3.35e12, 80e9, 50 << 20, 1.98),
    "h200": Card("NVIDIA H200 SXM", (9, 0), 132, 4.8e12, 141e9, 50 << 20, 1.98),
    "a100": Card("NVIDIA A100 SXM 80GB", (8, 0), 108, 2.039e12, 80e9, 40 << 20, 1.41),
    "l4": Card("NVIDIA L4", (8, 9), 58, 0.3e12, 24e9, 48 << 20, 2.04),
    "t4": Card("NVIDIA T4", (7, 5), 40, 0.32e12, 16e9, 4 << 20, 1.59),
}


def gpu_devices(card: Card) -> list[jax.Device]:
    """One GPU to compile for; this machine needs none."""
    from jax.experimental import topologies

    target = _TARGET.format(card=card, limits=_LIMITS[card.capability])
    return topologies.get_topology_desc(
        "1x1x1", "cuda", target_config=target, topology="1x1x1"
    ).devices
