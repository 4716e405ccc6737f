"""The requests in the slots of an engine: prefill, generate, decode. No queue, no threads."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from csm_jax.errors import EngineClosedError
from csm_jax.inference.active_request import ActiveRequest, next_blocks, next_num_frames
from csm_jax.inference.decode_batch import DecodeBatch
from csm_jax.inference.decode_loop import new_batch, run_batch
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.inference.request_state import Step
from csm_jax.inference.row_decoder import RowDecoder, rows_together
from csm_jax.model.compiling import Program


class EngineCore:
    """A batch, the codec's streams, and the requests that have a slot of both.

    Attributes:
      active: the requests by slot.
      max_seq_len: positions of a slot.
    """

    def __init__(self, model: LoadedModel, num_slots: int, max_seq_len: int):
        """Starts with all slots free.

        Raises:
          InputError: the data axis of the model's mesh does not divide the slots.
        """
        self.active: dict[int, ActiveRequest] = {}
        self.max_seq_len = max_seq_len
        self._model = model
        self._num_slots = num_slots
        self._to_prefill: deque[int] = deque()  # slots, in their order
        self._frame_seconds = math.inf
        self._batch: DecodeBatch | None = None
        self._decoder: RowDecoder | None = None
        self.reset()

    def reset(self) -> None:
        """Frees all slots, and makes a new batch after an error has left the old one undefined."""
        self.close()
        self._batch = new_batch(self._model, self._num_slots, self.max_seq_len)
        self._decoder = RowDecoder(
            self._model.codec, self._num_slots, rows_together(self._num_slots)
        )

    def close(self) -> None:
        """Frees all slots and the memory of the batch."""
        self.active.clear()
        self._to_prefill.clear()
        self._batch = self._decoder = None

    @property
    def batch(self) -> DecodeBatch:
        """The batch. Raises `EngineClosedError` after `close`."""
        if self._batch is None:
            raise EngineClosedError("the engine is closed: make another")
        return self._batch

    @property
    def decoder(self) -> RowDecoder:
        """The streams of the codec. Raises `EngineClosedError` after `close`."""
        if self._decoder is None:
            raise EngineClosedError("the engine is closed: make another")
        return self._decoder

    def programs(self) -> list[Program]:
        """All programs that requests need, apart from those of shared prefixes."""
        codec, count = self._model.codec, self._model.config.num_codebooks
        return [*self.batch.programs(), *self.decoder.programs(count), *codec.programs(count)]

    def prefix_buckets(self, lengths: Sequence[int]) -> list[int]:
        """The lengths that shared prefixes of these lengths are padded to, without repetitions."""
        return sorted({self.batch.bucket(length) for length in lengths})

    def prefix_programs(self, bucket: int) -> Iterator[Program]:
        """The programs for prompts after a shared prefix of this padded length."""
        return self.batch.prefix_programs(bucket)

    def add(self, request: ActiveRequest) -> None:
        """Gives a request the first free slot, where it is prefilled in one of the next steps."""
        index = min(set(range(self._num_slots)) - self.active.keys())
        self.active[index] = request
        self._to_prefill.append(index)
        self.decoder.resume(index, request.codec_state)
        request.codec_state = None
        if request.pace:
            request.pace.resume()

    def remove(self, index: int) -> ActiveRequest:
        """Frees the slot of a request for good."""
        if index in self._to_prefill:
            self._to_prefill.remove(index)
        self.batch.leave(index)
        return self.active.pop(index)

    def suspend(self, index: int) -> None:
        """Frees the slot of a request between two parts; `add` continues it in another."""
        self.batch.leave(index)
        request = self.active.pop(index)
        request.codec_state = self.decoder.take(index)

    def prefill_next(self, index: int) -> None:
        """Lets a request keep its slot, and prefills its next part in one of the next steps."""
        self.batch.leave(index)
        self._to_prefill.append(index)

    def step(self, fail: Callable[[int, Exception], None]) -> list[int]:
        """Prefills slots, generates some frames, and hands out frames and audio.

        Args:
          fail: is given the slot and the error of a request that fails by itself, to remove it.

        Returns:
          The slots whose requests have come to the end of a part.
        """
        self._prefill()
        running = {i: self.active[i] for i in sorted(self.active) if self.active[i].is_running}
        if not running:
            return []
        step = run_batch(
            self.batch,
            {index: request.state for index, request in running.items()},
            self._num_frames(list(running.values())),
            pause=True,  # a request that ends makes room for another
            fail=fail,
        )
        self._frame_seconds = step.seconds / max(1, step.num_frames)
        for index, outcome in step.steps.items():
            running[index].ticket.timing.frames += step.seconds
            try:
                self._take_frames(running[index], outcome)
            except Exception as error:
                fail(index, error)
        self._decode()
        return [i for i in running if i in self.active and not self.active[i].is_running]

    def _prefill(self) -> None:
        """Prefills slots; once a stream is running, only one of them in a step."""
        while self._to_prefill:
            request = self.active[index := self._to_prefill.popleft()]
            if request.next is None:
                raise ValueError(f"slot {index} has nothing to prefill")
            started = time.perf_counter()
            self.batch.join(index, request.next)
            self.batch.wait()
            request.ticket.timing.prefill += time.perf_counter() - started
            request.next = None
            if any(each.pace and each.is_running for each in self.active.values()):
                return

    def _num_frames(self, running: Sequence[ActiveRequest]) -> int:
        """Frames of this step: one while a request waits for its prefill."""
        if self._to_prefill:
            return 1
        limit = self._model.inference.max_step_seconds
        return next_num_frames(running, self._frame_seconds, limit)

    def _take_frames(self, request: ActiveRequest, step: Step) -> None:
        """Gives a request the frames that were released, and plans its next part."""
        request.next = request.state.next_utterance() if step.is_over else None
        request.ticket.add_frames(step.released)
        request.ticket.add_words(step.words)
        if request.pace:
            request.blocks.add(step.released)
        request.is_finished = step.is_over and request.next is None

    def _decode(self) -> None:
        """Decodes the released frames of the requests that stream."""
        while blocks := next_blocks(self.active):
            started = time.perf_counter()
            decoded = self.decoder.decode(blocks)
            elapsed = time.perf_counter() - started
            for index, chunk in decoded.items():
                request = self.active[index]
                request.ticket.timing.codec += elapsed
                request.ticket.add_chunk(chunk)
                if request.pace:
                    request.pace.played(len(blocks[index]))
