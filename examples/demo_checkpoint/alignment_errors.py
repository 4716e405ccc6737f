"""Measures word times of the demo checkpoint against an independent aligner, pocketsphinx.

    apt install flite && pip install pocketsphinx
    python examples/demo_checkpoint/alignment_errors.py

It prints errors of word starts and ends, in milliseconds: of whole speech, and of words as a stream
reports them. The aligner's own error is that on
recordings of flite, whose times are known.
"""

import dataclasses
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from flite import VOICES
from judge import draw_requests
from pocketsphinx import Decoder
from scipy.signal import resample_poly
from texts import draw_digits
from timed_speech import record, synthesize_with_times

import csm_jax
from csm_jax.inference.alignment.words import Word
from csm_jax.io.audio import load_audio
from csm_jax.io.samples import SAMPLE_RATE

CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "as for csm_jax.generate")
COUNT = flags.DEFINE_integer("count", 200, "utterances without, and as many with a context")
SEED = flags.DEFINE_integer("seed", 7, "seed of the texts and the speech")
BATCH = flags.DEFINE_integer("batch", 16, "requests in a batch")

# What pocketsphinx calls silence and noise.
FILLERS = ("<s>", "</s>", "<sil>", "(NULL)")


def align(decoder: Decoder, audio: np.ndarray, text: str) -> np.ndarray | None:
    """Starts and ends of the words by pocketsphinx, seconds [W, 2]; None if it finds no path."""
    decoder.set_align_text(text)
    samples = np.clip(resample_poly(audio, 2, 3), -1, 1)
    decoder.start_utt()
    decoder.process_raw((samples * 32767).astype(np.int16).tobytes(), full_utt=True)
    decoder.end_utt()
    words = [
        (segment.start_frame / 100, (segment.end_frame + 1) / 100)
        for segment in decoder.seg() or ()
        if segment.word not in FILLERS and not segment.word.startswith("[")
    ]
    return np.array(words) if len(words) == len(text.split()) else None


def speak(
    model: csm_jax.Generator, requests: Sequence[csm_jax.Request]
) -> list[tuple[np.ndarray, list[Word], list[Word]]]:
    """Audio, words, and the words that were reported while it was generated."""
    results = []
    with csm_jax.Engine(model, BATCH.value) as engine:
        submitted = []
        for request in requests:
            streamed: list[Word] = []
            ticket = engine.submit(request, stream=False, wait=True, on_word=streamed.append)
            submitted.append((ticket, streamed))
        for ticket, streamed in submitted:
            results.append((ticket.result(), ticket.words(), streamed))
    return results


def report(name: str, errors: Sequence[float]) -> None:
    size = 1000 * np.abs(errors)
    print(
        f"{name}: mean absolute error {size.mean():.1f} ms, median {np.median(size):.1f}, "
        f"p95 {np.percentile(size, 95):.1f} ({len(size)} words)"
    )


def compare(name: str, decoder: Decoder, results: list, texts: Sequence[str]) -> None:
    starts, ends, streamed_starts, failed = [], [], [], 0
    for text, (audio, words, streamed) in zip(texts, results, strict=True):
        expected = align(decoder, audio, text)
        if expected is None:
            failed += 1
            continue
        starts += list(np.array([word.start for word in words]) - expected[:, 0])
        ends += list(np.array([word.end for word in words]) - expected[:, 1])
        streamed_starts += list(np.array([word.start for word in streamed]) - expected[:, 0])
    report(f"{name}, word starts", starts)
    report(f"{name}, word ends", ends)
    report(f"{name}, word starts of streams", streamed_starts)
    print(f"{name}: not aligned by pocketsphinx: {failed} of {len(texts)}")


def own_error(decoder: Decoder, count: int) -> list[float]:
    """Errors of pocketsphinx on recordings of flite."""
    source, errors = random.Random("own error"), []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "speech.wav"
        for index in range(count):
            text = draw_digits(source, 3, 6, held_out=True)
            expected = synthesize_with_times(text, VOICES[index % 2], path)
            found = align(decoder, load_audio(path, SAMPLE_RATE), text)
            if found is not None:
                errors += list(found[:, 0] - expected)
    return errors


def main(_: list[str]) -> None:
    model = csm_jax.load(CHECKPOINT.value, dtype="float32")
    decoder = Decoder(lm=None, loglevel="FATAL", samprate=16_000)
    report("pocketsphinx on recordings of flite, word starts", own_error(decoder, 100))
    requests = draw_requests(COUNT.value, SEED.value)
    texts = [request.text for request in requests]
    compare("alone", decoder, speak(model, requests), texts)
    contexts = [
        csm_jax.Segment(recording.speaker, recording.text, recording.audio)
        for recording in record(COUNT.value, SEED.value)
    ]
    in_context = [
        dataclasses.replace(request, context=[segment])
        for request, segment in zip(requests, contexts, strict=True)
    ]
    compare("after a context", decoder, speak(model, in_context), texts)


if __name__ == "__main__":
    app.run(main)
