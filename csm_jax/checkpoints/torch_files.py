"""Tensors in files of torch, which has to be installed to read them; names that torch's wrappers
change.
"""

import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from csm_jax.errors import CheckpointError
from csm_jax.io.contents import explain

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
# Under these names training programs save a state dict among other things.
WRAPPERS = ("model", "model_state_dict", "state_dict", "module")
# torch.compile, FSDP and activation checkpointing put these anywhere in a name.
_INSIDE = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# DistributedDataParallel and Lightning put these before all names.
_LEADING = ("module.", "model.")
# What torch says of an object in a pickle that is no tensor.
_GLOBAL = re.compile(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)")


class NoTensorsError(CheckpointError):
    """A file that torch reads, but which is no dictionary of tensors."""


def load_tensors(file: Path) -> dict[str, Any]:
    """The tensors of a state dict by name, unwrapped from what a training program saved.

    The names are as in the file: `plain_names` removes prefixes of wrappers.

    Raises:
      CheckpointError: torch is not installed, or the file is damaged or needs more than weights.
      NoTensorsError: it is something else than a state dict.
    """
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"reading {file} needs torch: pip install torch, or use the model.safetensors of the "
            "same checkpoint"
        ) from None
    try:
        # weights_only: a pickle can run any code, a checkpoint should not. Files of torch before
        # 1.6 are no archives, and cannot be mapped.
        content = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except Exception as error:
        if match := _GLOBAL.search(str(error)):
            raise CheckpointError(
                f"{file} cannot be read by torch without running code, because it holds "
                f"{match[1]}: save the state dict alone"
            ) from error
        raise CheckpointError(f"{file} cannot be read by torch: {_reason(error, file)}") from error
    return _unwrap(content, file)


def _unwrap(content: Any, file: Path) -> dict[str, Any]:
    if not isinstance(content, Mapping) or not content:
        raise NoTensorsError(f"{file} is not a dictionary of tensors")
    others = [str(key) for key, value in content.items() if not hasattr(value, "shape")]
    if not others:
        return dict(content)
    wrapped = [name for name in WRAPPERS if isinstance(content.get(name), Mapping)]
    if len(wrapped) > 1:
        raise CheckpointError(
            f"{file} holds several state dicts, {' and '.join(wrapped)}: save the one that is meant"
        )
    if not wrapped:
        shown = ", ".join(others[:5]) + (", ..." if others[5:] else "")
        raise NoTensorsError(
            f"{file} is not a dictionary of tensors: {shown} are none, and none of "
            f"{', '.join(WRAPPERS)} is a state dict in it"
        )
    return _unwrap(content[wrapped[0]], file)


def _reason(error: Exception, file: Path) -> str:
    reason = explain(error, file)
    # torch advises to run the code of such a file.
    return "it is damaged, or no file of torch" if "weights_only" in reason else reason


def plain_names(names: Iterable[str], file: str) -> dict[str, str]:
    """The name that a tensor has without torch's wrappers, to its name in the file.

    Raises:
      CheckpointError: two tensors get the same name.
    """
    stripped = {name: _INSIDE.sub("", name) for name in names}
    for prefix in _LEADING:
        if stripped and all(name.startswith(prefix) for name in stripped.values()):
            stripped = {name: plain.removeprefix(prefix) for name, plain in stripped.items()}
    plain_to_name: dict[str, str] = {}
    for name, plain in stripped.items():
        other = plain_to_name.setdefault(plain, name)
        if other != name:
            raise CheckpointError(f"{file} holds {plain} twice, as {other} and as {name}")
    return plain_to_name
