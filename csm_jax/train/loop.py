"""The training loop: steps, and between them checkpoints, metrics, evaluation and samples."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from csm_jax.errors import CSMError
from csm_jax.model.layers import Params
from csm_jax.model.sharding import place_rows
from csm_jax.train.batches import Batch
from csm_jax.train.checkpoints import Checkpoints
from csm_jax.train.log import Log
from csm_jax.train.optimizer import learning_rate
from csm_jax.train.step import Metrics, TrainState, TrainStepConfig, eval_step, train_step


class Batches(Protocol):
    """An endless iterator whose position can be saved and restored, as grain's can."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class RunConfig:
    """The intervals of a run, in steps; 0 is never.

    Attributes:
      save_every: steps between checkpoints.
      eval_every: steps between evaluations; 0 is never.
      sample_every: steps between audio samples; 0 is never.
      log_every: steps between lines of metrics.jsonl.
      keep: how many of the latest checkpoints stay.
      patience: steps in a row without a finite gradient after which the run ends.
    """

    save_every: int = 200
    eval_every: int = 200
    sample_every: int = 0
    log_every: int = 10
    keep: int = 3
    patience: int = 10


class Run:
    """Training from the last checkpoint, if there is one, to the last step.

    Args:
      out: the directory of the run.
      step_config: what the step is compiled for; it has the number of steps.
      run_config: when to save, evaluate, log and sample.
      state: before the first step; a checkpoint in `out` replaces it.
      frozen, seed: as for `train_step`.
      held_out: batches to evaluate on.
      sample: writes speech of the model, called with the step and the trainable parameters.

    Attributes:
      compiled: seconds that the step took to compile, by the length of its rows.
    """

    def __init__(
        self,
        out: Path,
        step_config: TrainStepConfig,
        run_config: RunConfig,
        state: TrainState,
        frozen: Params | None,
        batches: Batches,
        held_out: Sequence[Batch] = (),
        seed: int = 0,
        sample: Callable[[int, Params], None] | None = None,
    ):
        self.out = out
        self.step_config = step_config
        self.run_config = run_config
        self.state = state
        self._frozen = frozen
        self._batches = batches
        self._held_out = held_out
        self._seed = np.uint32(seed % 2**32)
        self._sample = sample
        self._stop = threading.Event()
        self.compiled: dict[int, float] = {}
        self._rate = learning_rate(step_config.optimizer)

    def train(self) -> bool:
        """Runs to the end, or to a SIGTERM; returns whether it is the end.

        Raises:
          CSMError: too many steps in a row had no finite gradient.
        """
        with (
            Checkpoints(self.out / "checkpoints", self.run_config.keep) as checkpoints,
            _stopping_on_signals(self._stop),
        ):
            if restored := checkpoints.restore(self.state):
                self.state, position = restored
                self._batches.set_state(position)
            with self._open_log() as log, self._open_bar() as bar:
                return self._run_steps(checkpoints, log, bar)

    def _run_steps(self, checkpoints: Checkpoints, log: Log | None, bar: tqdm) -> bool:
        when, last = self.run_config, self.step_config.optimizer.steps
        for step in range(int(self.state.step) + 1, last + 1):
            metrics, figures = self._run_step(step)
            bar.update(1)
            bar.set_postfix_str(f"loss {metrics.loss:.3f}")
            self._check_patience(metrics, checkpoints)
            if _is_due(step, when.eval_every, last) and self._held_out:
                figures |= self._evaluate()
            is_logged = step == 1 or _is_due(step, when.log_every, last)
            if log and (is_logged or "eval_loss" in figures):
                log.write(step, figures)
            if self._sample and _is_due(step, when.sample_every, last):
                self._sample(step, self.averaged)
            is_stopped = self._stop.is_set() or checkpoints.is_preempted(step)
            if is_stopped or _is_due(step, when.save_every, last):
                self._save(metrics, checkpoints)
            if is_stopped and step < last:
                return False
        return True

    def _run_step(self, step: int) -> tuple[Metrics, dict[str, Any]]:
        """Trains on the next batch; returns the metrics, and the figures to log."""
        started = time.perf_counter()
        batch = place_rows(next(self._batches), self.step_config.mesh)
        with compile_clock() as seconds:
            self.state, metrics = train_step(
                self.state, self._frozen, batch, self._seed, config=self.step_config
            )
        self.compiled.setdefault(batch.frames.shape[1], sum(seconds))
        metrics = jax.device_get(metrics)
        return metrics, self._describe(step, metrics, time.perf_counter() - started)

    @property
    def averaged(self) -> Params:
        """The parameters to use: their moving average, where there is one."""
        return self.state.params if self.state.ema is None else self.state.ema

    def _describe(self, step: int, metrics: Metrics, seconds: float) -> dict[str, Any]:
        measured = metrics._asdict().items()
        figures = {name: value.item() for name, value in measured if value is not None}
        rate = float(np.asarray(self._rate(step - 1 - figures["skipped"])))
        return figures | {
            "learning_rate": rate,
            "frames_per_second": figures["num_frames"] / seconds,
        }

    def _check_patience(self, metrics: Metrics, checkpoints: Checkpoints) -> None:
        if metrics.skipped_in_a_row >= self.run_config.patience:
            good = checkpoints.latest()
            where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            raise CSMError(
                f"{metrics.skipped_in_a_row} steps in a row had a gradient that is not finite; "
                f"{where}: lower --learning_rate, or look at the data"
            )

    def _save(self, metrics: Metrics, checkpoints: Checkpoints) -> None:
        # Parameters are good even after a skipped step, but a run should not be resumed in the
        # middle of several.
        if metrics.skipped_in_a_row == 0:
            checkpoints.save(self.state, self._batches.get_state())

    def _evaluate(self) -> dict[str, Any]:
        losses = evaluate(self.averaged, self._frozen, self._held_out, self.step_config)
        return {f"eval_{name}": value for name, value in losses.items()}

    @contextlib.contextmanager
    def _open_log(self) -> Iterator[Log | None]:
        if jax.process_index() > 0:
            yield None
            return
        with contextlib.closing(Log(self.out, int(self.state.step))) as log:
            yield log

    def _open_bar(self) -> tqdm:
        quiet = True if jax.process_index() > 0 else None
        done, total = int(self.state.step), self.step_config.optimizer.steps
        return tqdm(initial=done, total=total, unit="step", disable=quiet, leave=False)


