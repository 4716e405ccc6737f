"""Sizes of the model and the codec: frozen dataclasses, with presets and a JSON form.

`csm_1b()` is the released model (SesameAILabs/csm `models.py`, kyutai-labs/moshi `loaders.py`),
`miso_8b()` a larger one of the same architecture (MisoLabsAI/MisoTTS `models.py`, `generator.py`);
`tiny()` has deliberately odd sizes, so that nothing hard-coded survives the tests.
"""

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csm_jax.errors import CheckpointError
from csm_jax.io.contents import explain


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling: long wavelengths are slowed by `factor`, short ones are kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self):
        if self.low_freq_factor >= self.high_freq_factor:
            raise CheckpointError(
                f"low_freq_factor {self.low_freq_factor} of RoPE is not below its high_freq_factor "
                f"{self.high_freq_factor}"
            )


@dataclass(frozen=True)
class LlamaConfig:
    """One Llama stack; the backbone and the depth decoder are two of these."""

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"head_dim {self.head_dim} is odd, but RoPE rotates pairs of its dimensions"
            )


@dataclass(frozen=True)
class MimiConfig:
    """The Mimi codec. `ratios` are the strides of the encoder, from the waveform on."""

    sample_rate: int = 24_000
    channels: int = 1
    num_filters: int = 64
    ratios: tuple[int, ...] = (4, 5, 6, 8)
    kernel_size: int = 7
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    num_residual_layers: int = 1
    dilation_growth: int = 2
    compress: int = 2
    embed_dim: int = 512
    num_layers: int = 8
    num_heads: int = 8
    mlp_dim: int = 2048
    attention_window: int = 250
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    downsample_stride: int = 2
    num_codebooks: int = 32
    num_semantic_codebooks: int = 1
    codebook_size: int = 2048
    codebook_dim: int = 256

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def hop_length(self) -> int:
        """Samples per position of the codec's transformers (960: 25 Hz)."""
        return math.prod(self.ratios)

    @property
    def frame_size(self) -> int:
        """Samples per code frame (1920: 12.5 Hz)."""
        return self.hop_length * self.downsample_stride


@dataclass(frozen=True)
class TextTokenIds:
    """Ids of special tokens of the text vocabulary.

    `audio` and `audio_eos` stand for audio frames in the Hugging Face chat template. The model
    never embeds them; they are kept so that a checkpoint can be exported.
    """

    bos: int = 128_000
    eos: int = 128_001
    audio: int = 128_002
    audio_eos: int = 128_003


@dataclass(frozen=True)
class CSMConfig:
    """The whole model: backbone, depth decoder, vocabularies, codec and what it was trained with.

    Attributes:
      space_after_speaker: whether the text of a turn is "[0] Hello", without other spaces before
        it, instead of "[0]Hello".
      default_max_audio_length_ms: where speech is cut if a request does not say it and its text
        cannot need more.
    """

    backbone: LlamaConfig
    depth_decoder: LlamaConfig
    codec: MimiConfig
    text_vocab_size: int = 128_256
    audio_vocab_size: int = 2051
    num_codebooks: int = 32
    text_token_ids: TextTokenIds = field(default_factory=TextTokenIds)
    space_after_speaker: bool = False
    default_max_audio_length_ms: int = 10_000

    def __post_init__(self):
        if not 2 <= self.num_codebooks <= self.codec.num_codebooks:
            raise CheckpointError(
                f"num_codebooks {self.num_codebooks} is outside 2..{self.codec.num_codebooks}, "
                "the codebooks of the codec"
            )
        if self.audio_vocab_size < self.codec.codebook_size:
            raise CheckpointError(
                f"audio_vocab_size {self.audio_vocab_size} is smaller than the codec's codebook "
                f"size {self.codec.codebook_size}"
            )

    @property
    def frame_ms(self) -> float:
        """Milliseconds of audio per frame (80)."""
        return 1000 * self.codec.frame_size / self.codec.sample_rate

    def to_dict(self) -> dict[str, Any]:
        """All fields as nested dictionaries, for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "CSMConfig":
        """Reads what `to_dict` wrote.

        Raises:
          CheckpointError: a field is missing, unknown or of a wrong type.
        """
        if not isinstance(values, dict):
            raise CheckpointError(f"config.json has config={values!r}, but it must be an object")
        return _build(
            CSMConfig,
            values,
            backbone=_build_llama(values.get("backbone")),
            depth_decoder=_build_llama(values.get("depth_decoder")),
            codec=_build(MimiConfig, values.get("codec")),
            text_token_ids=_build(TextTokenIds, values.get("text_token_ids")),
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a `CheckpointError` that says what is wrong with the file."""
    try:
        values = json.loads(path.read_bytes())  # of any Unicode encoding
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: it tells the sizes of the model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {explain(error, path)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return values


def check_integer(where: str, value: Any, least: int = 1) -> int:
    """Returns a whole number; raises `CheckpointError` for anything else, or one below `least`."""
    if type(value) is not int or value < least:
        raise CheckpointError(
            f"{where} is {value!r}, but must be a whole number of at least {least}"
        )
    return value


def check_number(where: str, value: Any) -> float:
    """Returns a number; raises `CheckpointError` for anything else, or one that is not above 0."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"{where} is {value!r}, but must be a number above 0")
    return value


def check_boolean(where: str, value: Any) -> bool:
    """Returns True or False; raises `CheckpointError` for anything else."""
    if not isinstance(value, bool):
        raise CheckpointError(f"{where} is {value!r}, but must be true or false")
    return value


def _build_llama(values: Any) -> LlamaConfig:
    scaling = values.get("rope_scaling") if isinstance(values, dict) else None
    built = None if scaling is None else _build(RopeScaling, scaling)
    return _build(LlamaConfig, values, rope_scaling=built)


def _build(cls: type, values: Any, **replaced: Any) -> Any:
    """`cls(**values)`, with a readable error for a wrong set of fields or a wrong type.

    Args:
      replaced: fields that are built already.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"config.json has no section for {cls.__name__}")
    known = {f.name: f for f in dataclasses.fields(cls)}
    optional = {f.name for f in known.values() if f.default is not dataclasses.MISSING}
    optional |= {f.name for f in known.values() if f.default_factory is not dataclasses.MISSING}
    given = {n: v for n, v in values.items() if v is not None or n not in optional} | replaced
    unknown = sorted(given.keys() - known.keys())
    missing = sorted(known.keys() - optional - given.keys())
    if unknown or missing:
        raise CheckpointError(
            f"config.json, {cls.__name__}: unknown fields {unknown}, missing fields {missing}"
        )
    # Ids begin at 0, sizes at 1.
    least = 0 if cls is TextTokenIds else 1
    types = typing.get_type_hints(cls)
    own = {
        name: _check(f"config.json, {cls.__name__}: {name}", value, types[name], least)
        for name, value in given.items()
        if name not in replaced
    }
    return cls(**(own | replaced))


