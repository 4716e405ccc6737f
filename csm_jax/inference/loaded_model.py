"""A model in memory, as the decode loop, the engine and the facade use it."""

import functools
import hashlib
from dataclasses import dataclass
from typing import Self

import jax
import numpy as np
from jax.sharding import Mesh

from csm_jax.checkpoints.alignment_heads import AlignmentHeads
from csm_jax.config import CSMConfig
from csm_jax.errors import InputError
from csm_jax.inference.config import DEFAULT_INFERENCE, InferenceConfig
from csm_jax.inference.voice import ModelIdentity
from csm_jax.mimi.codec import Codec
from csm_jax.model.kernels.choice import XLA
from csm_jax.model.layers import Array, Params
from csm_jax.model.precision import Precision
from csm_jax.prompt.tokenizer import Tokenizer

# 2 s each of digital silence and of noise at about -80 and -60 dBFS.
SILENCE_FRAMES = 25
SILENCE_LEVELS = (0.0, 1e-4, 1e-3)
# Numbers of a parameter by which models are told apart.
_SAMPLED = 64


@dataclass(frozen=True, eq=False, repr=False)
class LoadedModel:
    """A model in memory, with its tokenizer and its codec.

    Attributes:
      config: the model's sizes.
      params: of the backbone and the depth decoder.
      tokenizer: text to ids.
      codec: Mimi, `encode(audio)` and `decode(codes)`.
      precision: the types that `params` are held and computed in.
      mesh: the devices that `params` lie on; None for a single one.
      inference: how requests are split, limited and batched.
      alignment: the heads that tell which word is spoken; None where the checkpoint has none.
      name: what it was loaded by.
      kernels: that frames are computed in, as `kernels.choose` returns them.
    """

    config: CSMConfig
    params: Params
    tokenizer: Tokenizer
    codec: Codec
    precision: Precision
    mesh: Mesh | None = None
    inference: InferenceConfig = DEFAULT_INFERENCE
    alignment: AlignmentHeads | None = None
    name: str = "a model without a name"
    kernels: str = XLA

    @classmethod
    def from_params(
        cls,
        config: CSMConfig,
        params: Params,
        tokenizer: Tokenizer,
        precision: Precision,
        mesh: Mesh | None = None,
        alignment: AlignmentHeads | None = None,
        inference: InferenceConfig = DEFAULT_INFERENCE,
        name: str = "a model without a name",
        kernels: str = XLA,
    ) -> Self:
        """A model of parameters in two sections, as `native_format.place_params` returns them.

        Raises:
          CheckpointError: the codec has more than one channel.
        """
        codec = Codec(config.codec, params["codec"])
        csm = params["csm"]
        return cls(
            config, csm, tokenizer, codec, precision, mesh, inference, alignment, name, kernels
        )

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        devices = sorted({str(device.platform) for leaf in leaves for device in leaf.devices()})
        count = len({device for leaf in leaves for device in leaf.devices()})
        facts = [
            f"{_readable(sum(leaf.size for leaf in leaves))} parameters",
            str(self.precision.weights),
            *["int8 weights"] * self.precision.int8,
            f"{count} device{'s' * (count != 1)}: {', '.join(devices)}",
        ]
        return f"{type(self).__name__}({', '.join(facts)})"

    @property
    def sample_rate(self) -> int:
        """Hz of everything that comes out and of all context audio (24000)."""
        return self.config.codec.sample_rate

    @functools.cached_property
    def identity(self) -> ModelIdentity:
        """What keys and values of this model depend on."""
        sampled = jax.device_get(_sample(self.params))
        digest = hashlib.sha256()
        for path, values in jax.tree.leaves_with_path(sampled):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(values).view(np.uint8).data)
        return ModelIdentity(self.name, self.config, str(self.precision), digest.hexdigest())

    def check_alignment(self) -> AlignmentHeads:
        """The heads that tell which word is spoken. Raises `InputError` if there are none."""
        if self.alignment is None:
            raise InputError(
                "the checkpoint has no alignment.json, so nothing tells where its speech is in the "
                "text: python -m csm_jax.align --calibrate makes one, and demo has one"
            )
        return self.alignment

    def encode(self, audio: np.ndarray) -> np.ndarray:
        """Audio, float [num_samples] at `sample_rate`, to codes int32 [num_frames, Q] as a prompt
        takes them."""
        return self.codec.encode(audio, self.config.num_codebooks)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Generated codes, int [num_frames, Q], to audio, float32 [num_samples].

        Ids beyond the codec's codebook, which a model can generate, are clamped (`Codec.clamp`);
        `codec.decode` refuses them.
        """
        return self.codec.decode(self.codec.clamp(codes))

    @functools.cached_property
    def silent_frame(self) -> np.ndarray:
        """The codes of digital silence, int32 [Q], once the codec has settled."""
        silence = np.zeros(SILENCE_FRAMES * self.codec.frame_size, np.float32)
        return self.encode(silence)[-1]

    @functools.cached_property
    def silent_codes(self) -> frozenset[int]:
        """The codebook-0 codes of silence, found by encoding it: digital, and with faint noise."""
        noise = np.random.default_rng(0).standard_normal(SILENCE_FRAMES * self.codec.frame_size)
        silences = [(level * noise).astype(np.float32) for level in SILENCE_LEVELS]
        return frozenset(int(code) for row in self.codec.encode(silences, 1) for code in row[:, 0])


@jax.jit
def _sample(params: Params) -> Params:
    """A few numbers of every parameter, evenly spaced in it."""

    def sample(leaf: Array) -> Array:
        places = np.linspace(0, leaf.size - 1, _SAMPLED).astype(int)
        return leaf[np.unravel_index(places, leaf.shape)]

    return jax.tree.map(sample, params)


def _readable(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
