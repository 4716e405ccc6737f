"""What comes of a run: checkpoints to use, and samples on the way there."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from csm_jax import checkpoint, lora
from csm_jax.audio import save_audio
from csm_jax.config import read_json
from csm_jax.errors import CSMError, InputError, OutputError
from csm_jax.files import locked, replace_file, reporting
from csm_jax.generator import Generator
from csm_jax.lora import LoRAConfig
from csm_jax.precision import Precision
from csm_jax.request import Request
from csm_jax.train import placement
from csm_jax.train.base import Base, whole_model
from csm_jax.train.step import compute_params

SETTINGS, MODEL, ADAPTERS, SAMPLES = "run.json", "model", "adapters", "samples"
_WAY_OUT = "make room, and the same command goes on from its last checkpoint"


@contextlib.contextmanager
def claimed(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Holds the directory of a run, which is made, or found to be one with the same settings.

    Of several processes that train together the first one holds it, for all. What cannot be
    written in the block is reported in one line.

    Raises:
      BusyError: another run holds it.
      InputError: it belongs to a run with other settings.
      OutputError: it cannot be written, or has other things in it.
    """
    with reporting(f"{out} could not be written", _WAY_OUT), contextlib.ExitStack() as held:
        refusal = None
        if jax.process_index() == 0:
            try:
                _check_is_run(out)
                held.enter_context(locked(out / "run"))
                _check_or_write(out / SETTINGS, settings)
            except (CSMError, OSError) as error:
                refusal = error
        _agree(refusal, out)
        yield


def _check_is_run(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    # A run that was killed while it began has left its lock, or half of its settings.
    others = (path for path in out.iterdir() if not path.name.startswith(".run."))
    if not (out / SETTINGS).is_file() and any(others):
        raise OutputError(f"{out} is not empty, and no run: choose another --out")


def _check_or_write(path: Path, settings: dict[str, Any]) -> None:
    if path.is_file():
        _check_same(read_json(path), settings, path.parent)
    else:
        replace_file(path, (json.dumps(settings, indent=2) + "\n").encode())


def _agree(refusal: Exception | None, out: Path) -> None:
    """Ends all processes that train together if the first one cannot use the directory."""
    if jax.process_count() > 1:
        is_refused = multihost_utils.broadcast_one_to_all(np.bool_(refusal is not None))
        if is_refused and refusal is None:
            raise OutputError(f"{out} cannot be used by process 0, which says why")
    if refusal is not None:
        raise refusal


def _check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise InputError(
                f"{out} is a run with --{name}={before.get(name)}, not {now.get(name)}: say the "
                "same to go on with it, or choose another --out"
            )


def write_result(
    out: Path, base: Base, trained: Any, config: LoRAConfig | None, precision: Precision
) -> Path:
    """Writes what was trained: a native checkpoint, or adapters alone. Returns its directory.

    Args:
      trained: as of `base.whole_model`.
    """
    # A run that is gone on with after its end has a result already, which is replaced.
    if config is not None:
        lora.write_adapters(out / ADAPTERS, trained, config, base.name, replace=True)
        return out / ADAPTERS
    checkpoint.save(
        out / MODEL,
        base.config,
        whole_model(base, trained, None),
        base.tokenizer,
        base.small_files,
        precision.weights,
        replace=True,
    )
    return out / MODEL


class Sampler:
    """Lets a model speak on its way through a run, the same request every time."""

    def __init__(
        self, out: Path, base: Base, config: LoRAConfig | None, precision: Precision, say: Request
    ):
        self._out = out / SAMPLES
        self._base = base
        self._config = config
        self._precision = precision
        self._say = say

    def __call__(self, step: int, params: Any) -> None:
        """Writes `samples/step-000100.wav`."""
        flat = dict(whole_model(self._base, placement.gather(params), self._config))
        if jax.process_index() > 0:
            return
        whole = checkpoint.unflatten(flat, checkpoint.param_shapes(self._base.config))
        if self._config is None:
            whole["csm"] = compute_params(whole["csm"], self._precision)
        model = Generator.from_params(
            self._base.config, jax.device_put(whole), self._base.tokenizer, self._precision
        )
        audio = model.generate(self._say, notify=lambda notice: None)
        self._out.mkdir(exist_ok=True)
        save_audio(self._out / f"step-{step:06}.wav", audio, model.sample_rate)
