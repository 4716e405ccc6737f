"""Trains the codec of the open-vocabulary voice; an interrupted run can be resumed.

    python examples/demo_checkpoint/train_voice_codec.py --speech=voice/speech --out=voice/codec

It runs on any device, in one process. --out gets checkpoints, metrics, and the averaged weights of
every checkpoint (`weights/STEP.safetensors`), which judge_codec.py reads.
"""

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from codec_batches import Batch, CodecBatches
from codec_weights import read_weights, write_weights
from phonemes import SOUNDS
from sizes import VOICE_CODEC
from speech_set import Packed, read_manifests
from texts import is_held_out_text

from csm_jax.errors import InputError
from csm_jax.mimi.codec import bind
from csm_jax.train.checkpoints import Checkpoints
from csm_jax.train.codec import (
    CodecState,
    CodecStepConfig,
    codec_step,
    init_codec_state,
    with_weights,
)
from csm_jax.train.log import Log
from csm_jax.train.optimizer import OptimizerConfig
from csm_jax.train.spectral import mel_distance

SPEECH = flags.DEFINE_multi_string("speech", None, "a directory of speech; may be repeated")
OUT = flags.DEFINE_string("out", "voice/codec", "directory of the run")
CACHE = flags.DEFINE_string("cache", "voice/packed", "directory for the recordings as samples")
STEPS = flags.DEFINE_integer("steps", 100_000, "training steps, until --final_rate is reached")
STOP = flags.DEFINE_integer("stop", None, "stop at this step; the run can be resumed")
BATCH = flags.DEFINE_integer("batch_size", 8, "pieces of recordings in a batch")
FRAMES = flags.DEFINE_integer("frames", 16, "frames of 80 ms in a piece")
OPTIMIZER = flags.DEFINE_enum("optimizer", "muon", ["adamw", "muon"], "see BUILD.md")
RATE = flags.DEFINE_float("learning_rate", 4e-3, "highest learning rate")
FINAL_RATE = flags.DEFINE_float("final_rate", 1.0, "share of the highest rate at the end")
WAVE = flags.DEFINE_float("wave_weight", 1.0, "weight of the distance of waveforms")
LABEL = flags.DEFINE_float("label_weight", 0.1, "weight of the phoneme labels of codebook 0")
AVERAGE = flags.DEFINE_float("average", 0.999, "decay of the moving average of the weights")
INIT = flags.DEFINE_string("init", None, "safetensors file of weights to start from")
SEED = flags.DEFINE_integer("seed", 0, "seed of the weights and of the order of the data")
SAVE = flags.DEFINE_float("save_minutes", 10.0, "minutes between checkpoints")
LOG = flags.DEFINE_integer("log_every", 20, "steps between lines of metrics")

# A run can be resumed only with the same values of these.
SETTINGS = (
    "speech",
    "steps",
    "batch_size",
    "frames",
    "optimizer",
    "learning_rate",
    "final_rate",
    "wave_weight",
    "label_weight",
    "average",
    "init",
    "seed",
)
# Batches of held-out recordings for the evaluation of a checkpoint.
EVALUATED = 4


def make_config() -> CodecStepConfig:
    optimizer = OptimizerConfig(
        kind=OPTIMIZER.value,
        learning_rate=RATE.value,
        steps=STEPS.value,
        warmup=min(50, STEPS.value - 1),
        final_rate=FINAL_RATE.value,
        weight_decay=0.0,
    )
    return CodecStepConfig(
        VOICE_CODEC,
        optimizer,
        wave_weight=WAVE.value,
        average=AVERAGE.value,
        num_labels=len(SOUNDS),
        label_weight=LABEL.value,
    )


