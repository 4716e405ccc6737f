"""The directory of a run, the checkpoint or adapters at its end, and samples on the way there."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from csm_jax.checkpoints import native_format, peft_files
from csm_jax.config import read_json
from csm_jax.errors import CSMError, InputError, OutputError
from csm_jax.io.audio import save_audio
from csm_jax.io.files import locked, replace_file, reporting
from csm_jax.model.layers import Params
from csm_jax.model.lora import LoRAConfig
from csm_jax.model.precision import Precision
from csm_jax.prompt import limits
from csm_jax.prompt.limits import PromptLimits
from csm_jax.train import fsdp
from csm_jax.train.pretrained import PretrainedModel, merge_trained
from csm_jax.train.step import compute_params

SETTINGS, MODEL, ADAPTERS, SAMPLES = "run.json", "model", "adapters", "samples"
_NEW_NAMES = {"optimiser": "optimizer"}
_WAY_OUT = "make room, and the same command goes on from its last checkpoint"

# Speech of a model with these parameters (its codec's included): float32 [num_samples].
Speak = Callable[[Params], np.ndarray]


@contextlib.contextmanager
def run_directory(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Holds the directory of a run, a new one or one with the same settings.

    Of several processes that train together the first one holds it, for all. What cannot be
    written in the block is reported in one line.

    Raises:
      BusyError: another run holds it.
      InputError: it belongs to a run with other settings.
      OutputError: it cannot be written, or has other files in it.
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
    # A run that was killed in its beginning has left its lock, or a part of its settings.
    others = (path for path in out.iterdir() if not path.name.startswith(".run."))
    if not (out / SETTINGS).is_file() and any(others):
        raise OutputError(f"{out} is not empty, and no run: choose another --out")


def _check_or_write(path: Path, settings: dict[str, Any]) -> None:
    if path.is_file():
        _check_same(_renamed(read_json(path)), _renamed(settings), path.parent)
    else:
        replace_file(path, (json.dumps(settings, indent=2) + "\n").encode())


def _renamed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the present names of flags; runs of earlier versions have older ones."""
    return {_NEW_NAMES.get(name, name): value for name, value in settings.items()}


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
                f"{out} is a run with --{name}={before.get(name)}, not {now.get(name)}: give the "
                "same to go on with it, or choose another --out"
            )


def write_result(
    out: Path,
    pretrained: PretrainedModel,
    trained: Params,
    config: LoRAConfig | None,
    precision: Precision,
    own_limits: PromptLimits | None = None,
) -> Path:
    """Writes what was trained: a native checkpoint, or adapters alone. Returns its directory.

    Args:
      trained, config: as for `pretrained.merge_trained`.
      precision: its weights' type is the checkpoint's.
      own_limits: of the new checkpoint; None is those of the pretrained one.
    """
    # A run that is resumed after its end has a result already, which is replaced.
    if config is not None:
        directory = out / ADAPTERS
        peft_files.write_adapters(directory, trained, config, pretrained.name, replace=True)
        return directory
    small_files = pretrained.small_files
    if own_limits is not None:
        others = [file for file in small_files if file.name != limits.FILE_NAME]
        small_files = [*others, limits.write(out, own_limits)]
    native_format.save(
        out / MODEL,
        pretrained.config,
        merge_trained(pretrained, trained, None),
        pretrained.tokenizer,
        small_files,
        precision.weights,
        replace=True,
    )
    return out / MODEL


class SampleWriter:
    """Writes speech of the model during a run, of the same request every time."""

    def __init__(
        self,
        out: Path,
        pretrained: PretrainedModel,
        config: LoRAConfig | None,
        precision: Precision,
        speak: Speak,
    ):
        self._out = out / SAMPLES
        self._pretrained = pretrained
        self._config = config
        self._precision = precision
        self._speak = speak

    def __call__(self, step: int, params: Params) -> None:
        """Writes `samples/step-000100.wav`; `params` are the trainable ones, on any devices."""
        flat = dict(merge_trained(self._pretrained, fsdp.gather(params), self._config))
        if jax.process_index() > 0:
            return
        model = self._pretrained.config
        merged = native_format.unflatten(flat, native_format.param_shapes(model))
        if self._config is None:
            merged["csm"] = compute_params(merged["csm"], self._precision)
        audio = self._speak(jax.device_put(merged))
        self._out.mkdir(exist_ok=True)
        save_audio(self._out / f"step-{step:06}.wav", audio, model.codec.sample_rate)
