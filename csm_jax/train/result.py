"""What comes of a run: checkpoints to use, and samples on the way there."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax

from csm_jax import checkpoint, lora
from csm_jax.audio import save_audio
from csm_jax.config import read_json
from csm_jax.errors import InputError, OutputError
from csm_jax.files import replace_file
from csm_jax.generator import Generator
from csm_jax.lora import LoRAConfig
from csm_jax.precision import Precision
from csm_jax.speech import Request
from csm_jax.train import placement
from csm_jax.train.base import Base, whole_model
from csm_jax.train.step import compute_params

SETTINGS, MODEL, ADAPTERS, SAMPLES = "run.json", "model", "adapters", "samples"


def claim_directory(out: Path, settings: dict[str, Any]) -> None:
    """Makes the directory of a run, or finds it to be one with the same settings.

    Raises:
      InputError: it belongs to another run.
      OutputError: it cannot be written, or has other things in it.
    """
    path = out / SETTINGS
    if path.is_file():
        _check_same(read_json(path), settings, out)
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise OutputError(f"{out} is not empty, and no run: choose another --out")
        if jax.process_index() == 0:
            replace_file(path, (json.dumps(settings, indent=2) + "\n").encode())
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}") from error


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
    directory = out / (MODEL if config is None else ADAPTERS)
    # A run that is gone on with after its end has one already.
    shutil.rmtree(directory, ignore_errors=True)
    if config is not None:
        lora.write_adapters(directory, trained, config, base.name)
        return directory
    tensors = whole_model(base, trained, None)
    checkpoint.save(
        directory, base.config, tensors, base.tokenizer, base.small_files, precision.weights
    )
    return directory


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
        model = Generator(self._base.config, jax.device_put(whole), self._base.tokenizer)
        audio = model.generate(self._say, notify=lambda notice: None)
        self._out.mkdir(exist_ok=True)
        save_audio(self._out / f"step-{step:06}.wav", audio, model.sample_rate)
