"""The decode batch: utterances in the slots of one batch, around the compiled functions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from csm_jax.config import CSMConfig
from csm_jax.inference.config import DEFAULT_INFERENCE, InferenceConfig
from csm_jax.inference.decode_step import (
    CHUNK_FRAMES,
    NO_INTERVENTIONS,
    ForcedCodes,
    Params,
    Row,
    RowInterventions,
    TextRows,
    init_state,
    prefill,
    prefill_prefix,
    run_frames,
    set_row,
)
from csm_jax.model.compiling import Program, shape_of
from csm_jax.model.csm import bind
from csm_jax.model.kv_cache import KVCache
from csm_jax.model.layers import AnyArray
from csm_jax.model.llama import Head
from csm_jax.model.sampling import Sampling, SamplingParams
from csm_jax.model.sharding import check_rows, place_rows
from csm_jax.prompt.turns import Prompt


class Utterance(NamedTuple):
    """A prompt, and how the frames after it are generated.

    Attributes:
      prompt: what the backbone is prefilled with.
      sampling: how codes are drawn.
      seed: a whole number, of which the lowest 32 bits count.
      max_frames: the most frames that are generated.
      num_shared: positions at the beginning of the prompt that other prompts have too, fewer than
        all: they are prefilled on their own, and their keys and values are kept.
      num_text: positions at the end of the prompt, which are the text that is spoken.
      end_bias: as for `CSM.generate_frame`; a batch without alignment heads ignores it.
      forced: int32 [R, Q], codes of its first frames that are given; -1 is drawn.
      steering: float32 [D] by layer, which every frame adds to what that layer passes on.
    """

    prompt: Prompt
    sampling: Sampling
    seed: int
    max_frames: int
    num_shared: int = 0
    num_text: int = 0
    end_bias: float = 0.0
    forced: np.ndarray | None = None
    steering: Mapping[int, np.ndarray] | None = None

    @property
    def max_length(self) -> int:
        """Positions of the prompt and of all frames."""
        return len(self.prompt.frames) + self.max_frames


class Rewind(NamedTuple):
    """Where an utterance continues from.

    Attributes:
      codes: int32 [n, Q], its first frames.
      seed: of what follows.
      end_bias: of what follows, in addition to that of the utterance.
    """

    codes: np.ndarray
    seed: int
    end_bias: float = 0.0


class BatchFrames(NamedTuple):
    """Frames of all slots, on the host.

    Attributes:
      codes: int32 [B, n, Q], zeros from a row's end on.
      attention: float32 [B, n, N, L], as in `Frames`; None without alignment heads.
      done: bool [B], the rows that have ended.
    """

    codes: np.ndarray
    attention: np.ndarray | None
    done: np.ndarray


@dataclass
class _Slot:
    """The utterance that a row of the batch generates, the number of its frames so far, and the
    end bias of the next ones."""

    utterance: Utterance
    num_frames: int = 0
    end_bias: float = 0.0

    @property
    def left(self) -> int:
        return self.utterance.max_frames - self.num_frames


class DecodeBatch:
    """Utterances that are generated side by side, and join and leave between two runs.

    It owns the state that the compiled functions take and return, the only mutable state of
    generation. Not thread-safe.

    Attributes:
      config: the model's sizes.
      size: number of slots, the rows of the batch.
      max_seq_len: positions of a row, prompt and frames together.
    """

    def __init__(
        self,
        config: CSMConfig,
        params: Params,
        size: int,
        max_seq_len: int,
        mesh: Mesh | None = None,
        inference: InferenceConfig = DEFAULT_INFERENCE,
        heads: tuple[Head, ...] = (),
    ):
        """Makes a batch of free slots.

        Args:
          mesh: the devices that `params` lie on.
          heads: the alignment heads, whose attention to the text every run returns.

        Raises `InputError` if the data axis of `mesh`, where `params` lie, does not divide a
        size of more than 1."""
        check_rows(size, mesh)
        self.config = config
        self.size = size
        self.max_seq_len = max_seq_len
        self._params = params
        self._mesh = mesh
        self._inference = inference
        self._heads = heads
        self._state = init_state(
            config=config,
            batch=size,
            max_seq_len=max_seq_len,
            dtype=bind(config, params).dtype,
            mesh=mesh,
        )
        # The functions are compiled for these shapes, which do not change.
        self._shapes = jax.tree.map(shape_of, self._state)
        self._slots: list[_Slot | None] = [None] * size
        self._prefixes: dict[bytes, KVCache] = {}
        self._stack_rows()
        self._stack_text()

    def programs(self) -> Iterator[Program]:
        """All programs that utterances of any length need, apart from those of shared prefixes."""
        index = np.int32(0)
        for length in buckets(self.max_seq_len, self._inference.min_bucket):
            static = {"config": self.config, "mesh": self._mesh}
            yield prefill, (self._params, self._shapes, *self._empty(length), index, None), static
            flags = np.int32(1), np.bool_(True), self._text, NO_INTERVENTIONS
            arguments = self._params, self._shapes, self._sampling, *flags
            yield run_frames, arguments, static | {"kv_length": length, "heads": self._heads}
        yield set_row, (self._shapes, index, self._empty_row()), {"mesh": self._mesh}

    def prefix_programs(self, prefix_length: int) -> Iterator[Program]:
        """Programs for prompts after a shared prefix; the prefix itself is prefilled here.

        Args:
          prefix_length: a `bucket` of `num_shared` positions, as utterances will have them.
        """
        static = {"config": self.config, "mesh": self._mesh}
        rows = self._empty(prefix_length)
        filled = prefill_prefix(self._params, *rows, np.int32(1), config=self.config)
        prefix = jax.tree.map(shape_of, filled)
        for length in buckets(self.max_seq_len, self._inference.min_bucket):
            # More than half of each is not padding.
            if prefix_length // 2 + length // 2 < self.max_seq_len:
                rows = self._empty(length)
                yield prefill, (self._params, self._shapes, *rows, np.int32(0), prefix), static

    def join(self, index: int, utterance: Utterance) -> None:
        """Prefills a free slot with the prompt of an utterance, which then runs.

        Raises:
          ValueError: prompt and frames are longer than `max_seq_len`.
        """
        frames, mask = utterance.prompt
        if utterance.max_length > self.max_seq_len:
            raise ValueError(
                f"{len(frames)} + {utterance.max_frames} positions in {self.max_seq_len}"
            )
        shared = utterance.num_shared
        prefix = self._prefix(Prompt(frames[:shared], mask[:shared])) if shared else None
        rest = self._padded(Prompt(frames[shared:], mask[shared:]))
        self._state = prefill(
            self._params,
            self._state,
            *rest,
            np.int32(index),
            prefix,
            config=self.config,
            mesh=self._mesh,
        )
        self._slots[index] = _Slot(utterance)
        self._stack_rows()
        no_codes = np.zeros((0, self.config.num_codebooks), np.int32)
        self.rewind(index, Rewind(no_codes, utterance.seed))

    def rewind(self, index: int, to: Rewind) -> None:
        """Lets the utterance in a slot continue from one of its own frames."""
        slot, num_frames = self._taken(index), len(to.codes)
        frames, mask = slot.utterance.prompt
        frame, columns = frames[-1], mask[-1]
        if num_frames:
            frame = np.append(to.codes[-1], 0).astype(np.int32)
            columns = np.arange(len(frame)) < len(frame) - 1
        seen = np.zeros((self.config.audio_vocab_size,), bool)
        seen[to.codes[:, 0]] = True
        row = Row(
            length=np.int32(len(frames) - 1 + num_frames),
            frame=frame,
            mask=columns,
            seed=np.uint32(to.seed % 2**32),
            num_frames=np.int32(num_frames),
            seen=seen,
            done=np.bool_(False),
        )
        self._state = set_row(self._state, np.int32(index), row, mesh=self._mesh)
        slot.num_frames, slot.end_bias = num_frames, to.end_bias
        self._stack_text()

    def leave(self, index: int) -> None:
        """Frees a slot."""
        self._slots[index] = None
        self._state = set_row(self._state, np.int32(index), self._empty_row(), mesh=self._mesh)
        self._stack_rows()

    def run(self, num_frames: int, pause: bool = False) -> BatchFrames:
        """Generates up to `num_frames` frames of all rows: until all end, or one is at its limit.

        Args:
          pause: stop as soon as any row ends.
        """
        taken = [slot for slot in self._slots if slot]
        wanted = min(num_frames, CHUNK_FRAMES, *(slot.left for slot in taken))
        self._state, frames, count = run_frames(
            self._params,
            self._state,
            self._sampling,
            np.int32(wanted),
            np.bool_(pause),
            self._text,
            self._interventions,
            config=self.config,
            kv_length=self._kv_length(),
            heads=self._heads,
            mesh=self._mesh,
        )
        (codes, attention), done, count = jax.device_get((frames, self._state.done, count))
        for slot in taken:
            slot.num_frames += int(count)
        attention = None if attention is None else attention[:, :count]
        return BatchFrames(codes[:, :count], attention, done)

    def wait(self) -> None:
        """Blocks until the device has finished all computations so far."""
        jax.block_until_ready(self._state)

    def bucket(self, length: int) -> int:
        """The number of positions that `length` positions are padded to."""
        return min(bucket(length, self._inference.min_bucket), self.max_seq_len)

    def _taken(self, index: int) -> _Slot:
        slot = self._slots[index]
        if slot is None:
            raise ValueError(f"slot {index} is free")
        return slot

    def _prefix(self, prompt: Prompt) -> KVCache:
        """The keys and values of a shared prefix, prefilled now or kept from an earlier prompt."""
        key = prompt.frames.tobytes() + prompt.mask.tobytes()
        prefix = self._prefixes.pop(key, None)
        if prefix is None:
            length = np.int32(len(prompt.frames))
            rows = self._padded(prompt)
            prefix = prefill_prefix(self._params, *rows, length, config=self.config)
        self._prefixes[key] = prefix  # as the last one used
        if len(self._prefixes) > self._inference.max_prefixes:
            del self._prefixes[next(iter(self._prefixes))]
        return prefix

    def _padded(self, prompt: Prompt) -> Prompt:
        padding = self.bucket(len(prompt.frames)) - len(prompt.frames)
        return Prompt(*(np.pad(rows, ((0, padding), (0, 0))) for rows in prompt))

    def _empty(self, length: int) -> Prompt:
        columns = self.config.num_codebooks + 1
        return Prompt(np.zeros((length, columns), np.int32), np.zeros((length, columns), bool))

    def _empty_row(self) -> Row:
        """Where the row of a free slot continues from."""
        columns = self.config.num_codebooks + 1
        return Row(
            length=np.int32(0),
            frame=np.zeros((columns,), np.int32),
            mask=np.zeros((columns,), bool),
            seed=np.uint32(0),
            num_frames=np.int32(0),
            seen=np.zeros((self.config.audio_vocab_size,), bool),
            done=np.bool_(True),
        )

    def _kv_length(self) -> int:
        """Positions that attention has to read, for the longest that any row can become."""
        lengths = [slot.utterance.max_length for slot in self._slots if slot]
        return self.bucket(max(lengths, default=1))

    def _stack_text(self) -> None:
        """Sets where the texts of all rows begin; None if no attention is wanted."""
        self._text: TextRows | None = None
        if not self._heads:
            return
        starts = np.zeros(self.size, np.int32)
        end_bias = np.zeros(self.size, np.float32)
        for index, slot in enumerate(self._slots):
            if slot:
                utterance = slot.utterance
                starts[index] = len(utterance.prompt.frames) - utterance.num_text
                end_bias[index] = utterance.end_bias + slot.end_bias
        self._text = place_rows(TextRows(starts, end_bias), self._mesh)

    def _stack_rows(self) -> None:
        """Sets how the codes of all rows are drawn, and what is changed."""
        rows = [slot.utterance.sampling if slot else Sampling() for slot in self._slots]
        self._sampling = place_rows(SamplingParams.stack(rows), self._mesh)
        changes = RowInterventions(self._stack_forced(), self._stack_steering())
        self._interventions = place_rows(changes, self._mesh)

    def _stack_forced(self) -> ForcedCodes | None:
        rows = [slot.utterance.forced if slot else None for slot in self._slots]
        num_frames = [0 if codes is None else len(codes) for codes in rows]
        if not any(num_frames):
            return None
        shape = self.size, bucket(max(num_frames)), self.config.num_codebooks
        stacked = np.full(shape, -1, np.int32)
        for row, codes in zip(stacked, rows, strict=True):
            if codes is not None:
                row[: len(codes)] = codes
        return ForcedCodes(stacked, np.asarray(num_frames, np.int32))

    def _stack_steering(self) -> Mapping[int, AnyArray] | None:
        rows = [slot.utterance.steering or {} if slot else {} for slot in self._slots]
        nothing = np.zeros(self.config.backbone.embed_dim, np.float32)
        layers = sorted({layer for row in rows for layer in row})
        stacked = {layer: np.stack([row.get(layer, nothing) for row in rows]) for layer in layers}
        return stacked or None


def bucket(length: int, least: int = InferenceConfig.min_bucket) -> int:
    """The next power of two, and no less than `least`: few compiled shapes serve every length."""
    return max(least, 1 << (length - 1).bit_length())


def buckets(max_seq_len: int, least: int = InferenceConfig.min_bucket) -> Iterator[int]:
    """All lengths that `bucket` gives, up to `max_seq_len`."""
    length = 0
    while length < max_seq_len:
        length = min(bucket(length + 1, least), max_seq_len)
        yield length
