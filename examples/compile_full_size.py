"""Measures the compilation of the full-size model, and the memory of its programs.

    python examples/compile_full_size.py [--dtype=bfloat16] [--quantize=int8] [--batch=32]
    python examples/compile_full_size.py --tpu [--topology=v5e:2x2 --data=2 --model=2] ...
    python examples/compile_full_size.py --tpu --config=miso_8b --quantize=int8 ...
    python examples/compile_full_size.py --tpu --programs train_step [--lora_rank=16] [--fsdp=4] ...
    python examples/compile_full_size.py --gpu=h100 [--quantize=int8] [--batch=8] ...

The program needs only the shapes of the weights. It prints a JSON line for each compiled program:
prefill of a prompt, the frame loop with a cache of 2048 positions, and the codec's decoding of a
frame; or a step of training. With --tpu it compiles for TPU chips, without having any, with the
compiler of `pip install "jax[tpu]"`; then it prints the bytes that the program copies in memory,
and the frames a second that the chip's bandwidth allows at most: a bound, not a measurement. With
--gpu it compiles for a card, with `jax[cuda12]`; then it prints the kernels that the program
launches (the frame loop's in one frame), the bytes that they move, and the milliseconds that
launches and bytes take at least: an estimate, since nothing is run.
"""

import argparse
import json

import jax
import jax.numpy as jnp
from ahead_of_time import (
    Target,
    cache_bytes,
    lower_train_step,
    measure,
    tpu_devices,
    weights_of_a_frame,
)
from compiled_text import parse
from gpu_kernels import cost_of_pass, cost_of_program
from gpu_targets import CARDS, Card, gpu_devices
from tpu_limits import copied_bytes, frames_per_second

import csm_jax
from csm_jax.config import tiny
from csm_jax.model.kernels.choice import KERNELS, XLA
from csm_jax.model.lora import LoRAConfig
from csm_jax.model.precision import DTYPES, QUANTIZE, Precision, resolve
from csm_jax.model.sharding import make_mesh
from csm_jax.train.fsdp import make_fsdp_mesh
from csm_jax.train.optimizer import OptimizerConfig
from csm_jax.train.step import TrainStepConfig

CONFIGS = {"csm_1b": csm_jax.csm_1b(), "miso_8b": csm_jax.miso_8b(), "tiny": tiny()}
PROGRAMS = ("prefill", "frame_loop", "codec_step")


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    platform = parser.add_mutually_exclusive_group()
    platform.add_argument("--tpu", action="store_true", help="compile for TPUs")
    platform.add_argument("--gpu", choices=CARDS, help="compile for this card")
    parser.add_argument("--config", default="csm_1b", choices=CONFIGS, help="sizes of the model")
    parser.add_argument("--topology", default="v5e:1x1", help="v5e:2x2, v6e:1x1, ...")
    parser.add_argument("--data", type=int, default=1, help="chips that the batch is divided over")
    parser.add_argument(
        "--model", type=int, default=1, help="chips that the weights are divided over"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--quantize", default="none", choices=QUANTIZE)
    parser.add_argument("--kernels", default=XLA, choices=KERNELS, help="of the frame loop")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512, help="positions of the prompt")
    parser.add_argument("--max_seq_len", type=int, default=2048, help="positions of the cache")
    parser.add_argument(
        "--programs", nargs="+", default=PROGRAMS, choices=[*PROGRAMS, "train_step"]
    )
    parser.add_argument("--length", type=int, default=1024, help="positions to train on")
    parser.add_argument("--lora_rank", type=int, default=0, help="of adapters; 0 trains all")
    parser.add_argument(
        "--fsdp", type=int, default=1, help="chips that trained parameters are sharded over"
    )
    return parser.parse_args()


def main() -> None:
    flags = parse_flags()
    card = CARDS[flags.gpu] if flags.gpu else None
    devices = devices_to_compile_for(flags, card)
    dtype = jnp.dtype(flags.dtype)
    precision = (
        Precision(dtype, dtype, flags.quantize == "int8")
        if flags.tpu or card
        else resolve(flags.dtype, flags.quantize)
    )
    programs = inference(flags, precision, devices) | {
        "train_step": lambda: lower_train_step(
            step_config(flags, precision, devices), flags.batch, flags.length
        )
    }
    for program in flags.programs:
        compiled, figures = measure(programs[program])
        if card:
            figures |= work_on(card, program, compiled.as_text())
        if flags.tpu:
            figures |= limits_of(flags, precision, program, compiled.as_text())
        print(json.dumps({"program": program} | figures), flush=True)


def devices_to_compile_for(flags: argparse.Namespace, card: Card | None) -> list[jax.Device]:
    if card:
        return gpu_devices(card)
    return tpu_devices(flags.topology) if flags.tpu else jax.devices()


def work_on(card: Card, program: str, text: str) -> dict[str, float | int]:
    """Kernels, bytes and their time in one call, or in one frame of the frame loop."""
    count = cost_of_pass if program == "frame_loop" else cost_of_program
    cost = count(parse(text), card.bandwidth)
    return {
        "kernels": cost.kernels,
        "bytes": cost.bytes,
        "estimate_ms": round(1000 * cost.seconds, 2),
    }


def limits_of(
    flags: argparse.Namespace, precision: Precision, program: str, text: str
) -> dict[str, float | int]:
    """Bytes that are copied in a chip's memory; and of the frame loop on one chip, its bound."""
    figures: dict[str, float | int] = {"copied_bytes": copied_bytes(parse(text))}
    if program == "frame_loop" and flags.data * flags.model == 1:
        config = CONFIGS[flags.config]
        read = weights_of_a_frame(config, precision)
        read += cache_bytes(config, precision, flags.batch, flags.max_seq_len)
        bound = frames_per_second(flags.topology, read)
        figures |= {"read_bytes": read, "frames_per_second_bound": round(flags.batch * bound, 1)}
    return figures


def inference(flags: argparse.Namespace, precision: Precision, devices: list[jax.Device]) -> dict:
    target = Target(CONFIGS[flags.config], precision, make_mesh(flags.data, flags.model, devices))
    return {
        "prefill": lambda: target.prefill(flags.batch, flags.max_seq_len, flags.prompt),
        "frame_loop": lambda: target.frame_loop(flags.batch, flags.max_seq_len, flags.kernels),
        "codec_step": lambda: target.codec_step(flags.batch, num_frames=1),
    }


def step_config(
    flags: argparse.Namespace, precision: Precision, devices: list[jax.Device]
) -> TrainStepConfig:
    lora = LoRAConfig(rank=flags.lora_rank) if flags.lora_rank else None
    mesh = make_fsdp_mesh(flags.fsdp, devices)
    config = CONFIGS[flags.config]
    return TrainStepConfig(config, OptimizerConfig(), precision, lora=lora, mesh=mesh)


if __name__ == "__main__":
    main()
