"""The decode batch: utterances in the slots of one batch, around the compiled functions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from csm_jax.config import CSMConfig
from csm_jax.inference.batch_functions import BatchFunctions
from csm_jax.inference.buckets import bucket, buckets
from csm_jax.inference.config import DEFAULT_INFERENCE, InferenceConfig
from csm_jax.inference.decode_step import (
    CHUNK_FRAMES,
    Position,
    Row,
    TextRows,
    init_state,
    prefill,
    prefill_prefix,
    run_frames,
    set_num_prompts,
    set_position,
    set_row,
)
from csm_jax.inference.row_interventions import NO_INTERVENTIONS
from csm_jax.inference.stacking import stack_interventions
from csm_jax.inference.utterance import Rewind, Utterance
from csm_jax.inference.voice import Voice
from csm_jax.model.compiling import Program, shape_of
from csm_jax.model.csm import bind
from csm_jax.model.kernels.choice import XLA
from csm_jax.model.kv_cache import KVCache
from csm_jax.model.layers import Params
from csm_jax.model.llama import Head
from csm_jax.model.logits_functions import NO_CALLS, NO_STATES
from csm_jax.model.sampling import Sampling, SamplingParams
from csm_jax.model.sharding import check_rows, place_rows
from csm_jax.prompt.turns import Prompt


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
        kernels: str = XLA,
    ):
        """Makes a batch of free slots.

        Args:
          mesh: the devices that `params` lie on.
          heads: the alignment heads, whose attention to the text every run returns.
          kernels: that frames are computed in, as `kernels.choose` returns them.

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
        self._kernels = kernels
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
        self._functions = BatchFunctions(size, mesh)
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
            # Defaults too: jit compiles again where an argument is given that was not before.
            more = {
                "kv_length": length,
                "heads": self._heads,
                "calls": NO_CALLS,
                "kernels": self._kernels,
            }
            yield run_frames, arguments, static | more
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
        if utterance.max_length > self.max_seq_len:
            num_frames = utterance.max_frames
            length = utterance.max_length - num_frames
            raise ValueError(f"{length} + {num_frames} positions in {self.max_seq_len}")
        self._slots[index] = _Slot(utterance)
        self._stack_rows()
        voice = utterance.voice
        self._prefill(index, utterance.prompt, utterance.num_shared, voice)
        if guidance := utterance.guidance:
            self._prefill(self.size + index, guidance.prompt, guidance.num_shared, voice)
        no_codes = np.zeros((0, self.config.num_codebooks), np.int32)
        self.rewind(index, Rewind(no_codes, utterance.seed))

    def rewind(self, index: int, to: Rewind) -> None:
        """Lets the utterance in a slot continue from one of its own frames."""
        slot = self._taken(index)
        utterance, num_frames = slot.utterance, len(to.codes)
        seen = np.zeros((self.config.audio_vocab_size,), bool)
        seen[to.codes[:, 0]] = True
        row = Row(
            *_position(utterance.prompt, to.codes),
            seed=np.uint32(to.seed % 2**32),
            num_frames=np.int32(num_frames),
            seen=seen,
            done=np.bool_(False),
            functions=self._functions.states_of(utterance),
        )
        self._state = set_row(self._state, np.int32(index), row, mesh=self._mesh)
        if utterance.guidance:
            position = _position(utterance.guidance.prompt, to.codes)
            second = np.int32(self.size + index)
            self._state = set_position(self._state, second, position, mesh=self._mesh)
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
            calls=self._functions.calls,
            mesh=self._mesh,
            kernels=self._kernels,
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

    def _prefill(self, index: int, prompt: Prompt, num_shared: int, voice: Voice | None) -> None:
        """Fills the cache of one prompt of the state."""
        frames, mask = prompt
        shared = Prompt(frames[:num_shared], mask[:num_shared])
        rest = self._padded(Prompt(frames[num_shared:], mask[num_shared:]))
        # Without them, as one program serves all functions.
        states = self._state.functions
        filled = prefill(
            self._params,
            self._state._replace(functions=NO_STATES),
            *rest,
            np.int32(index),
            self._prefix(shared, voice) if num_shared else None,
            config=self.config,
            mesh=self._mesh,
        )
        self._state = filled._replace(functions=states)

    def _prefix(self, prompt: Prompt, voice: Voice | None) -> KVCache:
        """The keys and values of a shared prefix: a voice's, prefilled now, or kept from before."""
        key = voice.digest if voice else prompt.frames.tobytes() + prompt.mask.tobytes()
        prefix = self._prefixes.pop(key, None)
        if prefix is None and voice:
            prefix = voice.place(self.bucket(voice.num_positions))
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
            functions=self._functions.states_of(None),
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
        utterances = [slot.utterance if slot else None for slot in self._slots]
        states = self._functions.update(utterances, self._state.functions)
        self._state = self._state._replace(functions=states)
        changes = stack_interventions(utterances, self.config)
        changes = changes._replace(functions=self._functions.rows)
        self._interventions = place_rows(changes, self._mesh)
        num_prompts = self.size * (2 if changes.guidance else 1)
        if num_prompts != len(self._state.frame):
            self._state = set_num_prompts(self._state, num_prompts=num_prompts, mesh=self._mesh)


def _position(prompt: Prompt, codes: np.ndarray) -> Position:
    """Where a prompt continues from after frames [n, Q]."""
    frame, columns = prompt.frames[-1], prompt.mask[-1]
    if len(codes):
        frame = np.append(codes[-1], 0).astype(np.int32)
        columns = np.arange(len(frame)) < len(frame) - 1
    return Position(np.int32(len(prompt.frames) - 1 + len(codes)), frame, columns)
