"""A request that was submitted to an `Engine`, as its caller sees it."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from csm_jax.errors import CSMError
from csm_jax.inference.alignment.speech import SpeechAlignment
from csm_jax.inference.alignment.words import Word
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.inference.request import Notice, OnWord, Request
from csm_jax.inference.speech import Speech
from csm_jax.inference.take import Take

logger = logging.getLogger("csm_jax")


@dataclass
class Timing:
    """Where the time of a request went so far, in seconds.

    Attributes:
      context: encoding the turns of the context, before the request was queued.
      queue: waiting for a slot, also between parts of a long text.
      prefill: prefilling its prompts.
      frames: generating, together with all other running requests.
      codec: decoding to samples for a stream.
    """

    context: float = 0.0
    queue: float = 0.0
    prefill: float = 0.0
    frames: float = 0.0
    codec: float = 0.0


class Ticket:
    """A request that an `Engine` works on. Its methods can be called from any thread.

    Attributes:
      request: as it was submitted.
      timing: where its time went; complete when it is over.
      notices: remarks about the speech so far; complete when the request is over.
      is_cancelled: whether `cancel` was called.
      alignment: the words of the parts of the text that are over.
      takes: with `best_of`, all of them, the best first, when the request is over.
    """

    def __init__(
        self,
        request: Request,
        model: LoadedModel,
        stream: bool,
        keep: bool,
        on_word: OnWord | None = None,
    ):
        """Starts without frames.

        Args:
          stream: whether there are chunks while it is generated.
          keep: whether chunks are kept after a listener has got them.
          on_word: called with each word.
        """
        self.request = request
        self.timing = Timing()
        self.notices: list[Notice] = []
        self._model = model
        self._stream = stream
        self._keep = keep
        self._lock = threading.RLock()
        self._over = threading.Event()
        self.is_cancelled = False
        self._frames: list[np.ndarray] = []
        self._chunks: list[np.ndarray] = []
        self._listeners: list[Callable[[np.ndarray | None], None]] = []
        self._error: CSMError | None = None
        self._on_word = on_word
        self.alignment = SpeechAlignment(model.sample_rate)
        self.takes: tuple[Take, ...] = ()

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields the speech as it is generated, float32 [n]; every iterator from the beginning.

        A request that was submitted without `stream` or without `keep` comes as one chunk.

        Raises:
          RequestCancelledError: after `cancel`, or because the engine was closed.
          CSMError: the request failed.
        """
        if not (self._stream and self._keep):
            yield self.result()
            return
        chunks: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        self.add_listener(chunks.put)
        while (chunk := chunks.get()) is not None:
            yield chunk
        self._raise_error()

    def codes(self) -> np.ndarray:
        """Waits for the end; int32 [num_frames, Q]. Raises as iterating does."""
        self._over.wait()
        self._raise_error()
        return self.codes_so_far()

    def codes_so_far(self) -> np.ndarray:
        """The codes that have been generated until now; int32 [num_frames, Q]."""
        empty = np.zeros((0, self._model.config.num_codebooks), np.int32)
        return np.concatenate([empty, *self._frames])

    def result(self) -> np.ndarray:
        """Waits for the end; float32 [num_samples]. Raises as iterating does."""
        codes = self.codes()
        if not (self._stream and self._keep):
            return self._model.decode(codes)
        return np.concatenate([np.zeros(0, np.float32), *self._chunks])

    def words(self) -> list[Word]:
        """Waits for the end; the words of the text with their times, sharpened by the sound.
        Empty if the checkpoint has no alignment heads. Raises as iterating does."""
        return self.alignment.words(self.result())

    def speech(self) -> Speech:
        """Waits for the end; audio, codes, words, notices and takes. Raises as iterating does."""
        audio, rate = self.result(), self._model.sample_rate
        words, notices = tuple(self.alignment.words(audio)), tuple(self.notices)
        return Speech(audio, rate, self.codes(), words, notices, self.takes)

    def cancel(self) -> None:
        """Ends the request at the next step; nothing happens if it is over."""
        self.is_cancelled = True

    def add_listener(self, listener: Callable[[np.ndarray | None], None]) -> None:
        """Calls a function with every chunk, so that no thread has to wait for them.

            ticket.add_listener(lambda chunk: loop.call_soon_threadsafe(chunks.put_nowait, chunk))

        Args:
          listener: called with every chunk, float32 [n], at once with those so far, and with None
            when the request is over; then `codes` and `result` do not wait. It runs in the
            engine's thread and must not take long. If it raises, it is not called again.
        """
        with self._lock:
            self._listeners.append(listener)
            for chunk in self._chunks:
                self._call(listener, chunk)
            if not self._keep:
                self._chunks.clear()
            if self._over.is_set():
                self._call(listener, None)

    # The engine calls these.

    def add_frames(self, codes: np.ndarray) -> None:
        """Adds the next frames, int32 [n, Q]."""
        self._frames.append(codes)

    def add_words(self, words: Sequence[Word]) -> None:
        """Passes on words whose times have become certain."""
        for word in words:
            try:
                if self._on_word is not None:
                    self._on_word(word)
            except Exception:
                self._on_word = None
                logger.exception("on_word has failed, and is not called again")

    def add_chunk(self, chunk: np.ndarray) -> None:
        """Adds the next audio, float32 [n], and passes it to the listeners."""
        with self._lock:
            if self._keep or not self._listeners:
                self._chunks.append(chunk)
            for listener in list(self._listeners):
                self._call(listener, chunk)

    def finish(self, error: CSMError | None = None) -> None:
        """Ends the request; `error` is what waiting for its result raises."""
        with self._lock:
            self._error = error
            self._over.set()
            for listener in list(self._listeners):
                self._call(listener, None)

    def _call(
        self, listener: Callable[[np.ndarray | None], None], chunk: np.ndarray | None
    ) -> None:
        if listener not in self._listeners:
            return
        try:
            listener(chunk)
        except Exception:
            self._listeners.remove(listener)
            logger.exception("a listener has failed, and is not called again")

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
