"""Continuous batching: requests join and leave a running batch between two steps.

One thread runs the batch; callers hold tickets. In every step it admits waiting requests,
generates a few frames for all slots, and gives each ticket its own. The frames of a request do not
depend on the others: the batch always has the same shape, and every row its own key.

Slots are shared fairly (`scheduler.py`): between two parts of a long text, where it has to be
prefilled again anyway, a request gives its slot up if one of a share with fewer slots waits.
"""

import atexit
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from csm_jax.errors import (
    CSMError,
    EngineClosedError,
    QueueFullError,
    RequestCancelledError,
    first_line,
)
from csm_jax.inference.active_request import ActiveRequest
from csm_jax.inference.engine_config import EngineConfig
from csm_jax.inference.engine_core import EngineCore
from csm_jax.inference.frame_blocks import FrameBlocks
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.inference.pacing import Pace
from csm_jax.inference.request import OnWord, Request
from csm_jax.inference.request_parameters import submit_parameters, takes_request
from csm_jax.inference.request_state import RequestState
from csm_jax.inference.scheduler import SlotScheduler
from csm_jax.inference.takes import submit_takes
from csm_jax.inference.ticket import Ticket
from csm_jax.model.compiling import compile_all

logger = logging.getLogger("csm_jax")


class Engine:
    """Generates the speech of many requests at once.

        with csm_jax.Engine(model, max_batch=8) as engine:
            tickets = [engine.submit(text) for text in texts]
            for chunk in tickets[0]: ...

    The block ends when all requests are finished; with an error, all are cancelled.

    Attributes:
      model: what it runs.
      config: its sizes, as it was given them.
      max_batch: the number of slots.
      max_seq_len: positions of a slot; `config.max_seq_len`, or the model's limit if that is less.
    """

    def __init__(
        self,
        model: LoadedModel,
        max_batch: int = EngineConfig.max_batch,
        max_seq_len: int = EngineConfig.max_seq_len,
        max_queue: int = EngineConfig.max_queue,
        kept_rows: int = EngineConfig.kept_rows,
        kept_beside_others: int = EngineConfig.kept_beside_others,
    ):
        """Starts the thread that runs the batch.

        Args:
          max_batch, max_seq_len, max_queue, kept_rows, kept_beside_others: as in `EngineConfig`.

        Raises:
          InputError: a number is less than 1, or the model's mesh does not divide the slots.
        """
        self.model = model
        self.config = EngineConfig(max_batch, max_seq_len, max_queue, kept_rows, kept_beside_others)
        self.max_batch = max_batch
        self.max_seq_len = min(max_seq_len, model.config.backbone.max_seq_len)
        self._core = EngineCore(model, max_batch, self.max_seq_len)
        self._waiting: SlotScheduler[ActiveRequest] = SlotScheduler(
            max_batch, kept_rows, kept_beside_others
        )
        # What `warm_up` has compiled: the programs of all requests, and those of prefixes of these
        # lengths.
        self._is_warm = False
        self._warm_prefixes: set[int] = set()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="csm_jax.Engine", daemon=True)
        self._thread.start()
        # An interpreter that exits during a computation crashes.
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.close(finish=kind is None)

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests: it is not closed, and no error has ended its thread."""
        return self._thread.is_alive() and not self._is_closing

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return len(self._core.active)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot, those in the background included."""
        return len(self._waiting.live) + len(self._waiting.background)

    def warm_up(
        self,
        prefix_lengths: Sequence[int] = (),
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Compiles all that requests of any kind need, so that no request waits for the compiler.

        It does so in the calling thread, while requests are running. Programs that are compiled
        already take no time.

        Args:
          prefix_lengths: positions that requests will share, such as those of a voice's sample.
          should_stop: asked between two programs whether to give up.

        Raises:
          RequestCancelledError: `should_stop` returned True.
          EngineClosedError: `close` was called.
        """
        core = self._core
        if not self._is_warm:
            # The guard compares with these; they are encoded once.
            _ = self.model.silent_codes
            compile_all(core.programs(), should_stop)
            self._is_warm = True
        for bucket in core.prefix_buckets(prefix_lengths):
            if bucket not in self._warm_prefixes:
                compile_all(core.prefix_programs(bucket), should_stop)
                self._warm_prefixes.add(bucket)

    @takes_request(submit_parameters)
    def submit(
        self,
        request: Request,
        stream: bool,
        wait: bool,
        background: bool,
        share: str,
        weight: float,
        keep: bool,
        on_word: OnWord | None,
    ) -> Ticket:
        """Queues a request; its context is encoded before this returns.

        Args:
          text: what to speak, or a `Request`.
          speaker, context, sampling, max_audio_length_ms, seed, guard, shared_turns, pauses,
            best_of, interventions, context_seconds, voice, rank: as in `Request`; beside one, they
            replace its own.
          stream: whether there are chunks while it is generated; otherwise the thread that asks
            for the result decodes it, and no other request waits for that.
          wait: for a place in the queue, instead of raising an error.
          background: all other requests go first, and a slot is left free for them.
          share, weight: requests of one share have slots together, as many as other shares in
            proportion to their weights, as long as all of them need more.
          keep: whether the ticket keeps its chunks, for every iterator; otherwise they are gone
            once its first listener has got them.
          on_word: called in the engine's thread with each word, as `Generator.generate` does; it
            must not take long. If it raises, it is not called again.

        Raises:
          InputError: text or context that is empty, malformed or does not fit.
          QueueFullError: `max_queue` requests are waiting already.
          EngineClosedError: `close` was called.
        """
        options = {"wait": wait, "background": background, "share": share, "weight": weight}
        if request.best_of > 1:
            submit = functools.partial(self.submit, stream=False, **options)
            length = self.max_seq_len
            return submit_takes(request, self.model, length, submit, stream, keep, on_word)
        # Before the work, and again after it.
        self._claim_place(background, wait)
        ticket = Ticket(request, self.model, stream, keep, on_word)
        started = time.perf_counter()
        state = RequestState(self.model, request, ticket.notices.append, self.max_seq_len)
        ticket.alignment = state.alignment
        utterance = state.next_utterance()
        now = time.perf_counter()
        ticket.timing.context = now - started
        active = ActiveRequest(
            ticket=ticket,
            state=state,
            pace=Pace(self.model.config.frame_ms / 1000) if stream else None,
            next=utterance,
            blocks=FrameBlocks(self.model.config.num_codebooks),
            since=now,
            share=share,
            weight=weight,
            in_background=background,
        )
        with self._changed:
            self._claim_place(background, wait)
            self._waiting.push(active)
            self._changed.notify_all()
        return ticket

    def close(self, finish: bool = False, seconds: float | None = None) -> None:
        """Stops the thread.

        Args:
          finish: wait until all requests are finished; otherwise they are cancelled.
          seconds: how long to wait before the others are cancelled; None is without limit.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if finish:
            self._thread.join(seconds)
        with self._changed:
            for request in self._all_requests():
                request.ticket.cancel()
            self._changed.notify_all()
        self._thread.join()
        atexit.unregister(self.close)

    def _claim_place(self, background: bool, wait: bool) -> None:
        queue = self._waiting.queue(background)

        def is_full() -> bool:
            return len(queue) >= self.config.max_queue

        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._is_closing or not is_full())
            if self._is_closing:
                raise EngineClosedError("the engine is closed: make another")
            if is_full():
                raise QueueFullError(
                    f"{len(queue)} requests are waiting, and at most {self.config.max_queue} may: "
                    "try again later, or raise max_queue"
                )

    def _all_requests(self) -> list[ActiveRequest]:
        return [*self._waiting, *self._core.active.values()]

    # The rest runs in the engine's own thread.

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                try:
                    self._step()
                except Exception as error:
                    self._fail_running(error)
        finally:
            self._end()

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._all_requests())
            return bool(self._all_requests())

    def _step(self) -> None:
        """Admits requests, generates some frames, and hands them out."""
        self._drop_cancelled()
        self._admit()
        for index in self._core.step(self._fail_one):
            self._end_part(index)

    def _drop_cancelled(self) -> None:
        cancelled = RequestCancelledError("the request was cancelled")
        with self._changed:
            dropped = [request for request in self._waiting if request.ticket.is_cancelled]
            for request in dropped:
                self._waiting.remove(request)
            self._changed.notify_all()
        for request in dropped:
            request.ticket.finish(cancelled)
        for index, request in list(self._core.active.items()):
            if request.ticket.is_cancelled:
                self._free(index, cancelled)

    def _admit(self) -> None:
        """Gives waiting requests the free slots."""
        with self._changed:
            while request := self._waiting.pop():
                request.ticket.timing.queue += time.perf_counter() - request.since
                self._core.add(request)
            self._changed.notify_all()

    def _end_part(self, index: int) -> None:
        """Frees the slot of a finished request. Between two parts, the scheduler decides whether
        the request keeps its slot."""
        request = self._core.active[index]
        if request.is_finished:
            self._free(index)
            return
        with self._changed:
            if not self._waiting.should_yield(request):
                self._core.prefill_next(index)
                return
            self._core.suspend(index)
            request.since = time.perf_counter()
            self._waiting.finish(request)
            self._waiting.push_front(request)

    def _free(self, index: int, error: CSMError | None = None) -> None:
        with self._changed:
            request = self._core.remove(index)
            self._waiting.finish(request)
        request.ticket.finish(error)

    def _fail_one(self, index: int, error: Exception) -> None:
        """After an error of one request, which has not touched the batch."""
        self._free(index, _as_failure(error))

    def _fail_running(self, error: Exception) -> None:
        """After an error of the batch: running requests fail, waiting ones get a new batch."""
        failure = _as_failure(error)
        with self._changed:
            failed = list(self._core.active.values())
            for request in failed:
                self._waiting.finish(request)
            self._core.close()
        for request in failed:
            request.ticket.finish(failure)
        self._core.reset()

    def _end(self) -> None:
        """Finishes every ticket that is left; runs after an error too."""
        with self._changed:
            self._is_closing = True
            left = self._all_requests()
            self._waiting.clear()
            self._core.close()
            self._changed.notify_all()
        for request in left:
            request.ticket.finish(EngineClosedError("the engine has stopped: make another"))


def _as_failure(error: Exception) -> CSMError:
    """The error that a ticket raises for one of the model or the machine."""
    if isinstance(error, CSMError):
        return error
    logger.error("the engine failed", exc_info=error)
    failure = CSMError(f"the engine failed: {first_line(error)}; submit the request again")
    failure.__cause__ = error
    return failure