def check_settings(out: Path) -> None:
    """Writes the flags that change the result, or compares them with those of the run."""
    settings = {name: flags.FLAGS[name].value for name in SETTINGS}
    path = out / "run.json"
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n")
    # Runs of earlier versions have an optimiser.
    before = {
        name.replace("optimiser", "optimizer"): value
        for name, value in json.loads(path.read_text()).items()
    }
    changed = sorted(name for name in SETTINGS if before.get(name) != settings[name])
    if changed:
        raise InputError(f"{path} was begun with another --{changed[0]}: choose another --out")


def first_state(config: CodecStepConfig) -> CodecState:
    state = init_codec_state(config, SEED.value)
    if INIT.value is None:
        return state
    return with_weights(state, read_weights(Path(INIT.value)))


@jax.jit
def held_out_distance(params: dict[str, Any], audio: jax.Array) -> jax.Array:
    """Mel distance [] between recordings and their reconstructions."""
    mimi = bind(VOICE_CODEC, params)
    decoded = mimi.decode(mimi.encode(audio, VOICE_CODEC.num_codebooks))
    return mel_distance(decoded[..., 0], audio, VOICE_CODEC.sample_rate)


class Run:
    """The state of a run, and its output files."""

    def __init__(self, out: Path, config: CodecStepConfig, checkpoints: Checkpoints):
        self.out = out
        self.config = config
        self.checkpoints = checkpoints
        state = first_state(config)
        restored = checkpoints.restore(state)
        # Restored arrays may use buffers that jax does not own and cannot take as donated: copy.
        self.state = state if restored is None else jax.tree.map(jnp.copy, restored[0])
        self.seconds = 0.0 if restored is None else restored[1]["seconds"]
        self.step = int(self.state.step)
        self.log = Log(out, self.step)
        self._sums: list[list[float]] = []

    def train(self, batch: Batch) -> None:
        start = time.monotonic()
        self.state, metrics = codec_step(
            self.state, batch.audio, np.uint32(SEED.value), batch.labels, config=self.config
        )
        self._sums.append([float(value) for value in metrics])
        self.step += 1
        self.seconds += time.monotonic() - start
        if self.step % LOG.value == 0:
            means = np.mean(self._sums, axis=0).tolist()
            self._sums = []
            figures = dict(zip(metrics._fields, means, strict=True))
            self.log.write(self.step, {"seconds": round(self.seconds, 1), **figures})

    def save(self, held_out: list[Batch]) -> None:
        """Writes a checkpoint, its averaged weights and its held-out distance."""
        average = self.state.average
        distances = [float(held_out_distance(average, each.audio)) for each in held_out]
        self.log.write(self.step, {"held_out": float(np.mean(distances))})
        write_weights(self.out / "weights" / f"{self.step:06}.safetensors", average)
        self.checkpoints.save(self.state, {"seconds": self.seconds})


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is empty until the process receives SIGTERM."""
    stopped: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    check_settings(out)
    utterances = read_manifests(Path(each) for each in SPEECH.value)
    held = [each for each in utterances if is_held_out_text(each.text)]
    trained = [each for each in utterances if not is_held_out_text(each.text)]
    cache = Path(CACHE.value)
    batches, held_out = (
        CodecBatches(
            Packed(cache, chosen),
            config=VOICE_CODEC,
            rows=BATCH.value,
            frames=FRAMES.value,
            seed=seed,
        )
        for chosen, seed in ((trained, SEED.value), (held, 1))
    )
    evaluated = [held_out.batch(i) for i in range(EVALUATED)]
    config = make_config()
    with Checkpoints(out / "checkpoints", keep=2) as checkpoints, stop_signals() as stopped:
        run = Run(out, config, checkpoints)
        saved = time.monotonic()
        while run.step < (STOP.value or STEPS.value) and not stopped:
            run.train(batches.batch(run.step))
            if time.monotonic() - saved > 60 * SAVE.value:
                run.save(evaluated)
                saved = time.monotonic()
        run.save(evaluated)


if __name__ == "__main__":
    flags.mark_flag_as_required("speech")
    app.run(main)
