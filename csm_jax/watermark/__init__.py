"""An inaudible mark in generated speech, by SilentCipher's networks.

    weights = watermark.find_weights()
    marked = watermark.embed(audio, 24_000, weights, key=(1, 2, 3, 4, 5))
    watermark.detect(marked, 24_000, weights).key

`Marker` does what `embed` does with a stream. BUILD.md has the decisions behind it.
"""

from csm_jax.watermark.checkpoint import Weights
from csm_jax.watermark.decision import Detection, Verdict
from csm_jax.watermark.finding import MODES, choose, convert, find_weights
from csm_jax.watermark.marking import Marker, Watermark, embed
from csm_jax.watermark.message import PUBLIC_KEY, check_key, parse_key
from csm_jax.watermark.reading import detect

__all__ = [
    "MODES",
    "PUBLIC_KEY",
    "Detection",
    "Marker",
    "Verdict",
    "Watermark",
    "Weights",
    "check_key",
    "choose",
    "convert",
    "detect",
    "embed",
    "find_weights",
    "parse_key",
]
