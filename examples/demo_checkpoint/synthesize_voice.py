"""Synthesizes the training data of the open-vocabulary voice with Kokoro-82M.

    apt install espeak-ng nodejs npm && pip install -e ".[synthesis]"
    python examples/demo_checkpoint/synthesize_voice.py --out=voice/speech --count=40000

An interrupted synthesis can be resumed: recordings in the manifests are kept. Use one process for
each core.
"""

import dataclasses
import json
import multiprocessing
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import books
import soundfile
from absl import app, flags
from kokoro import LONGEST, SAMPLE_RATE, Kokoro
from levels import level, trim
from phonemes import phonemes_of
from plan import Job, plan
from speech_set import read_lines
from tqdm import tqdm

from csm_jax.io.files import replace_file

OUT = flags.DEFINE_string("out", "voice/speech", "directory of the recordings and manifests")
CACHE = flags.DEFINE_string("cache", "voice/packages", "directory for npm packages")
COUNT = flags.DEFINE_integer(
    "count", 40_000, "utterances to plan; 2400 are about three hours of speech"
)
PROCESSES = flags.DEFINE_integer("processes", 2, "number of processes")
SPOKEN = flags.DEFINE_multi_string("spoken", [], "a manifest whose texts are excluded")
SEED = flags.DEFINE_integer("seed", 0, "seed of the plan")

PLAN = "plan.jsonl"


def make_plan(out: Path) -> list[Job]:
    """Reads the plan of a directory, or makes it."""
    path = out / PLAN
    if not path.exists():
        spoken = {line["text"] for name in SPOKEN.value for line in read_lines(Path(name))}
        paragraphs = list(books.paragraphs(Path(CACHE.value)))
        sentences = {
            sentence
            for paragraph in paragraphs
            for sentence in books.sentences(paragraph)
            if books.is_speakable(sentence)
        }
        parts = {part for paragraph in paragraphs for part in books.parts(paragraph)}
        jobs = plan(COUNT.value, list(sentences - spoken), list(parts), SEED.value)
        lines = "".join(json.dumps(dataclasses.asdict(job)) + "\n" for job in jobs)
        replace_file(path, lines.encode())
    return [Job(**line) for line in read_lines(path)]


def done(out: Path) -> set[int]:
    """The ids of jobs that are in a manifest."""
    return {line["id"] for path in out.glob("manifest*.jsonl") for line in read_lines(path)}


def speak_all(out: Path, cache: Path, jobs: list[Job], process: int) -> None:
    """Synthesizes jobs one after another; each adds a line to the manifest of this process."""
    kokoro = Kokoro(cache)
    manifest = out / f"manifest-{process:02}.jsonl"
    # An incomplete last line is ended, and its job is repeated.
    lines = "".join(json.dumps(line) + "\n" for line in read_lines(manifest))
    manifest.write_text(lines)
    with manifest.open("a") as file:
        for job in tqdm(jobs, disable=None if process == 0 else True):
            if line := speak(kokoro, out, job):
                file.write(json.dumps(line) + "\n")
                file.flush()


def speak(kokoro: Kokoro, out: Path, job: Job) -> dict | None:
    """Synthesizes a job to its file; returns its line, or None if it is too long."""
    phonemes = phonemes_of(job.spoken)
    if len(phonemes) > LONGEST:
        return None
    speech = kokoro.speak(phonemes, job.voice)
    audio, start = trim(speech.audio, SAMPLE_RATE)
    name = f"{job.voice}/{job.id:06}.ogg"
    path = out / name
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, level(audio), SAMPLE_RATE, format="OGG", subtype="OPUS")
    return {
        **dataclasses.asdict(job),
        "audio": name,
        "phonemes": phonemes,
        "durations": speech.durations,
        "start": start,
    }


def share(jobs: Iterable[Job], process: int, processes: int) -> list[Job]:
    return [job for job in jobs if job.id % processes == process]


def main(_: list[str]) -> None:
    # An exit also ends the workers; a signal alone does not.
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("stopped: run the same command again to resume")
    )
    out, cache = Path(OUT.value), Path(CACHE.value)
    out.mkdir(parents=True, exist_ok=True)
    jobs = make_plan(out)
    finished = done(out)
    left = [job for job in jobs if job.id not in finished]
    count = PROCESSES.value
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=speak_all, args=(out, cache, share(left, i, count), i), daemon=True)
        for i in range(count)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a process failed: run the same command again to resume")


if __name__ == "__main__":
    app.run(main)
