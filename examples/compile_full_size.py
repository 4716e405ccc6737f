"""Measures the compilation of the full-size model, and the memory of its programs.

    python examples/compile_full_size.py [--dtype=bfloat16] [--quantize=int8] [--batch=32]
    python examples/compile_full_size.py --tpu [--topology=v5e:2x2 --data=2 --model=2] ...
    python examples/compile_full_size.py --tpu --config=miso_8b --quantize=int8 ...
    python examples/compile_full_size.py --tpu --programs train_step [--lora_rank=16] [--fsdp=4] ...

The program needs only the shapes of the weights. It prints a JSON line for each compiled program:
prefill of a prompt, the frame loop with a cache of 2048 positions, and the codec's decoding of a
frame; or a step of training. With --tpu it compiles for TPU chips, without having any, with the
compiler of `pip install "jax[tpu]"`.
"""

import argparse
import json

import jax
import jax.numpy as jnp
from ahead_of_time import Target, lower_train_step, measure, tpu_devices

import csm_jax
from csm_jax.model.lora import LoRAConfig
from csm_jax.model.precision import DTYPES, QUANTIZE, Precision, resolve
from csm_jax.model.sharding import make_mesh
from csm_jax.train.fsdp import make_fsdp_mesh
from csm_jax.train.optimizer import OptimizerConfig
from csm_jax.train.step import TrainStepConfig

CONFIGS = {"csm_1b": csm_jax.csm_1b(), "miso_8b": csm_jax.miso_8b()}
PROGRAMS = ("prefill", "frame_loop", "codec_step")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tpu", action="store_true", help="compile for TPUs")
    parser.add_argument("--config", default="csm_1b", choices=CONFIGS, help="sizes of the model")
    parser.add_argument("--topology", default="v5e:1x1", help="v5e:2x2, v6e:1x1, ...")
    parser.add_argument("--data", type=int, default=1, help="chips that the batch is divided over")
    parser.add_argument(
        "--model", type=int, default=1, help="chips that the weights are divided over"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--quantize", default="none", choices=QUANTIZE)
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
    flags = parse()
    devices = tpu_devices(flags.topology) if flags.tpu else jax.devices()
    dtype = jnp.dtype(flags.dtype)
    precision = (
        Precision(dtype, dtype, flags.quantize == "int8")
        if flags.tpu
        else resolve(flags.dtype, flags.quantize)
    )
    programs = inference(flags, precision, devices) | {
        "train_step": lambda: lower_train_step(
            step_config(flags, precision, devices), flags.batch, flags.length
        )
    }
    for program in flags.programs:
        print(json.dumps({"program": program} | measure(programs[program])), flush=True)


def inference(flags: argparse.Namespace, precision: Precision, devices: list[jax.Device]) -> dict:
    target = Target(CONFIGS[flags.config], precision, make_mesh(flags.data, flags.model, devices))
    return {
        "prefill": lambda: target.prefill(flags.batch, flags.max_seq_len, flags.prompt),
        "frame_loop": lambda: target.frame_loop(flags.batch, flags.max_seq_len),
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
