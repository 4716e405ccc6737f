"""Measures the error of narrow weights: logit errors, and the share of unchanged greedy codes.

    python examples/quantization_cost.py [--checkpoint=random:csm_1b] [--frames=25]

A float32 model generates greedily; its frames are then the inputs of the model in each narrow
precision (teacher forcing), so that one early difference is not counted again. The program prints
a JSON line for each precision. With random weights the result shows rounding errors, not the
quality of speech.
"""

import argparse
import functools
import json

import jax
import numpy as np

import csm_jax
from csm_jax.config import CSMConfig
from csm_jax.model.csm import bind
from csm_jax.model.teacher_forcing import frame_logits
from csm_jax.prompt.turns import text_rows

PRECISIONS = {"bfloat16": ("bfloat16", "none"), "int8": ("auto", "int8")}


@functools.partial(jax.jit, static_argnames="config")
def spoken_logits(params, frames, mask, codes, *, config: CSMConfig):
    """Logits float32 [num_frames, Q, V] of the frames [num_frames, Q] after a prompt."""
    model = bind(config, params)
    hidden = model.hidden(frames[None], mask[None])
    return frame_logits(model, hidden[0, -len(codes) - 1 : -1], codes)


def spoken_rows(config: CSMConfig, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    frames = np.pad(codes, ((0, 0), (0, 1)))
    mask = np.ones(frames.shape, bool)
    mask[:, -1] = False
    return frames, mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="random:csm_1b")
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--text", default="The quick brown fox jumps over the lazy dog.")
    arguments = parser.parse_args()

    model = csm_jax.load(arguments.checkpoint, "float32")
    config, tokenizer = model.config, model.tokenizer
    codes = model.generate_codes(
        arguments.text,
        sampling=csm_jax.Sampling(greedy=True),
        max_audio_length_ms=arguments.frames * config.frame_ms,
    )
    parts = text_rows(arguments.text, 0, config, tokenizer), spoken_rows(config, codes)
    frames, mask = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    expected = np.asarray(spoken_logits(model.params, frames, mask, codes, config=config))
    del model  # 6.6 GB at full size

    for name, (dtype, quantize) in PRECISIONS.items():
        narrow = csm_jax.load(arguments.checkpoint, dtype, quantize).params
        logits = np.asarray(spoken_logits(narrow, frames, mask, codes, config=config))
        error = np.abs(logits - expected)
        unchanged = logits.argmax(-1) == expected.argmax(-1)
        figures = {
            "checkpoint": arguments.checkpoint,
            "precision": name,
            "frames": len(codes),
            "logit_error_rms": float(np.sqrt(np.mean(error**2)) / expected.std()),
            "logit_error_max": float(error.max() / np.abs(expected).max()),
            "unchanged_codes": float(unchanged.mean()),
            "unchanged_codebook0": float(unchanged[:, 0].mean()),
        }
        print(
            json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()})
        )


if __name__ == "__main__":
    main()