def _is_due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


@contextlib.contextmanager
def compile_clock() -> Iterator[list[float]]:
    """A list of the seconds of everything that jax traces, lowers and compiles in the block."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def _stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """Sets `stop` on SIGTERM and SIGHUP, so that the run ends after the current step.

    A preempted machine sends SIGTERM; a terminal that closes, SIGHUP, which may be ignored.
    """
    is_main = threading.current_thread() is threading.main_thread()
    # Several processes must all stop at the same step: jax has a handler for that.
    if not is_main or jax.process_count() > 1:
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, lambda *_: stop.set())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def evaluate(
    params: Params, frozen: Params | None, batches: Sequence[Batch], config: TrainStepConfig
) -> dict[str, Any]:
    """Losses with every frame counted, in nats a code.

    Returns:
      loss, backbone_loss, depth_decoder_loss; num_frames; by_codebook, a list of Q losses.
    """
    backbone, depth, num_frames = 0.0, np.zeros(config.model.num_codebooks - 1), 0
    for batch in batches:
        rows = place_rows(batch, config.mesh)
        sums = jax.device_get(eval_step(params, frozen, rows, config=config))
        backbone += float(sums.backbone)
        depth += np.asarray(sums.depth, np.float64)
        num_frames += int(sums.num_frames)
    by_codebook = [float(value) / max(num_frames, 1) for value in [backbone, *depth]]
    return {
        "loss": float(np.dot(config.loss_weights.astype(np.float64), by_codebook)),
        "backbone_loss": by_codebook[0],
        "depth_decoder_loss": float(np.mean(by_codebook[1:])),
        "num_frames": num_frames,
        "by_codebook": by_codebook,
    }
