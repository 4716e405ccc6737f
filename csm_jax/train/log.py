"""The metrics of a run: JSON lines, TensorBoard and a plot."""

import io
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csm_jax.io.files import replace_file
from csm_jax.io.json_lines import add_line, read_lines, write_lines

METRICS, PLOT, TENSORBOARD = "metrics.jsonl", "loss.png", "tensorboard"


class Log:
    """Writes the metrics of a run to `DIR/metrics.jsonl` and for TensorBoard.

    What was written of steps that are run again is dropped, so that the files of a run that was
    killed are those of one that was not.
    """

    def __init__(self, directory: Path, step: int):
        """Opens the files and drops what follows `step`, the last step that was completed."""
        self._path = directory / METRICS
        lines = [line for line in read_metrics(directory) if line["step"] <= step]
        write_lines(self._path, lines)
        self._events = _Events(directory / TENSORBOARD, step + 1)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Adds a line. Numbers go to TensorBoard too; those that are not finite become null."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in figures.items()
        }
        add_line(self._path, {"step": step, **finite})
        numbers = {name: v for name, v in finite.items() if isinstance(v, int | float)}
        self._events.write(step, numbers)

    def close(self) -> None:
        """Closes the files."""
        self._events.close()


class _Events:
    """Writes numbers for TensorBoard, without a thread.

    tensorboardX's `SummaryWriter` has one, which dies of a full disk: the next call would then wait
    for it forever.
    """

    def __init__(self, directory: Path, first: int):
        """Makes a new file of events, which replaces older events from step `first` on."""
        # Hundreds of milliseconds of imports that only a run needs.
        from tensorboardX.event_file_writer import EventsWriter

        # protobuf makes the classes when the module is imported, where no type checker sees them.
        from tensorboardX.proto.event_pb2 import (
            Event,  # pyright: ignore[reportAttributeAccessIssue]
            SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
        )
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        directory.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        self._writer.write_event(
            Event(
                wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)
            )
        )
        self._writer.flush()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            summary = self._scalar(name, value)
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run so far, without an incomplete one at the end."""
    return read_lines(directory / METRICS)


def plot_losses(directory: Path) -> None:
    """Draws `DIR/loss.png`: the losses of training and of evaluation, by step."""
    from matplotlib.figure import Figure

    lines = read_metrics(directory)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, style in {"loss": "-", "eval_loss": "o-"}.items():
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="nats (backbone + depth decoder)", title=directory.name)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    replace_file(directory / PLOT, buffer.getvalue())
