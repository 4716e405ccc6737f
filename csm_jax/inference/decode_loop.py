"""The decode loop: the one place that runs a batch and gives requests their frames."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from csm_jax.inference.buckets import bucket
from csm_jax.inference.decode_batch import DecodeBatch
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.inference.request_state import RequestState, Step


class BatchStep(NamedTuple):
    """The outcome of one run of a batch.

    Attributes:
      steps: the outcome for every request, by its slot; without those that have failed.
      num_frames: frames generated for each of them.
      seconds: the time that generating them took.
    """

    steps: dict[int, Step]
    num_frames: int
    seconds: float


def new_batch(model: LoadedModel, size: int, max_seq_len: int) -> DecodeBatch:
    """An empty batch for a model."""
    heads = model.alignment.heads if model.alignment else ()
    return DecodeBatch(
        model.config,
        model.params,
        size,
        max_seq_len,
        model.mesh,
        model.inference,
        heads,
        model.kernels,
    )


def run_batch(
    batch: DecodeBatch,
    requests: Mapping[int, RequestState],
    num_frames: int,
    pause: bool = False,
    fail: Callable[[int, Exception], None] | None = None,
) -> BatchStep:
    """Generates frames for all slots, gives each request its own, and rewinds it if it has to be.

    Args:
      requests: by slot, those whose utterances have joined the batch.
      num_frames, pause: as for `DecodeBatch.run`.
      fail: is given the slot and the error of a request that fails by itself; the others go on.
        None raises the error.
    """
    started = time.perf_counter()
    frames = batch.run(num_frames, pause)
    seconds = time.perf_counter() - started
    steps = {}
    for index, state in requests.items():
        try:
            attention = None if frames.attention is None else frames.attention[index]
            step = state.accept(frames.codes[index], attention)
        except Exception as error:
            if fail is None:
                raise
            fail(index, error)
            continue
        if step.rewind is not None:
            batch.rewind(index, step.rewind)
        steps[index] = step
    return BatchStep(steps, frames.codes.shape[1], seconds)


def run_alone(
    model: LoadedModel, state: RequestState, next_chunk: Callable[[], int]
) -> Iterator[Step]:
    """Runs one request in a batch of its own.

    Args:
      next_chunk: returns how many frames to generate next.

    Yields:
      The outcomes of its steps, in which its frames are released.
    """
    while (utterance := state.next_utterance()) is not None:
        length = bucket(utterance.max_length, model.inference.min_bucket)
        batch = new_batch(model, 1, min(length, model.config.backbone.max_seq_len))
        batch.join(0, utterance)
        is_over = False
        while not is_over:
            step = run_batch(batch, {0: state}, next_chunk()).steps[0]
            is_over = step.is_over
            yield step
