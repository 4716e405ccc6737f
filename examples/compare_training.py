"""Measures the speed of fine-tuning with csm_jax, and with transformers and PEFT.

    python examples/compare_training.py [--length=256] [--repeats=3] [--dtype=float32]

The program needs torch, transformers and peft. It measures a step of LoRA (rank 16 on every
projection of both stacks, AdamW, rematerialized blocks) at the full size with random weights, on
the same conversation: a fifth is text, the rest audio, and the depth decoder is trained on a
sixteenth of the frames. Each library has its own process, and they take turns. The program prints
medians, and frames of audio a second; "ratio" is above 1 where csm_jax is faster.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

RANK, ALPHA, SHARE, SEED = 16, 32.0, 1 / 16, 0
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")

Step = Callable[[], float]  # makes a step, returns its loss


def conversation(config, length: int):
    """A `Batch` of one row."""
    from csm_jax.train.batches import Batch

    random = np.random.default_rng(SEED)
    num_text = length // 5
    columns = config.num_codebooks + 1
    frames = random.integers(1, config.codec.codebook_size, (1, length, columns)).astype(np.int32)
    is_text = (np.arange(length) < num_text)[None]
    mask = is_text[..., None] == (np.arange(columns) == config.num_codebooks)
    frames[~mask] = 0
    return Batch(frames, mask, ~is_text)


def our_step(length: int, dtype: str) -> Step:
    import jax

    import csm_jax
    from csm_jax.checkpoints.random_weights import random_params
    from csm_jax.model.lora import LoRAConfig, init_adapters
    from csm_jax.model.precision import resolve
    from csm_jax.train.optimizer import OptimizerConfig
    from csm_jax.train.step import TrainStepConfig, init_state, train_step

    model, precision = csm_jax.csm_1b(), resolve(dtype)
    lora = LoRAConfig(RANK, ALPHA, PROJECTIONS)
    config = TrainStepConfig(model, OptimizerConfig(), precision, lora=lora, depth_share=SHARE)
    frozen = random_params(model, precision)["csm"]
    state = init_state(jax.device_put(init_adapters(model, lora)), config)
    batch = jax.device_put(conversation(model, length))

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, frozen, batch, np.uint32(SEED), config=config)
        return float(metrics.loss)

    return step


def their_step(length: int, dtype: str) -> Step:
    import peft
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    import csm_jax
    from csm_jax.convert.configs import csm_to_huggingface

    torch.set_default_dtype(getattr(torch, dtype))
    config = csm_jax.csm_1b()
    sizes = csm_to_huggingface(config)
    with no_init_weights():
        model = transformers.CsmForConditionalGeneration(transformers.CsmConfig.from_dict(sizes))
    model.tie_weights()
    model.codec_model = torch.nn.Identity()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    for parameter in model.parameters():
        with torch.no_grad():
            std = parameter[0].numel() ** -0.5
            parameter.normal_(std=std) if parameter.ndim > 1 else parameter.fill_(1.0)
    names = [f"{projection}_proj" for projection in PROJECTIONS]
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)
    adapted = peft.get_peft_model(model, lora)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # A hook for reentrant checkpointing, which the depth decoder does not support.
    model.disable_input_require_grads()
    adapted.train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    batch = conversation(config, length)
    codes = torch.from_numpy(batch.frames[..., :-1]).long().to(device)
    is_audio = torch.from_numpy(batch.loss_mask)[..., None].to(device)
    labels = torch.where(is_audio, codes, -100)
    for row in range(1, length):
        if row % round(1 / SHARE):
            labels[:, row, 1:] = -100
    with torch.no_grad():
        texts = torch.from_numpy(batch.frames[..., -1]).long().to(device)
        audio = model.backbone_model.embed_tokens(codes)
        embeds = torch.where(is_audio, audio, model.embed_text_tokens(texts))

    def step() -> float:
        optimizer.zero_grad()
        loss = model(inputs_embeds=embeds, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()  # waits for the device

    return step


def work(make: Callable[[int, str], Step], length: int, dtype: str, pipe: Connection) -> None:
    """Runs in a worker: a step to warm up, whose time it sends, then one for every message."""
    step = make(length, dtype)
    started = time.perf_counter()
    step()
    pipe.send(time.perf_counter() - started)
    while pipe.recv():
        started = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=256, help="positions, text and audio")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    flags = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    workers, first = {}, {}
    for name, make in {"transformers + peft": their_step, "csm-jax": our_step}.items():
        here, there = spawn.Pipe()
        process = spawn.Process(
            target=work, args=(make, flags.length, flags.dtype, there), daemon=True
        )
        process.start()
        there.close()  # so that the end of a worker is noticed
        first[name] = here.recv()
        workers[name] = here
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(flags.repeats):
        for name, pipe in workers.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    frames = flags.length - flags.length // 5
    print(f"LoRA rank {RANK}, {flags.dtype}, {flags.length} positions, {frames} frames of audio")
    for name, median in medians.items():
        spread, rate = max(seconds[name]) / min(seconds[name]), frames / median
        print(f"  {name:<20}{median:7.2f} s a step (spread {spread:.2f}){rate:7.1f} frames/s")
        print(f"  {'':<20}{first[name] - median:7.2f} s more for the first step")
    theirs, ours = medians.values()
    print(f"  ratio {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
