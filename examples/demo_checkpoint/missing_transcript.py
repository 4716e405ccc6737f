"""How well the demo follows a recording whose transcript is missing, in voice and in words.

    python examples/demo_checkpoint/missing_transcript.py

Speaks texts of five digits after a recording of each voice, with and without its transcript, and
counts the wrong words and the speeches in the voice of the recording, a man's or a woman's.
"""

from collections.abc import Sequence

import numpy as np
from hearing import median_pitch, recognize_digits

import csm_jax
from csm_jax.evaluate.word_errors import count_errors
from csm_jax.io.audio import load_audio
from csm_jax.loading import BUNDLED

PROMPTS = BUNDLED["demo"] / "prompts"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NUM_TEXTS, NUM_WORDS = 20, 5
# Between the voices of rms, a man, and slt, a woman.
PITCH_HZ = 130


def main() -> None:
    model = csm_jax.load("demo", dtype="float32")
    drawn = np.random.default_rng(0).choice(WORDS, (NUM_TEXTS, NUM_WORDS))
    texts = [" ".join(words) for words in drawn]
    for voice in ("rms", "slt"):
        recording = load_audio(PROMPTS / f"{voice}.flac", model.sample_rate)
        transcript = (PROMPTS / f"{voice}.txt").read_text().splitlines()[-1]
        contexts = {
            "with its transcript": [csm_jax.Segment(0, transcript, recording)],
            "without": [csm_jax.Segment(0, None, recording)],
            "no recording": [],
        }
        for name, context in contexts.items():
            wrong, same = _measure(model, texts, context, is_man=voice == "rms")
            print(f"{voice}, {name}: {wrong} of {drawn.size} words, {same} of {len(texts)} voices")


def _measure(
    model: csm_jax.Generator,
    texts: Sequence[str],
    context: Sequence[csm_jax.Segment],
    is_man: bool,
) -> tuple[int, int]:
    """The number of wrong words, and of speeches in the voice of the context."""
    requests = [csm_jax.Request(text, 0, context, seed=seed) for seed, text in enumerate(texts)]
    speech = model.generate_batch(requests)
    rate = model.sample_rate
    wrong = sum(
        count_errors(text.split(), recognize_digits(audio, rate)).errors
        for text, audio in zip(texts, speech, strict=True)
    )
    return wrong, sum((median_pitch(audio, rate) < PITCH_HZ) == is_man for audio in speech)


if __name__ == "__main__":
    main()
