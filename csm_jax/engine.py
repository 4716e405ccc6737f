"""Continuous batching: requests join and leave a running batch at frame borders.

One thread runs the batch, and everybody else holds tickets. At every border it lets requests in,
generates a few frames for all, and gives each ticket what is its own. What a request says does
not depend on the others: the batch always has the same shape, and every row its own key.
"""

import atexit
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from csm_jax.batch import Batch, Utterance
from csm_jax.errors import CancelledError, CSMError, InputError, QueueFullError, first_line
from csm_jax.generation import CHUNK_FRAMES
from csm_jax.row_decoder import RowDecoder, rows_together
from csm_jax.speech import Notice, Request, Speech, as_request
from csm_jax.streaming import LONG_CHUNK, Pace
from csm_jax.ticket import Ticket

if TYPE_CHECKING:
    from csm_jax.generator import Generator

# Whoever comes or goes waits for a border: where a frame takes less, they are not further apart.
BORDER_SECONDS = 0.25

logger = logging.getLogger("csm_jax")


@dataclass
class _Slot:
    """A request that has, or waits for, a row of the batch.

    Attributes:
      pace: None if nobody listens before the end.
      next: the utterance whose prompt is to be read next; None while one is spoken, and in the
        end.
      undecoded: int32 [n, Q], frames that a listener has not got yet.
      since: when it began to wait.
    """

    ticket: Ticket
    speech: Speech
    pace: Pace | None
    next: Utterance | None
    undecoded: np.ndarray
    since: float
    is_said: bool = False

    def take(self, num_frames: int) -> np.ndarray:
        """The first of the frames that are not decoded, [num_frames, Q]."""
        taken, self.undecoded = np.split(self.undecoded, [num_frames])
        return taken


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
    ):
        """Starts the thread that runs the batch.

        Args:
          max_batch: rows, the requests that speak at once. A step takes as long for one request
            as for all of them.
          max_seq_len: positions of a row, prompt and speech together; the model has a limit too.
          max_queue: requests that may wait for a row; so many again in the background.

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
        self._slots: list[_Slot | None] = [None] * max_batch
        self._unread: deque[int] = deque()  # rows with a prompt to read, in their order
        self._waiting: deque[_Slot] = deque()
        self._background: deque[_Slot] = deque()
        self._frame_seconds = math.inf
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
        return len(self._waiting) + len(self._background)

    def submit(
        self,
        *arguments: Any,
        stream: bool = True,
        wait: bool = False,
        background: bool = False,
        **named: Any,
    ) -> Ticket:
        """Hands in a request; its context is encoded before this returns.

        Args:
          *arguments, **named: those of `Request`, or one `Request`.
          stream: whether somebody listens while it is spoken; otherwise it is decoded in the end,
            by whoever asks for the result, and the others are not kept waiting for it.
          wait: for a place in the queue, instead of being refused.
          background: let all others go first, and leave a row free for whoever comes.

        Raises:
          InputError: text or context that is empty, malformed or does not fit.
          QueueFullError: as many requests wait as may.
          CSMError: the engine is closed.
        """
        request = as_request(*arguments, **named)
        queue = self._background if background else self._waiting
        # Before the work, and again after it.
        self._claim_place(queue, wait)
        ticket = Ticket(request, self.model, stream)
        started = time.perf_counter()
        speech = self.model.speech(request, ticket.notices.append, self.max_seq_len)
        pace = Pace(self.model.config.frame_ms / 1000) if stream else None
        now = time.perf_counter()
        ticket.timing.context = now - started
        slot = _Slot(ticket, speech, pace, speech.next_utterance(), self._no_frames(), now)
        with self._changed:
            self._claim_place(queue, wait)
            queue.append(slot)
            self._changed.notify_all()
        return ticket

    def close(self, finish: bool = False) -> None:
        """Stops the thread, after everything is spoken or with everything cancelled."""
        with self._changed:
            self._is_closing = True
            if not finish:
                for slot in self._all_slots():
                    slot.ticket.cancel()
            self._changed.notify_all()
        self._thread.join()
        atexit.unregister(self.close)

    def _claim_place(self, queue: deque[_Slot], wait: bool) -> None:
        def is_full() -> bool:
            return len(queue) >= self.max_queue

        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._is_closing or not is_full())
            if self._is_closing:
                raise CSMError("the engine is closed: make another")
            if is_full():
                raise QueueFullError(
                    f"{len(queue)} requests are waiting, and at most {self.max_queue} may: "
                    "try again later, or raise max_queue"
                )

    def _all_slots(self) -> list[_Slot]:
        return [*self._waiting, *self._background, *filter(None, self._slots)]

    def _no_frames(self) -> np.ndarray:
        return np.zeros((0, self.model.config.num_codebooks), np.int32)

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
        """Lets somebody in, runs some frames, and hands them out."""
        self._drop_cancelled()
        self._admit()
        self._read_prompts()
        speaking = [i for i, slot in enumerate(self._slots) if slot and not slot.next]
        if not speaking:
            return
        started = time.perf_counter()
        # A row that ends makes room for another.
        codes, _ = self._batch.run(self._num_frames(speaking), pause=True)
        elapsed = time.perf_counter() - started
        self._frame_seconds = elapsed / max(1, codes.shape[1])
        for index in speaking:
            self._slots[index].ticket.timing.frames += elapsed
            self._take_frames(index, codes[index])
        self._decode()
        for index in speaking:
            if self._slots[index] and self._slots[index].is_said:
                self._free(index)

    def _drop_cancelled(self) -> None:
        cancelled = CancelledError("the request was cancelled")
        with self._changed:
            dropped = []
            for queue in (self._waiting, self._background):
                leaving = [slot for slot in queue if slot.ticket.is_cancelled]
                dropped += leaving
                for slot in leaving:
                    queue.remove(slot)
            self._changed.notify_all()
        for slot in dropped:
            slot.ticket.finish(cancelled)
        for index, slot in enumerate(self._slots):
            if slot and slot.ticket.is_cancelled:
                self._free(index, cancelled)

    def _admit(self) -> None:
        """Gives those who wait the free rows."""
        with self._changed:
            while queue := self._next_queue():
                index = self._slots.index(None)
                slot = self._slots[index] = queue.popleft()
                slot.ticket.timing.queue = time.perf_counter() - slot.since
                self._unread.append(index)
                self._decoder.restart(index)
            self._changed.notify_all()

    def _next_queue(self) -> deque[_Slot] | None:
        """Whose turn it is to get a row; None while nobody's."""
        num_free = self.max_batch - self.num_speaking
        if self._waiting and num_free:
            return self._waiting
        # The last row is kept for who does not want to wait, where there is more than one.
        if self._background and num_free > (self.max_batch > 1):
            return self._background
        return None

    def _read_prompts(self) -> None:
        """Prefills rows; as soon as somebody listens, one at a border."""
        while self._unread:
            index = self._unread.popleft()
            slot = self._slots[index]
            started = time.perf_counter()
            self._batch.join(index, slot.next)
            self._batch.wait()
            slot.ticket.timing.prefill += time.perf_counter() - started
            slot.next = None
            if any(slot and slot.pace and not slot.next for slot in self._slots):
                return

    def _num_frames(self, speaking: Sequence[int]) -> int:
        """Frames up to the next border."""
        if self._unread:
            return 1
        paces = [self._slots[index].pace for index in speaking]
        wanted = min((pace.next_chunk() for pace in paces if pace), default=CHUNK_FRAMES)
        return max(1, min(wanted, int(BORDER_SECONDS / self._frame_seconds)))

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
        slot.is_said = is_over and not slot.next
        if slot.next:
            self._batch.leave(index)
            self._unread.append(index)

    def _decode(self) -> None:
        """Decodes what was released to those who listen."""
        while blocks := self._next_blocks():
            started = time.perf_counter()
            decoded = self._decoder.decode(blocks)
            elapsed = time.perf_counter() - started
            for index, chunk in decoded.items():
                slot = self._slots[index]
                slot.ticket.timing.codec += elapsed
                slot.ticket.add_chunk(chunk)
                slot.pace.played(len(blocks[index]))

    def _next_blocks(self) -> dict[int, np.ndarray]:
        """Frames [F, Q] to decode now, of the rows that have as many; empty when the rest waits."""
        due = {
            index: slot
            for index, slot in enumerate(self._slots)
            if slot and len(slot.undecoded) and not _is_better_decoded_later(slot)
        }
        longest = max((len(slot.undecoded) for slot in due.values()), default=0)
        size = LONG_CHUNK if longest >= LONG_CHUNK else 1
        return {i: slot.take(size) for i, slot in due.items() if len(slot.undecoded) >= size}

    def _free(self, index: int, error: CSMError | None = None) -> None:
        slot, self._slots[index] = self._slots[index], None
        if index in self._unread:
            self._unread.remove(index)
        self._batch.leave(index)
        slot.ticket.finish(error)

    def _fail(self, error: Exception) -> None:
        """After an error of the machine: who has a row is told, who waits gets a new batch."""
        failure = _as_failure(error)
        for index, slot in enumerate(self._slots):
            if slot:
                self._slots[index] = None
                slot.ticket.finish(failure)
        self._unread.clear()
        # First the old memory is freed.
        self._batch = self._decoder = None
        self._make_batch()

    def _make_batch(self) -> None:
        model = self.model
        self._batch = Batch(
            model.config, model.params, self.max_batch, self.max_seq_len, model.mesh
        )
        self._decoder = RowDecoder(model.codec, self.max_batch, rows_together(self.max_batch))

    def _end(self) -> None:
        """Nobody may be left waiting, whatever has happened."""
        self._batch = self._decoder = None
        with self._changed:
            self._is_closing = True
            left = self._all_slots()
            self._waiting.clear()
            self._background.clear()
            self._changed.notify_all()
        for slot in left:
            slot.ticket.finish(CSMError("the engine has stopped: make another"))


