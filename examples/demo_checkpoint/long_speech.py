"""How well minutes of speech keep a cloned voice and their words, by the context of their parts.

    python examples/demo_checkpoint/long_speech.py --minutes=5 --context_seconds=10,30,inf

Speaks digits in sentences of five, as one long text after a recording of each voice, and prints for
every half minute the share of wrong words, the pitch, and the speaker similarity to the recording.
Speaker 0 gets the voice of rms, and speaker 1 that of slt: each number the voice of the other one,
so a voice that is lost is heard. Needs `pip install -e ".[evaluate]" pocketsphinx`.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from hearing import median_pitch, recognize_digits
from texts import DIGITS

import csm_jax
from csm_jax.evaluate.judges import SpeakerEncoder, load_resemblyzer
from csm_jax.evaluate.word_errors import count_errors
from csm_jax.inference.alignment.words import Word
from csm_jax.io.audio import load_audio
from csm_jax.loading import BUNDLED

CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "as for csm_jax.generate")
MINUTES = flags.DEFINE_float("minutes", 5.0, "about how long a text is spoken")
CONTEXT = flags.DEFINE_list("context_seconds", ["default"], "values to compare, such as 10,30,inf")
CHARACTERS = flags.DEFINE_integer("part_characters", None, "longest part; default: the model's")
SEEDS = flags.DEFINE_integer("seeds", 2, "speeches of each voice")
JSON = flags.DEFINE_string("json", None, "file that gets a line for each half minute")

PROMPTS = BUNDLED["demo"] / "prompts"
VOICES = ("rms", "slt")
WORDS_OF_SENTENCE = 5
# What the demo needs for a digit and the pauses around it.
SECONDS_OF_WORD = 0.42
BIN_SECONDS = 30


def draw_text(minutes: float, seed: int) -> str:
    """Sentences of digits that take about so many minutes."""
    source = np.random.default_rng(seed)
    count = round(60 * minutes / SECONDS_OF_WORD / WORDS_OF_SENTENCE)
    drawn = source.choice(DIGITS, (count, WORDS_OF_SENTENCE))
    return " ".join(" ".join(words) + "." for words in drawn)


def draw_requests(rate: int) -> dict[tuple[str, str, int], csm_jax.Request]:
    """The requests by the length of their context, their voice and their seed."""
    requests = {}
    for seconds, voice, seed in itertools.product(CONTEXT.value, VOICES, range(SEEDS.value)):
        options = {} if seconds == "default" else {"context_seconds": float(seconds)}
        speaker = VOICES.index(voice)
        transcript = (PROMPTS / f"{voice}.txt").read_text().splitlines()[-1]
        prompt = csm_jax.Segment(speaker, transcript, read_prompt(voice, rate))
        text = draw_text(MINUTES.value, seed)
        key = seconds, voice, seed
        requests[key] = csm_jax.Request(text, speaker, [prompt], seed=seed, **options)
    return requests


def read_prompt(voice: str, rate: int) -> np.ndarray:
    return load_audio(PROMPTS / f"{voice}.flac", rate)


def measure(
    audio: np.ndarray, words: Sequence[Word], prompt: np.ndarray, rate: int, embed: SpeakerEncoder
) -> Iterator[dict[str, float]]:
    """The figures of every half minute."""
    for second in range(0, int(len(audio) / rate), BIN_SECONDS):
        piece = audio[second * rate : (second + BIN_SECONDS) * rate]
        if len(piece) < rate * BIN_SECONDS / 2:
            return
        texts = [
            word.text.strip(".")
            for word in words
            if second <= (word.start + word.end) / 2 < second + BIN_SECONDS
        ]
        yield {
            "second": second,
            "words": len(texts),
            "errors": count_errors(texts, recognize_digits(piece, rate)).errors,
            "pitch": median_pitch(piece, rate),
            "similarity": float(embed(piece, rate) @ embed(prompt, rate)),
        }


def evaluate(model: csm_jax.Generator) -> list[dict[str, Any]]:
    """Speaks all requests side by side, and measures their speech."""
    rate, embed, rows = model.sample_rate, load_resemblyzer(None), []
    requests = draw_requests(rate)
    with csm_jax.Engine(model, max_batch=len(requests)) as engine:
        tickets = {key: engine.submit(each, stream=False) for key, each in requests.items()}
        audio = {key: ticket.result() for key, ticket in tickets.items()}
    for (seconds, voice, seed), ticket in tickets.items():
        given = audio[seconds, voice, seed], ticket.words(), read_prompt(voice, rate)
        more = {"context": seconds, "voice": voice, "seed": seed}
        rows += [more | row for row in measure(*given, rate, embed)]
    return rows


def print_table(seconds: str, rows: list[dict[str, Any]]) -> None:
    print(f"context_seconds={seconds}")
    print(f"{'second':>8}{'wrong':>8}{'similarity':>12}{'  pitch of'} {', '.join(VOICES)}")
    for second in [*sorted({row["second"] for row in rows}), None]:
        inside = [row for row in rows if second in (row["second"], None)]
        wrong = sum(row["errors"] for row in inside) / sum(row["words"] for row in inside)
        similarity = np.mean([row["similarity"] for row in inside])
        pitches = [
            np.nanmedian([row["pitch"] for row in inside if row["voice"] == voice] or [np.nan])
            for voice in VOICES
        ]
        label = "all" if second is None else second
        print(f"{label:>8}{wrong:8.3f}{similarity:12.3f}{pitches[0]:10.0f}{pitches[1]:6.0f}")


def main(_: list[str]) -> None:
    model = csm_jax.load(CHECKPOINT.value, dtype="float32")
    if CHARACTERS.value is not None:
        inference = dataclasses.replace(model.inference, max_part_characters=CHARACTERS.value)
        model = dataclasses.replace(model, inference=inference)
    rows = evaluate(model)
    for seconds in CONTEXT.value:
        print_table(seconds, [row for row in rows if row["context"] == seconds])
    if JSON.value:
        Path(JSON.value).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    app.run(main)
