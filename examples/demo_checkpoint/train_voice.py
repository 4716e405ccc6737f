"""Trains the language model of the open-vocabulary voice, from recordings and a codec.

    python examples/demo_checkpoint/train_voice.py --speech=voice/speech --out=voice/model \
        --codec=voice/codec/weights/010000.safetensors --minutes=10

Its stages, in their order: a checkpoint with random weights; codes of all recordings; conversations
of these; training; the shipped form. What is finished is not repeated, so the same command goes on
after --minutes, or where it was interrupted. Training on another machine needs only --out, with
--stages=train: neither recordings nor espeak-ng.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags, logging
from conversations import write_conversations
from safetensors.numpy import load_file
from shipped_form import megabytes, write_shipped
from sizes import VOICE_MODEL
from speech_set import Utterance, read_manifests
from texts import is_held_out_text
from tqdm import tqdm
from untrained import write_untrained

import csm_jax
from csm_jax.errors import InputError
from csm_jax.io.files import replace_file
from csm_jax.train.codes import CodeCache, file_content

STAGES = ("untrained", "codes", "conversations", "train", "package")
SPEECH = flags.DEFINE_multi_string("speech", [], "a directory of speech; may be repeated")
CODEC = flags.DEFINE_string("codec", None, "weights of train_voice_codec.py")
OUT = flags.DEFINE_string("out", "voice/model", "directory of everything that is made")
CHOSEN = flags.DEFINE_list("stages", list(STAGES), "the stages to run")
MINUTES = flags.DEFINE_float("minutes", None, "stop after this time; the same command goes on")
FIRST = flags.DEFINE_integer("first", None, "use only so many utterances")
COUNT = flags.DEFINE_integer("count", 40_000, "conversations")
SECONDS = flags.DEFINE_float("seconds", 75.0, "longest conversation in seconds of speech")
STEPS = flags.DEFINE_integer("steps", 20_000, "training steps")
OPTIONS = flags.DEFINE_multi_string("option", [], "a flag of csm_jax.finetune, such as --seed=1")

DEFAULTS = (
    "--batch_size=16",
    "--optimizer=muon",
    "--learning_rate=3e-3",
    "--weight_decay=0.1",
    "--depth_share=0.125",
    "--noremat",
    "--ema=0.998",
    "--holdout=0.002",
    "--eval_every=1000",
    "--save_every=500",
    "--guided_heads=3.0,3.3",
)
# Recordings between two looks at the clock.
CHUNK = 100


class Deadline:
    """The end of this call; never without minutes."""

    def __init__(self, minutes: float | None):
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def seconds_left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    @property
    def is_over(self) -> bool:
        return self.seconds_left == 0.0


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    if unknown := set(CHOSEN.value) - set(STAGES):
        raise InputError(f"--stages has {min(unknown)}, but must be of {', '.join(STAGES)}")
    out, deadline = Path(OUT.value), Deadline(MINUTES.value)
    out.mkdir(parents=True, exist_ok=True)
    make = {
        "untrained": make_untrained,
        "codes": make_codes,
        "conversations": make_conversations,
        "train": train,
        "package": package,
    }
    for stage in (stage for stage in STAGES if stage in CHOSEN.value):
        started = time.monotonic()
        make[stage](out, deadline)
        print(f"{stage}: {time.monotonic() - started:.0f} s", flush=True)
        if deadline.is_over:
            print("the time is over: the same command goes on from here")
            return


def utterances() -> list[Utterance]:
    if not SPEECH.value:
        raise InputError("--speech is missing: name a directory of synthesize_voice.py")
    return read_manifests(map(Path, SPEECH.value))[: FIRST.value]


def make_untrained(out: Path, _: Deadline) -> None:
    if (out / "untrained").exists():
        return
    if CODEC.value is None:
        raise InputError("--codec is missing: name weights of train_voice_codec.py")
    texts = [each.text for each in utterances() if not is_held_out_text(each.text)]
    write_untrained(out / "untrained", VOICE_MODEL, load_file(CODEC.value), texts)


def code_file(utterance: Utterance) -> str:
    """The file of an utterance's codes, relative to --out."""
    audio = utterance.audio
    number = [Path(each) for each in SPEECH.value].index(audio.parent.parent)
    return f"codes/{number}-{audio.parent.name}-{audio.stem}.npy"


def make_codes(out: Path, deadline: Deadline) -> None:
    (out / "codes").mkdir(exist_ok=True)
    missing = [each for each in utterances() if not (out / code_file(each)).exists()]
    if not missing:
        return
    model = csm_jax.load(out / "untrained")
    cache = CodeCache(out / "cache", model.codec, model.config.num_codebooks)
    for first in tqdm(range(0, len(missing), CHUNK), unit="chunk", disable=None):
        chunk = missing[first : first + CHUNK]
        codes = cache.codes([each.audio for each in chunk])
        for each in chunk:
            found = codes[each.audio]
            if isinstance(found, InputError):
                raise found
            replace_file(out / code_file(each), file_content(found))
        if deadline.is_over:
            return


def make_conversations(out: Path, _: Deadline) -> None:
    if (out / "train.jsonl").exists():
        return
    chosen = utterances()
    files = {each.audio: code_file(each) for each in chosen}
    write_conversations(
        out / "train.jsonl",
        chosen,
        count=COUNT.value,
        seconds=SECONDS.value,
        seed=0,
        files=files,
    )


def train(out: Path, deadline: Deadline) -> None:
    """Runs csm_jax.finetune; SIGTERM makes it write a checkpoint and end."""
    if (out / "run" / "model").exists():
        return
    command = [sys.executable, "-m", "csm_jax.finetune", "--from_scratch", *DEFAULTS]
    command += [f"--checkpoint={out / 'untrained'}", f"--data={out / 'train.jsonl'}"]
    command += [f"--out={out / 'run'}", f"--steps={STEPS.value}", *OPTIONS.value]
    process = subprocess.Popen(command)
    try:
        process.wait(deadline.seconds_left)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
    if process.returncode:
        raise SystemExit(process.returncode)


def package(out: Path, _: Deadline) -> None:
    """Writes the shipped form of a finished run."""
    if (out / "run" / "model").exists():
        write_shipped(out / "run" / "model", out / "shipped")
        print(f"{out / 'shipped'}: {megabytes(out / 'shipped'):.1f} MB")


if __name__ == "__main__":
    app.run(main)
