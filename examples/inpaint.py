"""Draws a part of some speech again, and keeps all before and after it.

    python examples/inpaint.py --text="three one four" --start=0.4 --end=0.8

The frames outside of the part are forced, and so is the end. The model draws the part from its text
and from what is before it; it does not know what comes after. With --codebook0 the part keeps its
codes of codebook 0, which carry the words, and only the others are drawn: the same words in another
sound.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import csm_jax
from csm_jax.io.audio import save_audio


def forced_around(codes: np.ndarray, start: int, end: int, codebook0: bool) -> np.ndarray:
    """Codes [F, Q] and their end, without those of the frames from `start` to `end`."""
    forced = np.concatenate([codes, np.zeros((1, codes.shape[1]), codes.dtype)])
    forced[start:end, int(codebook0) :] = -1
    return forced


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--text", default="three one four")
    parser.add_argument("--speaker", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=float, default=0.4, help="seconds")
    parser.add_argument("--end", type=float, default=0.8, help="seconds")
    parser.add_argument("--codebook0", action="store_true", help="keep the codes of codebook 0")
    parser.add_argument("--before", type=Path, default=Path("before.wav"))
    parser.add_argument("--after", type=Path, default=Path("after.wav"))
    arguments = parser.parse_args(argv)

    model = csm_jax.load(arguments.checkpoint)
    text, speaker, seed = arguments.text, arguments.speaker, arguments.seed
    before = model.generate_codes(text, speaker, seed=seed)
    start, end = (
        min(round(1000 * seconds / model.config.frame_ms), len(before))
        for seconds in (arguments.start, arguments.end)
    )
    forced = forced_around(before, start, end, arguments.codebook0)
    changes = csm_jax.Interventions(forced)
    after = model.generate_codes(text, speaker, seed=seed + 1, interventions=changes)
    for path, codes in ((arguments.before, before), (arguments.after, after)):
        save_audio(path, model.decode(codes), model.sample_rate)
    changed = int((before != after).sum())
    print(f"{end - start} of {len(after)} frames were drawn again; {changed} codes have changed")


if __name__ == "__main__":
    main()
