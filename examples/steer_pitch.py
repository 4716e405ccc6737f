"""Finds a direction of the backbone in which voices differ, and steers one voice along it.

    python examples/steer_pitch.py --layer=4 --strengths=0,1,2

Two voices speak the same texts. The difference of their mean states at a layer, while they speak,
is the vector; it is added to that layer while the first voice speaks other texts. The program
prints the median pitch of the speech by strength: it moves to that of the second voice. That takes
more than the whole difference, because the prompt, which is not steered, names the first voice.
"""

import argparse
from collections.abc import Sequence

import numpy as np

import csm_jax

FOUND_WITH = ["one two three", "four five six", "seven eight nine"]
SPOKEN = ["three one four", "five nine two", "six eight seven"]
LOWEST_HZ, HIGHEST_HZ = 70, 350


def mean_state(model: csm_jax.Generator, speaker: int, layer: int) -> np.ndarray:
    """The mean state [D] of a layer, over the positions that predict frames."""
    means = []
    for text in FOUND_WITH:
        codes = model.generate_codes(text, speaker, seed=1)
        states = model.states(text, codes, speaker, backbone=[layer])
        means.append(states.backbone.values[0, states.start - 1 : -2].mean(axis=0))
    return np.mean(means, axis=0)


def median_pitch(audio: np.ndarray, sample_rate: int) -> float:
    """Hz, by autocorrelation, of the pieces of 40 ms that have a clear pitch."""
    size, pitches = int(0.04 * sample_rate), []
    shortest, longest = sample_rate // HIGHEST_HZ, sample_rate // LOWEST_HZ
    for start in range(0, len(audio) - size, size // 2):
        piece = audio[start : start + size] - audio[start : start + size].mean()
        products = np.correlate(piece, piece, "full")[size - 1 :]
        # Fewer samples overlap at longer lags.
        products *= size / np.arange(size, 0, -1)
        lag = shortest + int(np.argmax(products[shortest:longest]))
        if products[lag] > 0.5 * products[0] > 1e-3:
            pitches.append(sample_rate / lag)
    return float(np.median(pitches)) if pitches else float("nan")


def main(argv: Sequence[str] | None = None) -> dict[float, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--layer", type=int, default=4, help="counted from 1")
    parser.add_argument("--speakers", default="0,1", help="from which voice to which")
    parser.add_argument("--strengths", default="0,1,2")
    arguments = parser.parse_args(argv)

    model = csm_jax.load(arguments.checkpoint)
    start, end = map(int, arguments.speakers.split(","))
    vector = mean_state(model, end, arguments.layer) - mean_state(model, start, arguments.layer)
    pitches = {}
    for strength in map(float, arguments.strengths.split(",")):
        steering = [csm_jax.Steering(arguments.layer, vector, strength)]
        changes = csm_jax.Interventions(steering=steering)
        requests = [csm_jax.Request(text, start, seed=2, interventions=changes) for text in SPOKEN]
        audio = np.concatenate(model.generate_batch(requests))
        pitches[strength] = median_pitch(audio, model.sample_rate)
        print(f"strength {strength:g}: {pitches[strength]:.0f} Hz")
    return pitches


if __name__ == "__main__":
    main()
