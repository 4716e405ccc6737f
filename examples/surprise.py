"""Plots how surprised a model is by speech, frame by frame and codebook by codebook.

    python examples/surprise.py --text="three one four" --out=surprise.png
    python examples/surprise.py --text="three one four" --audio=speech.wav --out=surprise.png

Surprise is the negative log-probability of a code, in nats. Without a recording the model speaks
the text first. The words stand where they are spoken if the checkpoint has alignment heads, as
`demo` has. It needs matplotlib: pip install "csm-jax[evaluate]".
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import csm_jax
from csm_jax.align.recordings import Recording, align
from csm_jax.inference.scores import Score
from csm_jax.io.audio import load_audio

# From so many nats on a code has the darkest color; an even choice among Mimi's ids has 7.6.
MOST_NATS = 8.0


def plot(score: Score, words: Sequence[csm_jax.Word], frame_ms: float) -> Figure:
    """The mean surprise of each frame over a map of all codes, with the words above both."""
    surprise = -score.log_probability  # [F, Q]
    num_frames, num_codebooks = surprise.shape
    seconds = num_frames * frame_ms / 1000
    figure = Figure(figsize=(max(7, 1.5 + 2 * seconds), 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.4))
    edges = np.linspace(0, seconds, num_frames + 1)
    upper.stairs(surprise.mean(axis=1), edges, label="all codebooks")
    upper.stairs(surprise[:, 0], edges, linestyle="--", label="codebook 0")
    upper.stairs(score.entropy.mean(axis=1), edges, color="gray", label="expected (entropy)")
    upper.set(ylabel="nats a code", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    shades = lower.imshow(
        surprise.T,
        aspect="auto",
        interpolation="nearest",
        origin="lower",
        extent=(0, seconds, -0.5, num_codebooks - 0.5),
        cmap="magma_r",
        vmin=0,
        vmax=MOST_NATS,
    )
    lower.set(xlabel="seconds", ylabel="codebook")
    lower.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(shades, ax=lower, label="nats", extend="max")
    for word in words:
        if word.spoken:
            for axes in (upper, lower):
                axes.axvspan(word.start, word.end, facecolor="none", edgecolor="black", alpha=0.4)
            place = (word.start + word.end) / 2, 1.03
            upper.text(*place, word.text, transform=upper.get_xaxis_transform(), ha="center")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--text", default="three one four")
    parser.add_argument("--audio", type=Path, help="a recording of the text")
    parser.add_argument("--speaker", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("surprise.png"))
    arguments = parser.parse_args(argv)

    model = csm_jax.load(arguments.checkpoint)
    text, speaker = arguments.text, arguments.speaker
    if arguments.audio is None:
        spoken = model.speak(text, speaker, seed=arguments.seed)
        codes, words = spoken.codes, list(spoken.words)
    else:
        audio = load_audio(arguments.audio, model.sample_rate)
        codes = model.encode(audio)
        words = align(model, Recording(text, audio, speaker)) if model.alignment else []
    score = model.score(text, codes, speaker)
    plot(score, words, model.config.frame_ms).savefig(arguments.out, dpi=120)
    print(f"{arguments.out}: {-score.total:.1f} nats in {len(codes)} frames and their end")


if __name__ == "__main__":
    main()
