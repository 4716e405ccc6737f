"""Continuous batching: requests join and leave a running batch at frame borders.

One thread runs the batch, all others hold tickets. At every border it admits waiting requests,
generates a few frames for all rows, and gives each ticket its own. What a request says does not
depend on the others: the batch always has the same shape, and every row its own key.

Rows are shared fairly (`scheduler.py`): a long text gives its row back between two of its parts,
where it has to be prefilled again anyway, if a request of a share with fewer rows waits.
"""

import atexit
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from csm_jax.active_request import ActiveRequest, frames_to_border, next_blocks
from csm_jax.compiling import compile_all
from csm_jax.decode_batch import DecodeBatch
from csm_jax.errors import (
    CSMError,
    EngineClosedError,
    InputError,
    QueueFullError,
    RequestCancelledError,
    first_line,
)
from csm_jax.pacing import Pace
from csm_jax.request import as_request
from csm_jax.row_decoder import RowDecoder, rows_together
from csm_jax.scheduler import RowScheduler
from csm_jax.ticket import Ticket

if TYPE_CHECKING:
    from csm_jax.generator import Generator

logger = logging.getLogger("csm_jax")


class Engine:
    """Speaks many requests at once.

    with csm_jax.Engine(model, max_batch=8) as engine:
        tickets = [engine.submit(text) for text in texts]
        for chunk in tickets[0]: ...

    The block ends when everything is spoken; with an error, everything is cancelled.
    """

    def __init__(
        self,
        model: "Generator",
        max_batch: int = 8,
        max_seq_len: int = 2048,
        max_queue: int = 64,
        kept_rows: int = 0,
        kept_beside_others: int = 0,
    ):
        """Starts the thread that runs the batch.

        Args:
          max_batch: rows, the requests that speak at once. A step takes as long for one request
            as for all of them.
          max_seq_len: positions of a row, prompt and speech together; the model has a limit too.
          max_queue: requests that may wait for a row; so many again in the background.
          kept_rows: rows, fewer than all, that only shares without a row get.
          kept_beside_others: the same, while several shares ask for rows.

        Raises:
          InputError: a number is less than 1, or the model's mesh does not divide the rows.
        """
        sizes = {"max_batch": max_batch, "max_seq_len": max_seq_len, "max_queue": max_queue}
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name} is {value}, but must be at least 1")
        self.model = model
        self.max_batch = max_batch
        self.max_seq_len = min(max_seq_len, model.config.backbone.max_seq_len)
        self.max_queue = max_queue
        self._slots: list[ActiveRequest | None] = [None] * max_batch
        self._to_prefill: deque[int] = deque()  # rows, in their order
        self._waiting: RowScheduler[ActiveRequest] = RowScheduler(
            max_batch, kept_rows, kept_beside_others
        )
        self._frame_seconds = math.inf
        # What `warm_up` has compiled: the programs of all requests, and of prefixes of so many
        # positions.
        self._is_warm = False
        self._warm_prefixes: set[int] = set()
        self._changed = threading.Condition()
        self._is_closing = False
        self._make_batch()
        self._thread = threading.Thread(target=self._run, name="csm_jax.Engine", daemon=True)
        self._thread.start()
        # An interpreter that ends under a computation crashes.
        atexit.register(self.close)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.close(finish=kind is None)

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests: it is not closed, and no error has ended its thread."""
        return self._thread.is_alive() and not self._is_closing

    @property
    def num_speaking(self) -> int:
        """Rows that are taken."""
        return sum(slot is not None for slot in self._slots)

    @property
    def num_waiting(self) -> int:
        """Requests without a row, those in the background included."""
        return len(self._waiting.live) + len(self._waiting.background)

    def warm_up(
        self,
        prefix_lengths: Sequence[int] = (),
        is_unwanted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Compiles all that requests of any kind need, so that none of them waits for a compiler.

        It does so in the thread that calls it; requests are spoken meanwhile. What has been
        compiled before takes no time.

        Args:
          prefix_lengths: positions of what requests will share, such as the sample of a voice.
          is_unwanted: asked between two programs; if it says so, `RequestCancelledError` is raised.
        """
        batch, decoder, model = self._batch, self._decoder, self.model
        if batch is None or decoder is None:
            raise EngineClosedError("the engine is closed: make another")
        if not self._is_warm:
            count = model.config.num_codebooks
            # What the guard compares with; encoded once.
            _ = model.silent_codes
            programs = [*batch.programs(), *decoder.programs(count), *model.codec.programs(count)]
            compile_all(programs, is_unwanted)
            self._is_warm = True
        for length in sorted({batch.bucket(length) for length in prefix_lengths}):
            if length not in self._warm_prefixes:
                compile_all(batch.prefix_programs(length), is_unwanted)
                self._warm_prefixes.add(length)

    def submit(
        self,
        *arguments: Any,
        stream: bool = True,
        wait: bool = False,
        background: bool = False,
        share: str = "",
        weight: float = 1.0,
        keep: bool = True,
        **named: Any,
    ) -> Ticket:
        """Hands in a request; its context is encoded before this returns.

        Args:
          *arguments, **named: those of `Request`, or one `Request`.
          stream: whether chunks come while it is spoken; otherwise it is decoded in the end, by the
            thread that asks for the result, and the others do not wait for that.
          wait: for a place in the queue, instead of being refused.
          background: all other requests go first, and a row is left free for them.
          share, weight: requests of one share have rows together, as many as other shares in
            proportion to their weights, as long as all of them want more.
          keep: whether the ticket keeps its chunks, for every iterator; without, its first
            listener gets them.

        Raises:
          InputError: text or context that is empty, malformed or does not fit.
          QueueFullError: `max_queue` requests wait already.
          EngineClosedError: `close` was called.
        """
        request = as_request(*arguments, **named)
        # Before the work, and again after it.
        self._claim_place(background, wait)
        ticket = Ticket(request, self.model, stream, keep)
        started = time.perf_counter()
        speech = self.model.speech(request, ticket.notices.append, self.max_seq_len)
        utterance = speech.next_utterance()
        pace = Pace(self.model.config.frame_ms / 1000) if stream else None
        now = time.perf_counter()
        ticket.timing.context = now - started
        slot = ActiveRequest(
            ticket, speech, pace, utterance, ticket.codes_so_far(), now, share, weight, background
        )
        with self._changed:
            self._claim_place(background, wait)
            self._waiting.push(slot)
            self._changed.notify_all()
        return ticket

    def close(self, finish: bool = False, seconds: float | None = None) -> None:
        """Stops the thread.

        Args:
          finish: after all requests are finished; otherwise they are cancelled.
          seconds: then those that are not finished are cancelled; None waits for all.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if finish:
            self._thread.join(seconds)
        with self._changed:
            for slot in self._all_slots():
                slot.ticket.cancel()
            self._changed.notify_all()
        self._thread.join()
        atexit.unregister(self.close)

    def _claim_place(self, background: bool, wait: bool) -> None:
        queue = self._waiting.queue(background)

        def is_full() -> bool:
            return len(queue) >= self.max_queue

        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._is_closing or not is_full())
            if self._is_closing:
                raise EngineClosedError("the engine is closed: make another")
            if is_full():
                raise QueueFullError(
                    f"{len(queue)} requests are waiting, and at most {self.max_queue} may: "
                    "try again later, or raise max_queue"
                )

    def _all_slots(self) -> list[ActiveRequest]:
        return [*self._waiting, *filter(None, self._slots)]

    # What follows runs in the engine's own thread.

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                try:
                    self._step()
                except Exception as error:
                    self._fail(error)
        finally:
            self._end()

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._all_slots())
            return bool(self._all_slots())

    def _step(self) -> None:
        """Admits requests, runs some frames, and hands them out."""
        self._drop_cancelled()
        self._admit()
        self._prefill()
        running = [i for i, slot in enumerate(self._slots) if slot and not slot.next]
        if not running:
            return
        started = time.perf_counter()
        # A row that ends makes room for another.
        codes, _ = self._batch.run(self._num_frames(running), pause=True)
        elapsed = time.perf_counter() - started
        self._frame_seconds = elapsed / max(1, codes.shape[1])
        for index in running:
            self._slots[index].ticket.timing.frames += elapsed
            self._take_frames(index, codes[index])
        self._decode()
        for index in running:
            self._end_part(index)

    def _drop_cancelled(self) -> None:
        cancelled = RequestCancelledError("the request was cancelled")
        with self._changed:
            dropped = [slot for slot in self._waiting if slot.ticket.is_cancelled]
            for slot in dropped:
                self._waiting.remove(slot)
            self._changed.notify_all()
        for slot in dropped:
            slot.ticket.finish(cancelled)
        for index, slot in enumerate(self._slots):
            if slot and slot.ticket.is_cancelled:
                self._free(index, cancelled)

    def _admit(self) -> None:
        """Gives waiting requests the free rows."""
        with self._changed:
            while slot := self._waiting.pop():
                index = self._slots.index(None)
                self._slots[index] = slot
                slot.ticket.timing.queue += time.perf_counter() - slot.since
                self._to_prefill.append(index)
                self._decoder.resume(index, slot.stream)
                slot.stream = None
                if slot.pace:
                    slot.pace.resume()
            self._changed.notify_all()

    def _prefill(self) -> None:
        """Prefills rows; as soon as a running request has a listener, one at a border."""
        while self._to_prefill:
            index = self._to_prefill.popleft()
            slot = self._slots[index]
            started = time.perf_counter()
            self._batch.join(index, slot.next)
            self._batch.wait()
            slot.ticket.timing.prefill += time.perf_counter() - started
            slot.next = None
            if any(slot and slot.pace and not slot.next for slot in self._slots):
                return

    def _num_frames(self, running: Sequence[int]) -> int:
        """Frames up to the next border."""
        if self._to_prefill:
            return 1
        return frames_to_border([self._slots[index] for index in running], self._frame_seconds)

    def _take_frames(self, index: int, codes: np.ndarray) -> None:
        """Gives a row its frames [n, Q]."""
        slot = self._slots[index]
        try:
            released, rewind, is_over = slot.speech.accept(codes)
            slot.next = slot.speech.next_utterance() if is_over else None
        except Exception as error:
            # This request's own, as long as the batch is not touched.
            self._free(index, _as_failure(error))
            return
        slot.ticket.add_frames(released)
        if slot.pace:
            slot.undecoded = np.concatenate([slot.undecoded, self.model.audible(released)])
        if rewind is not None:
            self._batch.rewind(index, rewind)
        slot.is_finished = is_over and not slot.next

    def _end_part(self, index: int) -> None:
        """Frees the row of a finished request; between two parts it goes to where it is due."""
        slot = self._slots[index]
        if not slot or not (slot.is_finished or slot.next):
            return
        if slot.is_finished:
            self._free(index)
            return
        self._batch.leave(index)
        with self._changed:
            if not self._waiting.should_yield(slot):
                self._to_prefill.append(index)
                return
            self._slots[index] = None
            slot.stream = self._decoder.take(index)
            slot.since = time.perf_counter()
            self._waiting.finish(slot)
            self._waiting.push_front(slot)

    def _decode(self) -> None:
        """Decodes what was released to those who listen."""
        while blocks := next_blocks(self._slots):
            started = time.perf_counter()
            decoded = self._decoder.decode(blocks)
            elapsed = time.perf_counter() - started
            for index, chunk in decoded.items():
                slot = self._slots[index]
                slot.ticket.timing.codec += elapsed
                slot.ticket.add_chunk(chunk)
                slot.pace.played(len(blocks[index]))

    def _free(self, index: int, error: CSMError | None = None) -> None:
        if index in self._to_prefill:
            self._to_prefill.remove(index)
        self._batch.leave(index)
        self._drop(index, error)

    def _drop(self, index: int, error: CSMError | None) -> None:
        slot, self._slots[index] = self._slots[index], None
        with self._changed:
            self._waiting.finish(slot)
        slot.ticket.finish(error)

    def _fail(self, error: Exception) -> None:
        """After an error of the machine: running requests fail, waiting ones get a new batch."""
        failure = _as_failure(error)
        for index, slot in enumerate(self._slots):
            if slot:
                self._drop(index, failure)
        self._to_prefill.clear()
        # First the old memory is freed.
        self._batch = self._decoder = None
        self._make_batch()

    def _make_batch(self) -> None:
        model = self.model
        self._batch = DecodeBatch(
            model.config, model.params, self.max_batch, self.max_seq_len, model.mesh
        )
        self._decoder = RowDecoder(model.codec, self.max_batch, rows_together(self.max_batch))

    def _end(self) -> None:
        """Finishes every ticket, whatever has happened."""
        self._batch = self._decoder = None
        with self._changed:
            self._is_closing = True
            left = self._all_slots()
            self._waiting.clear()
            self._changed.notify_all()
        for slot in left:
            slot.ticket.finish(EngineClosedError("the engine has stopped: make another"))


def _as_failure(error: Exception) -> CSMError:
    """What a ticket raises for an error of the model or the machine."""
    if isinstance(error, CSMError):
        return error
    logger.error("the engine failed", exc_info=error)
    failure = CSMError(f"the engine failed: {first_line(error)}; submit the request again")
    failure.__cause__ = error
    return failure
