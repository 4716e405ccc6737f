"""Options of PEFT's LoRA (`adapter_config.json`): what is understood, and nothing else.

An option can change what the weights of an adapter mean, so every option that is set has to be in
one of the lists of this file. Their meaning is that of `peft/tuners/lora/config.py`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from csm_jax.errors import CheckpointError

_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
# They matter to training, to the choice of modules, which the tensors tell, or to other options.
_WITHOUT_EFFECT = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
    "runtime_config",
    "megatron_core",  # without megatron_config
    "qalora_group_size",  # without use_qalora
    "loftq_config",  # without loftq as init_lora_weights; so are the following
    "eva_config",
    "corda_config",
    "lora_ga_config",
)
_UNSET = (None, False, "", [], {})
# The base keeps its weights with these, and loses a part of them to the adapters with the others.
_INITS = (None, "true", "false", "gaussian", "eva", "orthogonal", "mica")
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")
_MERGE = "merge the adapters into their model with PEFT (merge_and_unload) and convert that model"


@dataclass(frozen=True)
class PeftOptions:
    """The options that say how large an update is.

    Attributes:
      rank, alpha: of all modules but those that a pattern matches.
      rank_pattern, alpha_pattern: by regular expressions of module names; the first match counts.
      use_rslora: updates are multiplied by `alpha / sqrt(rank)` instead of `alpha / rank`.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    @property
    def scale(self) -> float:
        """Of all modules but those that a pattern matches."""
        return self._scale(self.rank, self.alpha)

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its name in transformers' model."""
        return int(_match(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """The factor of a module's update, by its name in transformers' model."""
        return self._scale(self.rank_of(module), _match(self.alpha_pattern, module, self.alpha))

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _match(pattern: Mapping[str, float], module: str, default: float) -> float:
    # As `get_pattern_key` of PEFT.
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def parse_options(values: Mapping[str, Any], where: str) -> PeftOptions:
    """Reads the content of `adapter_config.json`.

    Args:
      where: the file, for messages.

    Raises:
      CheckpointError: it sets an option that is not understood, or one to a wrong value.
    """
    kind = values.get("peft_type")
    if kind is None:
        raise CheckpointError(
            f"{where} has no peft_type: only adapters of PEFT are read, in its format"
        )
    if kind != "LORA":
        raise CheckpointError(f"{where} describes adapters of type {kind}; only LORA is supported")
    _check_init(values.get("init_lora_weights"), where)
    if values.get("bias") not in (None, "none"):
        raise CheckpointError(
            f"{where} has bias={values['bias']}, which is not supported: {_MERGE}"
        )
    known = (*_READ, *_WITHOUT_EFFECT, "init_lora_weights", "bias")
    for name, value in values.items():
        if name not in known and value not in _UNSET:
            raise CheckpointError(f"{where} has {name}, which is not supported: {_MERGE}")
    use_rslora = values.get("use_rslora") or False
    if not isinstance(use_rslora, bool):
        raise CheckpointError(f"{where}: use_rslora is {use_rslora!r}, but must be true or false")
    return PeftOptions(
        rank=_rank(values.get("r"), f"{where}: r"),
        alpha=_alpha(values.get("lora_alpha"), f"{where}: lora_alpha"),
        rank_pattern={k: _rank(v, f"{where}: {k}") for k, v in _pattern(values, "rank", where)},
        alpha_pattern={k: _alpha(v, f"{where}: {k}") for k, v in _pattern(values, "alpha", where)},
        use_rslora=use_rslora,
    )


def _check_init(init: Any, where: str) -> None:
    name = init.lower() if isinstance(init, str) else init
    if isinstance(name, str) and name.startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{where} has init_lora_weights={init}, which changed the weights of the base model "
            "before training: save the adapters for the unchanged model, with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if not (isinstance(name, bool) or name in _INITS):
        raise CheckpointError(
            f"{where} has init_lora_weights={init}, with which the weights of the base model may "
            f"have changed: {_MERGE}"
        )


def _pattern(values: Mapping[str, Any], name: str, where: str) -> list[tuple[str, Any]]:
    pattern = values.get(f"{name}_pattern") or {}
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{where}: {name}_pattern is {pattern!r}, but must be an object")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise CheckpointError(
                f"{where}: {key!r} in {name}_pattern is no regular expression ({error})"
            ) from error
    return list(pattern.items())


def _rank(value: Any, where: str) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{where} is {value!r}, but must be a whole number of at least 1")
    return value


def _alpha(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"{where} is {value!r}, but must be a number above 0")
    return value