def _is_better_decoded_later(slot: _Slot) -> bool:
    """Whether frames wait for more of them: the others may be in a hurry, but who hears this one
    has enough to play, and the codec takes hardly longer for a long chunk than for a frame."""
    missing = LONG_CHUNK - len(slot.undecoded)
    is_speaking = not slot.is_said and not slot.next
    return missing > 0 and is_speaking and slot.pace is not None and slot.pace.can_wait(missing)


def _as_failure(error: Exception) -> CSMError:
    """What a ticket raises for an error of the model or the machine."""
    if isinstance(error, CSMError):
        return error
    logger.error("the engine failed", exc_info=error)
    failure = CSMError(f"the engine failed: {first_line(error)}; submit the request again")
    failure.__cause__ = error
    return failure


def speak_all(
    model: "Generator",
    requests: Sequence[Request],
    max_batch: int,
    notify: Callable[[int, Notice], None],
) -> list[np.ndarray]:
    """Audio of all requests, float32 [num_samples] each, in their order.

    The batch has `max_batch` rows however many requests there are: one shape is compiled once,
    and rounds in one way.

    Args:
      notify: told what a listener should know, with the index of the request.

    Raises what `Engine.submit` raises; then nothing is spoken on.
    """
    with Engine(model, max_batch) as engine:
        tickets = [engine.submit(request, stream=False, wait=True) for request in requests]
        audio = [ticket.result() for ticket in tickets]
    for index, ticket in enumerate(tickets):
        for notice in ticket.notices:
            notify(index, notice)
    return audio
