"""Trains the Mimi of the demo checkpoint on the recordings of `synthesize.py`.

python examples/demo_checkpoint/train_codec.py --speech=demo/speech --out=demo/codec
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from flax import nnx
from safetensors.numpy import load_file, save_file
from sizes import CODEC, CODEC_WEIGHTS
from tqdm import tqdm

from csm_jax.checkpoints.native_format import flatten, unflatten
from csm_jax.io.audio import load_audio, save_audio
from csm_jax.mimi.codec import Codec, abstract
from csm_jax.train.codec import CodecStepConfig, codec_step, init_codec_state, with_weights
from csm_jax.train.optimizer import OptimizerConfig

SPEECH = flags.DEFINE_string("speech", "demo/speech", "directory of synthesize.py")
OUT = flags.DEFINE_string("out", "demo/codec", "directory for the weights and metrics")
STEPS = flags.DEFINE_integer("steps", 5000, "training steps")
BATCH = flags.DEFINE_integer("batch_size", 8, "pieces of recordings in a batch")
FRAMES = flags.DEFINE_integer("frames", 16, "frames of 80 ms in a piece")
RATE = flags.DEFINE_float("learning_rate", 4e-3, "highest learning rate")
RECORDINGS = flags.DEFINE_integer("recordings", 800, "recordings of each voice")
INIT = flags.DEFINE_string("init", None, "directory whose weights to start from")
STOP = flags.DEFINE_integer("stop", None, "stop early; the learning rate follows --steps")
SEED = flags.DEFINE_integer("seed", 0, "seed of the weights and of the order of the data")


def load_speech(directory: Path, count: int) -> list[np.ndarray]:
    """Loads the first recordings of every voice, padded with silence to the length of a piece."""
    paths = [path for voice in sorted(directory.iterdir()) if voice.is_dir()
             for path in sorted(voice.glob("*.wav"))[:count]]  # fmt: skip
    return [
        load_audio(path, CODEC.sample_rate) for path in tqdm(paths, desc="reading", disable=None)
    ]


def draw_batches(speech: list[np.ndarray], seed: int) -> Iterator[np.ndarray]:
    """Yields pieces [B, samples] at random positions of random recordings, endlessly."""
    random = np.random.default_rng(seed)
    size = FRAMES.value * CODEC.frame_size
    while True:
        chosen = [speech[i] for i in random.integers(len(speech), size=BATCH.value)]
        yield np.stack([cut(audio, size, random) for audio in chosen])


def cut(audio: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """A random piece of `size` samples, up to 6 dB fainter."""
    padded = np.pad(audio, (0, max(0, size - len(audio))))
    start = random.integers(len(padded) - size + 1)
    return padded[start : start + size] * np.float32(random.uniform(0.5, 1))


def main(_: list[str]) -> None:
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    optimizer = OptimizerConfig(
        kind="muon",
        learning_rate=RATE.value,
        steps=STEPS.value,
        warmup=50,
        final_rate=0.02,
        weight_decay=0.0,
    )
    config = CodecStepConfig(CODEC, optimizer)
    state = init_codec_state(config, SEED.value)
    if INIT.value:
        state = with_weights(state, read_weights(Path(INIT.value)))
    speech = load_speech(Path(SPEECH.value), RECORDINGS.value)
    batches = draw_batches(speech, SEED.value)
    start = time.monotonic()
    with (out / "metrics.jsonl").open("w") as log:
        for step in tqdm(range(1, (STOP.value or STEPS.value) + 1), unit="step", disable=None):
            state, metrics = codec_step(state, next(batches), np.uint32(SEED.value), config=config)
            if step % 50 == 0:
                figures = {name: float(value) for name, value in metrics._asdict().items()}
                line = {"step": step, "seconds": round(time.monotonic() - start, 1), **figures}
                log.write(json.dumps(line) + "\n")
                log.flush()
            if step % 500 == 0:
                save(out, state.params, speech)
    save(out, state.params, speech)


def read_weights(directory: Path) -> dict:
    """Reads the parameters of a finished run."""
    return unflatten(
        load_file(directory / CODEC_WEIGHTS), nnx.to_pure_dict(nnx.state(abstract(CODEC)))
    )


def save(out: Path, params: dict, speech: list[np.ndarray]) -> None:
    """Writes the weights, and a decoded recording of each voice."""
    params = jax.device_get(params)
    save_file(flatten(params), out / CODEC_WEIGHTS)
    codec = Codec(CODEC, params)
    for i, audio in enumerate(speech[:: RECORDINGS.value]):
        save_audio(out / f"decoded-{i}.wav", codec.decode(codec.encode(audio)), codec.sample_rate)


if __name__ == "__main__":
    app.run(main)