def _check(where: str, value: Any, kind: Any, least: int) -> Any:
    """A value of a field of a type that JSON has; lists become tuples."""
    if kind is int:
        return check_integer(where, value, least)
    if kind is float:
        return check_number(where, value)
    if kind is bool:
        return check_boolean(where, value)
    if not isinstance(value, list | tuple) or not value:
        raise CheckpointError(f"{where} is {value!r}, but must be a list of whole numbers")
    return tuple(check_integer(where, each, least) for each in value)


# Meta's for Llama 3.2, in both stacks of every released model.
_LLAMA_3_2 = RopeScaling(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
)


def csm_1b() -> CSMConfig:
    """The released CSM-1B: 1 552 791 552 parameters, and Mimi's 79 308 609."""
    return CSMConfig(
        backbone=LlamaConfig(
            num_layers=16,
            embed_dim=2048,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            mlp_dim=8192,
            max_seq_len=2048,
            rope_scaling=_LLAMA_3_2,
        ),
        depth_decoder=LlamaConfig(
            num_layers=4,
            embed_dim=1024,
            num_heads=8,
            num_kv_heads=2,
            head_dim=128,
            mlp_dim=8192,
            max_seq_len=33,
            rope_scaling=_LLAMA_3_2,
        ),
        codec=MimiConfig(),
    )


def miso_8b() -> CSMConfig:
    """MisoTTS 8B: CSM with a larger backbone, a larger depth decoder and another prompt.

    8 188 122 112 parameters, and Mimi's 79 308 609.
    """
    return CSMConfig(
        backbone=LlamaConfig(
            num_layers=32,
            embed_dim=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=14_336,
            max_seq_len=2048,
            rope_scaling=_LLAMA_3_2,
        ),
        depth_decoder=LlamaConfig(
            num_layers=8,
            embed_dim=1536,
            num_heads=24,
            num_kv_heads=6,
            head_dim=64,
            mlp_dim=6912,
            max_seq_len=33,
            rope_scaling=_LLAMA_3_2,
        ),
        codec=MimiConfig(),
        space_after_speaker=True,
        default_max_audio_length_ms=90_000,
    )


def tiny() -> CSMConfig:
    """A model of odd sizes for tests and dry runs: 7 codebooks, 3 layers, 6 heads on 2 kv heads.

    The codec keeps 24 kHz and frames of 80 ms, so that durations mean what they mean at full size.
    """
    scaling = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=512
    )
    return CSMConfig(
        backbone=LlamaConfig(
            num_layers=3,
            embed_dim=48,
            num_heads=6,
            num_kv_heads=2,
            head_dim=8,
            mlp_dim=80,
            max_seq_len=1024,
            rope_scaling=scaling,
        ),
        depth_decoder=LlamaConfig(
            num_layers=2,
            embed_dim=36,
            num_heads=6,
            num_kv_heads=2,
            head_dim=6,
            mlp_dim=56,
            max_seq_len=8,
            rope_scaling=scaling,
        ),
        codec=MimiConfig(
            num_filters=4,
            embed_dim=24,
            num_layers=2,
            num_heads=3,
            mlp_dim=40,
            attention_window=10,
            num_codebooks=7,
            codebook_size=32,
            codebook_dim=12,
        ),
        text_vocab_size=263,
        audio_vocab_size=35,
        num_codebooks=7,
        text_token_ids=TextTokenIds(bos=256, eos=257, audio=258, audio_eos=259),
    )
