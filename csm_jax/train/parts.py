"""The parts of a model by name: which of them are trained, and which stay as they are."""

from collections.abc import Collection, Iterable

from csm_jax.errors import InputError
from csm_jax.model.layers import Params

# The sections of the parameters, and names of several.
PARTS = (
    "text_embedding",
    "audio_embedding",
    "backbone",
    "projection",
    "codebook0_head",
    "depth_decoder",
    "depth_heads",
)
GROUPS = {
    "all": PARTS,
    "embeddings": ("text_embedding", "audio_embedding"),
    "heads": ("codebook0_head", "depth_heads"),
}


def find_parts(names: Iterable[str]) -> frozenset[str]:
    """The parts that are named, each by its own name or by that of a group.

    Raises:
      InputError: there is no such name, or none is given.
    """
    found = set[str]()
    for name in names:
        if name not in PARTS and name not in GROUPS:
            raise InputError(
                f"{name} is no part of the model that can be trained: there are "
                f"{', '.join([*GROUPS, *PARTS])}"
            )
        found |= set(GROUPS.get(name, (name,)))
    if not found:
        raise InputError(f"no part is trained: name some of {', '.join([*GROUPS, *PARTS])}")
    return frozenset(found)


def split(params: Params, trained: Collection[str]) -> tuple[Params, Params]:
    """The parameters of the parts that are trained, and those of the others."""
    ours = {name: section for name, section in params.items() if name in trained}
    return ours, {name: section for name, section in params.items() if name not in trained}
