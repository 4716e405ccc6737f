"""Evaluates a codec on held-out recordings, which are encoded and decoded.

    python examples/demo_checkpoint/judge_codec.py --speech=voice/speech \
        --weights=voice/codec/weights/010000.safetensors --picture=codec.png

The script prints a line for the recordings themselves and one for each file of weights: word error
rate (Whisper tiny.en), DNSMOS, mel distance in nepers, and the perplexity of the least and the most
used codebook.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags, logging
from codec_weights import read_weights
from sizes import VOICE_CODEC
from speech_set import Utterance, read_manifests
from texts import is_held_out_text

from csm_jax.evaluate.judges import QualityModel, Recognizer, load_dnsmos, load_whisper
from csm_jax.evaluate.normalization import load_normalizer
from csm_jax.evaluate.word_errors import count_errors
from csm_jax.io.audio import load_audio
from csm_jax.mimi.codec import Codec
from csm_jax.train.spectral import log_mel, mel_distance

SPEECH = flags.DEFINE_multi_string("speech", None, "a directory of speech; may be repeated")
WEIGHTS = flags.DEFINE_multi_string("weights", [], "codec weights; may be repeated")
COUNT = flags.DEFINE_integer("count", 40, "held-out utterances")
CODEBOOKS = flags.DEFINE_integer("codebooks", VOICE_CODEC.num_codebooks, "codebooks to decode")
PICTURE = flags.DEFINE_string("picture", None, "file for spectrograms of the first utterance")

RATE = VOICE_CODEC.sample_rate


class Figures(NamedTuple):
    """Measurements: word error rate, DNSMOS, mel distance in nepers."""

    errors: float
    opinion: float
    distance: float


@functools.cache
def _load_judges() -> tuple[Recognizer, QualityModel]:
    """Whisper tiny.en and DNSMOS."""
    return load_whisper("en", None), load_dnsmos(None)


def judge(
    utterances: Sequence[Utterance], recordings: Sequence[np.ndarray], decoded: Sequence[np.ndarray]
) -> Figures:
    """Measures decoded recordings against the recordings themselves."""
    recognize, score = _load_judges()
    normalize = load_normalizer("en")
    counts = [
        count_errors(normalize(u.text), normalize(recognize(audio, RATE)))
        for u, audio in zip(utterances, decoded, strict=True)
    ]
    errors = sum(each.errors for each in counts) / sum(each.words for each in counts)
    distances = [
        float(mel_distance(audio[None, : len(recording)], recording[None], RATE))
        for audio, recording in zip(decoded, recordings, strict=True)
    ]
    opinions = [score(audio, RATE) for audio in decoded]
    return Figures(errors, float(np.mean(opinions)), float(np.mean(distances)))


def perplexities(codes: Sequence[np.ndarray]) -> list[float]:
    """The perplexity of each codebook: how many equally likely entries would have its entropy."""
    found = []
    for column in np.concatenate(codes).T:
        shares = np.unique(column, return_counts=True)[1] / len(column)
        found.append(float(np.exp(-np.sum(shares * np.log(shares)))))
    return found


def draw(path: Path, titled: dict[str, np.ndarray]) -> None:
    """Draws log-mel spectrograms, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6 * len(titled)), layout="constrained")
    axes = figure.subplots(len(titled), squeeze=False)[:, 0]
    for axis, (title, audio) in zip(axes, titled.items(), strict=True):
        spectrum = np.asarray(log_mel(audio[None], RATE, 1024, 80))[0].T
        axis.imshow(spectrum, origin="lower", aspect="auto", vmin=-7, vmax=-1)
        axis.set(title=title, xticks=[], ylabel="mel band")
    figure.savefig(path, dpi=100)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    held = [u for u in read_manifests(map(Path, SPEECH.value)) if is_held_out_text(u.text)]
    utterances = held[: COUNT.value]
    recordings = [load_audio(each.audio, RATE) for each in utterances]
    pictures = {"recording": recordings[0]}
    print(f"{'':30}{'errors':>8}{'DNSMOS':>8}{'mel':>8}{'perplexity':>14}")
    figures = judge(utterances, recordings, recordings)
    print(f"{'recordings':30}{figures.errors:8.3f}{figures.opinion:8.2f}{figures.distance:8.3f}")
    for name in WEIGHTS.value:
        codec = Codec(VOICE_CODEC, read_weights(Path(name)))
        codes = [codec.encode(each, CODEBOOKS.value) for each in recordings]
        decoded = [codec.decode(each) for each in codes]
        pictures[name] = decoded[0]
        figures = judge(utterances, recordings, decoded)
        used = perplexities(codes)
        print(
            f"{name[-30:]:30}{figures.errors:8.3f}{figures.opinion:8.2f}{figures.distance:8.3f}"
            f"{min(used):7.0f}{max(used):7.0f}",
            flush=True,
        )
    if PICTURE.value:
        draw(Path(PICTURE.value), pictures)


if __name__ == "__main__":
    flags.mark_flag_as_required("speech")
    app.run(main)
