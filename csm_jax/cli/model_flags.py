"""Flags that name a model and the types of its parameters."""

from absl import flags

from csm_jax.cli import flags as cli
from csm_jax.inference.generator import Generator, load
from csm_jax.loading import BUNDLED, NAMES, RANDOM
from csm_jax.model.kernels.choice import KERNELS, PALLAS, XLA
from csm_jax.model.precision import DTYPES, QUANTIZE

_CHECKPOINT = "sesame/csm-1b"
_DTYPES = ", ".join(["auto", *DTYPES])
_QUANTIZE = " or ".join(QUANTIZE)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `load_model`."""
    define_checkpoint(values)
    define_adapters(values)
    flags.DEFINE_string("dtype", "auto", f"one of {_DTYPES}", flag_values=values)
    quantize = f"{_QUANTIZE}; default: as the checkpoint is stored"
    flags.DEFINE_string("quantize", None, quantize, flag_values=values)
    define_kernels(values)


def define_checkpoint(values: flags.FlagValues, default: str = _CHECKPOINT) -> None:
    """Defines `--checkpoint`."""
    names = f"hub name (or NAME@REVISION), directory in any layout, {' or '.join(NAMES)}"
    flags.DEFINE_string("checkpoint", default, names, flag_values=values)


def define_adapters(values: flags.FlagValues) -> None:
    """Defines `--adapters`."""
    adapters = (
        "LoRA adapters to add to the weights, of csm_jax.finetune or PEFT: directory or hub name"
    )
    flags.DEFINE_string("adapters", None, adapters, flag_values=values)


def define_kernels(values: flags.FlagValues) -> None:
    """Defines `--kernels`."""
    kernels = f"{' or '.join(KERNELS)}: {PALLAS} is fused kernels for frames on a CUDA GPU"
    flags.DEFINE_string("kernels", XLA, kernels, flag_values=values)


def define_precisions(values: flags.FlagValues) -> None:
    """Defines `--dtype` and `--quantize` as lists, for commands that run several."""
    dtypes = f"{_DTYPES}; several with commas between them"
    flags.DEFINE_list("dtype", ["auto"], dtypes, flag_values=values)
    flags.DEFINE_list("quantize", ["none"], f"{_QUANTIZE}, or both", flag_values=values)


def load_model(values: flags.FlagValues) -> Generator:
    """Loads the model that the flags name; warns if it is not a full model of speech.

    Raises:
      CheckpointError, InputError: as `csm_jax.load`.
    """
    name = values.checkpoint
    if name in RANDOM:
        cli.warn(f"{name}: the weights are random, the sound is noise and not speech")
    if name in BUNDLED:
        cli.warn(
            f"{name}: a very small model of digits and simple sentences; it guesses other words"
        )
    return load(
        name, values.dtype, values.quantize, adapters=values.adapters, kernels=values.kernels
    )
