"""What a run says of itself: JSON lines, TensorBoard, a plot."""

import json
import math
from pathlib import Path
from typing import Any

from csm_jax.files import replace_file

METRICS, PLOT, TENSORBOARD = "metrics.jsonl", "loss.png", "tensorboard"


class Log:
    """Figures of a run, in `DIR/metrics.jsonl` and for TensorBoard.

    Whatever was written of steps that are run again is dropped, so that a run that was killed
    reads like one that was not.
    """

    def __init__(self, directory: Path, step: int):
        """Args: step: the last one that counts."""
        # Hundreds of milliseconds of imports that only a run needs.
        from tensorboardX import SummaryWriter

        self._path = directory / METRICS
        lines = [line for line in read_metrics(directory) if line["step"] <= step]
        replace_file(self._path, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
        self._writer = SummaryWriter(str(directory / TENSORBOARD), purge_step=step + 1)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Adds a line. Numbers go to TensorBoard too, those that are not finite are null."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in figures.items()
        }
        with open(self._path, "a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in finite.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run so far, without one that was cut off."""
    path = directory / METRICS
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def plot_losses(directory: Path) -> None:
    """Draws `DIR/loss.png`: what was learnt from and what was held out, step by step."""
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
    figure.savefig(directory / PLOT, dpi=120)
