"""Mimi (Defossez et al., 2024): 24 kHz speech to 12.5 code frames a second, and back.

`Mimi` is the network, `Codec` its interface for numpy arrays. Order of layers and padding:
kyutai-labs/moshi `models/compression.py`.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from csm_jax.config import MimiConfig
from csm_jax.errors import CheckpointError, InputError
from csm_jax.io.samples import check_samples
from csm_jax.mimi import state_rows
from csm_jax.mimi.conv import (
    Array,
    ConvTranspose1d,
    ReplicateConv1d,
    State,
    StreamingLayer,
    init_states,
    step_all,
)
from csm_jax.mimi.quantizer import SplitQuantizer
from csm_jax.mimi.seanet import Decoder, Encoder
from csm_jax.mimi.transformer import MAX_STREAM_FRAMES, Transformer
from csm_jax.model.compiling import Program, shape_of
from csm_jax.model.layers import Params, Rngs

# Recordings go through the network in blocks of at most this many frames (10.24 s), which bounds
# its memory (0.26 GB a row at full size) and, in powers of two, the number of shapes to compile.
MAX_BLOCK_FRAMES = 128


class Mimi(nnx.Module):
    """The codec's network. Float32 throughout: rounded activations change codes.

    Lengths are multiples of the frame size: F frames are `F * config.frame_size` samples.
    """

    def __init__(self, config: MimiConfig, *, rngs: Rngs):
        dim, stride = config.embed_dim, config.downsample_stride
        self.encoder = Encoder(config, rngs=rngs)
        self.encoder_transformer = Transformer(config, rngs=rngs)
        self.downsample = ReplicateConv1d(
            dim, dim, 2 * stride, stride=stride, use_bias=False, rngs=rngs
        )
        self.quantizer = SplitQuantizer(config, rngs=rngs)
        self.upsample = ConvTranspose1d(
            dim, dim, 2 * stride, stride=stride, depthwise=True, use_bias=False, rngs=rngs
        )
        self.decoder_transformer = Transformer(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, audio: Array, num_codebooks: int) -> Array:
        """[B, samples] or [B, samples, channels] to codes, int32 [B, F, num_codebooks]."""
        return self.encode_step(audio, self.init_encode_state(audio.shape[0]), num_codebooks)[0]

    def decode(self, codes: Array) -> Array:
        """Codes, int32 [B, F, Q] for any Q from 1 to all, to [B, samples, channels]."""
        return self.decode_step(codes, self.init_decode_state(codes.shape[0]))[0]

    def init_encode_state(self, batch: int) -> State:
        """The state of `encode_step` before the first samples."""
        return init_states(self._encode_layers, batch)

    def init_decode_state(self, batch: int) -> State:
        """The state of `decode_step` before the first frames."""
        return init_states(self._decode_layers, batch)

    def encode_step(self, audio: Array, state: State, num_codebooks: int) -> tuple[Array, State]:
        """Encodes the next samples of streams; returns the codes and the next state."""
        if audio.ndim == 2:
            audio = audio[..., None]
        latent, state = step_all(self._encode_layers, audio, state)
        return self.quantizer.encode(latent, num_codebooks), state

    def decode_step(self, codes: Array, state: State) -> tuple[Array, State]:
        """Decodes the next frames of streams; returns the audio and the next state."""
        return step_all(self._decode_layers, self.quantizer.decode(codes), state)

    @property
    def _encode_layers(self) -> tuple[StreamingLayer, ...]:
        return self.encoder, self.encoder_transformer, self.downsample

    @property
    def _decode_layers(self) -> tuple[StreamingLayer, ...]:
        return self.upsample, self.decoder_transformer, self.decoder


@functools.cache
def abstract(config: MimiConfig) -> Mimi:
    """The network with shapes for parameters: nothing is allocated."""
    return nnx.eval_shape(lambda: Mimi(config, rngs=None))


def bind(config: MimiConfig, params: Params) -> Mimi:
    """The network over a pure dictionary of parameters, for use inside a jitted function."""
    return nnx.merge(nnx.graphdef(abstract(config)), params)


# Jitted, so that a state of a hundred small buffers is one dispatch.
@functools.partial(jax.jit, static_argnames=("config", "batch"))
def _init_encode_state(*, config: MimiConfig, batch: int) -> State:
    return abstract(config).init_encode_state(batch)


@functools.partial(jax.jit, static_argnames=("config", "batch"))
def _init_decode_state(*, config: MimiConfig, batch: int) -> State:
    return abstract(config).init_decode_state(batch)


@functools.partial(jax.jit, static_argnames=("config", "num_codebooks"), donate_argnames=("state",))
def _encode_step(
    params: Params, audio: Array, state: State, *, config: MimiConfig, num_codebooks: int
) -> tuple[Array, State]:
    return bind(config, params).encode_step(audio, state, num_codebooks)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _decode_step(
    params: Params, codes: Array, state: State, *, config: MimiConfig
) -> tuple[Array, State]:
    audio, state = bind(config, params).decode_step(codes, state)
    return audio[..., 0], state


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _decode_rows(
    params: Params,
    codes: Array,
    state: State,
    active: Array,
    restart: Array,
    *,
    config: MimiConfig,
) -> tuple[Array, State]:
    mimi = bind(config, params)
    state = state_rows.restart(restart, state, mimi.init_decode_state(len(codes)))
    audio, stepped = mimi.decode_step(codes, state)
    return audio[..., 0], state_rows.keep(active, stepped, state)


class Codec:
    """Mono waveforms to codes and back, on numpy arrays.

    Args:
      config: sizes of the network.
      params: its parameters, a pure nested dictionary; floats of other widths become float32.
    """

    def __init__(self, config: MimiConfig, params: Params):
        """Raises `CheckpointError` for a network of more than one audio channel."""
        if config.channels != 1:
            raise CheckpointError(f"the codec has {config.channels} channels; only 1 is supported")
        self.config = config
        self._params = jax.tree.map(lambda param: jnp.asarray(param, jnp.float32), params)

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        return self.config.sample_rate

    @property
    def frame_size(self) -> int:
        """Samples a frame."""
        return self.config.frame_size

    @property
    def num_codebooks(self) -> int:
        """Codes a frame, at most."""
        return self.config.num_codebooks

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the weights: codecs with the same one make the same codes."""
        digest = hashlib.sha256(repr(self.config).encode())
        for path, leaf in jax.tree.leaves_with_path(self._params):
            digest.update(repr(path).encode())
            digest.update(np.asarray(leaf).data)
        return digest.hexdigest()

    @overload
    def encode(self, audio: np.ndarray, num_codebooks: int | None = None) -> np.ndarray: ...
    @overload
    def encode(
        self, audio: Sequence[np.ndarray], num_codebooks: int | None = None
    ) -> list[np.ndarray]: ...
    def encode(
        self, audio: np.ndarray | Sequence[np.ndarray], num_codebooks: int | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """Codes of one waveform, or of a list of waveforms of any lengths as one batch.

        A waveform is padded with zeros on the right to whole frames, once, before the first
        layer, as kyutai's implementation does. Hugging Face's pads in every layer instead, so that
        the last frame of a length that is not a multiple of the frame size may differ.

        Args:
          audio: float from -1 to 1 or int16, [num_samples] at `sample_rate`, or a list of these.
          num_codebooks: how many codes a frame, 1 to all; None is all.

        Returns:
          int32 [ceil(num_samples / frame_size), num_codebooks], or a list of these.

        Raises:
          InputError: another number of codebooks, or what `check_samples` refuses.
        """
        count = self.num_codebooks if num_codebooks is None else num_codebooks
        self._check_num_codebooks(count)
        rows = [check_samples(row) for row in _as_list(audio)]
        lengths = [-(-len(row) // self.frame_size) for row in rows]  # in frames
        state = self.encode_stream_state(len(rows))
        blocks = [np.zeros((len(rows), 0, count), np.int32)]
        for start, size in _blocks(max(lengths, default=0)):
            block = _cut(rows, start * self.frame_size, size * self.frame_size)
            codes, state = self.encode_samples(block, state, count)
            blocks.append(np.asarray(codes))
        codes = np.concatenate(blocks, axis=1)
        return _like(audio, [row[:length] for row, length in zip(codes, lengths, strict=True)])

    @overload
    def decode(self, codes: np.ndarray) -> np.ndarray: ...
    @overload
    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]: ...
    def decode(self, codes: np.ndarray | Sequence[np.ndarray]) -> np.ndarray | list[np.ndarray]:
        """The waveform of one array of codes, or those of a list of any lengths as one batch.

        Args:
          codes: integers [num_frames, Q] from 0 to `codebook_size - 1`, Q from 1 to
            `num_codebooks`, or a list of these with the same Q.

        Returns:
          float32 [num_frames * frame_size] at `sample_rate`, or a list of these.

        Raises:
          InputError: another shape or value.
        """
        rows = [self._check_codes(np.asarray(row)) for row in _as_list(codes)]
        if len({row.shape[1] for row in rows}) > 1:
            raise InputError(
                f"codes of one batch have {sorted({row.shape[1] for row in rows})} codebooks; "
                "decode those of a kind together"
            )
        lengths = [len(row) * self.frame_size for row in rows]
        state = self.decode_stream_state(len(rows))
        blocks = [np.zeros((len(rows), 0), np.float32)]
        for start, size in _blocks(max(map(len, rows), default=0)):
            audio, state = self.decode_frames(_cut(rows, start, size), state)
            blocks.append(np.asarray(audio))
        audio = np.concatenate(blocks, axis=1)
        return _like(codes, [row[:length] for row, length in zip(audio, lengths, strict=True)])

    def clamp(self, codes: np.ndarray | Array) -> np.ndarray:
        """Generated codes as the codec takes them: ids beyond the codebook become its last id.

        The vocabulary of a model has a few ids that are no codes. A trained model does not generate
        them, and one that does should not end a stream. What streams decode is clamped, and what
        `Generator.decode` does; `decode` refuses such ids, which are a mistake in a recording.
        """
        return np.minimum(codes, self.config.codebook_size - 1)

    def encode_stream_state(self, batch: int = 1) -> State:
        """The state of `encode_samples` before the first samples."""
        return _init_encode_state(config=self.config, batch=batch)

    def decode_stream_state(self, batch: int = 1) -> State:
        """The state of `decode_frames` before the first frames."""
        return _init_decode_state(config=self.config, batch=batch)

    def encode_samples(
        self, audio: np.ndarray, state: State, num_codebooks: int
    ) -> tuple[Array, State]:
        """Continues `batch` streams: float32 [batch, F * frame_size] to int32 [batch, F, Q].

        The state is donated: use the one returned. Every F is compiled once. The codes may still be
        being computed on return.
        """
        return _encode_step(
            self._params, audio, state, config=self.config, num_codebooks=num_codebooks
        )

    def decode_frames(self, codes: np.ndarray | Array, state: State) -> tuple[Array, State]:
        """Continues `batch` streams: int32 [batch, F, Q] to float32 [batch, F * frame_size].

        Codes are clamped (`clamp`). Otherwise like `encode_samples`.
        """
        return _decode_step(self._params, self.clamp(codes), state, config=self.config)

    def decode_rows(
        self, codes: np.ndarray, state: State, active: np.ndarray, restart: np.ndarray
    ) -> tuple[Array, State]:
        """`decode_frames` for some of the rows of a batch of unrelated streams.

        Args:
          codes: int32 [batch, F, Q] of at most `MAX_STREAM_FRAMES` frames.
          active: bool [batch]; the streams of the other rows stay as they are, and their audio is
            arbitrary.
          restart: bool [batch], rows that begin a new stream.
        """
        if codes.shape[1] > MAX_STREAM_FRAMES:
            raise ValueError(f"{codes.shape[1]} frames at once; at most {MAX_STREAM_FRAMES}")
        codes = self.clamp(codes)
        return _decode_rows(self._params, codes, state, active, restart, config=self.config)

    def programs(self, num_codebooks: int) -> Iterator[Program]:
        """All programs for encoding and decoding one recording of any length."""
        encoding, decoding = (
            jax.tree.map(shape_of, state)
            for state in (self.encode_stream_state(), self.decode_stream_state())
        )
        size = 1
        while size <= MAX_BLOCK_FRAMES:
            audio = np.zeros((1, size * self.frame_size), np.float32)
            more = {"config": self.config, "num_codebooks": num_codebooks}
            yield _encode_step, (self._params, audio, encoding), more
            codes = np.zeros((1, size, num_codebooks), np.int32)
            yield _decode_step, (self._params, codes, decoding), {"config": self.config}
            size *= 2

    def rows_program(self, num_frames: int, num_codebooks: int, state: State) -> Program:
        """The program of `decode_rows` for `num_frames`; `state` may be shapes."""
        batch = jax.tree.leaves(state)[0].shape[0]
        codes, rows = np.zeros((batch, num_frames, num_codebooks), np.int32), np.zeros(batch, bool)
        return _decode_rows, (self._params, codes, state, rows, rows), {"config": self.config}

    def _check_num_codebooks(self, count: int) -> None:
        if not 1 <= count <= self.num_codebooks:
            raise InputError(f"{count} codebooks asked for; the codec has 1..{self.num_codebooks}")

    def _check_codes(self, codes: np.ndarray) -> np.ndarray:
        if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
            raise InputError(
                f"codes are {codes.dtype} of shape {codes.shape}; integers [num_frames, Q] needed"
            )
        self._check_num_codebooks(codes.shape[1])
        limit = self.config.codebook_size
        wrong = codes[(codes < 0) | (codes >= limit)]
        if wrong.size:
            raise InputError(f"code {wrong[0]} is outside 0..{limit - 1}")
        return codes.astype(np.int32)


def _as_list(value: Any) -> Sequence[np.ndarray]:
    return value if isinstance(value, list | tuple) else [value]


def _like(
    value: np.ndarray | Sequence[np.ndarray], rows: list[np.ndarray]
) -> np.ndarray | list[np.ndarray]:
    """`rows` in the form of `value`: a list for a list, the only row for an array."""
    return rows if isinstance(value, list | tuple) else rows[0]


def _blocks(num_frames: int) -> Iterator[tuple[int, int]]:
    """Start and size of the blocks for `num_frames`: full ones, then a power of two."""
    for start in range(0, num_frames, MAX_BLOCK_FRAMES):
        left = min(MAX_BLOCK_FRAMES, num_frames - start)
        yield start, 1 << (left - 1).bit_length()


def _cut(rows: Sequence[np.ndarray], start: int, size: int) -> np.ndarray:
    """A block [B, size, ...] of rows of any lengths from `start` on, zeros after a row's end."""
    block = np.zeros((len(rows), size, *rows[0].shape[1:]), rows[0].dtype)
    for i, row in enumerate(rows):
        part = row[start : start + size]
        block[i, : len(part)] = part
    return block
