"""The facade: load a model by name, give it text, get sound."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax import checkpoint, hub
from csm_jax import config as presets
from csm_jax.config import CSMConfig
from csm_jax.convert.layouts import Checkpoint, open_checkpoint
from csm_jax.errors import CheckpointError, InputError
from csm_jax.generation import generate
from csm_jax.mimi.codec import Codec
from csm_jax.prompt import Segment, build_prompt
from csm_jax.sampling import Sampling
from csm_jax.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

Params = dict[str, Any]

RANDOM = {"random:tiny": presets.tiny, "random:csm_1b": presets.csm_1b}
DEFAULT_SAMPLING = Sampling()
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Generator:
    """A loaded model.

    Attributes:
      config: the model's sizes.
      codec: Mimi, `encode(audio)` and `decode(codes)`.
      tokenizer: text to ids.
    """

    def __init__(self, config: CSMConfig, params: Params, tokenizer: Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self.codec = Codec(config.codec, params["codec"])
        self._params = params["csm"]

    @property
    def sample_rate(self) -> int:
        """Hz of everything that comes out and of all context audio (24000)."""
        return self.config.codec.sample_rate

    def generate(
        self,
        text: str,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        sampling: Sampling = DEFAULT_SAMPLING,
        max_audio_length_ms: float = 10_000,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Speaks `text` as the next turn of a conversation.

        Args:
          text: what to say.
          speaker: whose turn it is; the same number as in `context` continues that voice.
          context: the turns so far, oldest first.
          sampling: how codes are drawn.
          max_audio_length_ms: the speech is cut there if it has not ended by itself.
          seed: the same seed and arguments give the same speech.
          progress: called now and then with the number of 80 ms frames so far.

        Returns:
          float32 [num_samples] at `sample_rate`; empty if the model ends at once.

        Raises:
          InputError: text or context that is empty, malformed or does not fit.
        """
        codes = self.generate_codes(
            text, speaker, context, sampling, max_audio_length_ms, seed, progress
        )
        return self.decode(codes)

    def generate_codes(
        self,
        text: str,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        sampling: Sampling = DEFAULT_SAMPLING,
        max_audio_length_ms: float = 10_000,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Like `generate`, but returns the codes: int32 [num_frames, Q], without the last frame
        of zeros that says the end."""
        max_frames = self.max_frames(max_audio_length_ms)
        prompt = build_prompt(
            text, speaker, context, self.config, self.tokenizer, self._encode, max_frames
        )
        rows = generate(
            self.config, self._params, [prompt], [sampling], [seed], max_frames, progress
        )
        return rows[0]

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes [num_frames, Q] of `generate_codes` to audio, float32 [num_samples].

        The model's vocabulary has a few ids that are no codes; a model with sense never says
        them, and the codec reads them as its last code.
        """
        return self.codec.decode(np.minimum(codes, self.config.codec.codebook_size - 1))

    def max_frames(self, max_audio_length_ms: float) -> int:
        """Whole frames in a duration; raises `InputError` if there is not one."""
        frames = max_audio_length_ms / self.config.frame_ms
        if not 1 <= frames < math.inf:
            raise InputError(
                f"max_audio_length_ms is {max_audio_length_ms:g}, but one frame takes "
                f"{self.config.frame_ms:g}"
            )
        return int(frames)

    def _encode(self, audio: np.ndarray) -> np.ndarray:
        return self.codec.encode(audio, self.config.num_codebooks)


def load(name: str | Path, dtype: str = "auto") -> Generator:
    """Loads a model.

    Args:
      name: a Hugging Face repository such as "sesame/csm-1b", which is downloaded and converted
        on the first call; a directory in any of the layouts; "random:tiny" or "random:csm_1b",
        random weights that need no download and make noise.
      dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 where the hardware computes in
        it, float16 on older GPUs, float32 on a CPU. The codec is float32 always.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    weight_type = resolve_dtype(dtype)
    if name in RANDOM:
        config = RANDOM[name]()
        params = checkpoint.random_params(config, weight_type)
        return Generator(config, params, byte_tokenizer(config))
    directory = _directory(str(name))
    if checkpoint.is_native(directory):
        config = checkpoint.load_config(directory)
        params = checkpoint.load_params(directory, config, weight_type)
    else:
        opened = open_checkpoint(directory)
        config = opened.config
        params = params_of(opened, weight_type)
    return Generator(config, params, load_tokenizer(directory, config))


def resolve_dtype(name: str) -> jnp.dtype:
    """The type that "auto" stands for on this machine, or the one named."""
    if name == "auto":
        name = _best_dtype(jax.devices()[0])
    if name not in checkpoint.DTYPES:
        raise InputError(f"dtype is {name}, but must be auto, float32, bfloat16 or float16")
    return jnp.dtype(name)


def _best_dtype(device: jax.Device) -> str:
    if device.platform == "cpu":
        return "float32"
    capability = getattr(device, "compute_capability", None)
    # Before Ampere (8.0), for one on the T4, CUDA emulates bfloat16.
    is_old_gpu = device.platform == "gpu" and capability and float(capability) < 8
    return "float16" if is_old_gpu else "bfloat16"


def _directory(name: str) -> Path:
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    if _HUB_NAME.fullmatch(name) and not name.startswith((".", "~")):
        return hub.native_copy(name)
    raise CheckpointError(
        f"checkpoint {name} is neither a directory nor a hub name such as sesame/csm-1b, nor one "
        f"of {', '.join(RANDOM)}"
    )


def params_of(opened: Checkpoint, dtype: jnp.dtype) -> Params:
    """Reads a published layout straight onto the device, without a native copy."""
    shapes = checkpoint.param_shapes(opened.config, dtype)
    flat = checkpoint.flatten(shapes)
    tensors = opened.tensors(flat)
    placed = {path: jnp.asarray(tensor, flat[path].dtype) for path, tensor in tensors}
    return checkpoint.unflatten(placed, shapes)
