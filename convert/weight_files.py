"""Which files of a directory or a repository are a checkpoint.

A manifest decides: `transformers_weights` in config.json, an index, or a name that transformers or
Sesame gives. Only where there is none, a file of another name is taken, if it is the only one.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from csm_jax.checkpoints.torch_files import TORCH_SUFFIXES
from csm_jax.errors import CheckpointError

INDEX = ".index.json"
# The published repository has two checkpoints: transformers.safetensors, in parts, has a codec.
_MANIFESTS = ("transformers.safetensors", "model.safetensors", "pytorch_model.bin", "ckpt.pt")
_OTHER_RANK = len(_MANIFESTS) + 1
_SHARD = re.compile(r"-(\d+)-of-(\d+)(?=\.\w+$)")
_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
# What training programs save beside the weights, and adapters.
_NO_WEIGHTS = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|adapter_model)\b.*"
    r"|(rng_state|random_states)_\d+.*"
)


@dataclass(frozen=True)
class Candidate:
    """Files that are one checkpoint.

    Attributes:
      name: of the file, the index or the parts.
      rank: the candidates of the lowest rank are meant.
      files: names of all of its files, there or not.
      weight_map: the file of every tensor, of an index; None takes all tensors of the files.
    """

    name: str
    rank: int
    files: tuple[str, ...]
    weight_map: Mapping[str, str] | None = None

    def missing(self, present: Collection[str]) -> str | None:
        """What a directory with these files lacks, for a message; None if nothing."""
        absent = sorted(set(self.files) - set(present))
        if not absent:
            return None
        match = _SHARD.search(absent[0])
        if match is None:
            return f"{absent[0]}, which {self.name} names"
        whole = _SHARD.sub("", absent[0])
        return f"part {int(match[1])} of {int(match[2])} of {whole}"


def candidates(
    names: Collection[str], read_json: Callable[[str], Mapping[str, Any]]
) -> list[Candidate]:
    """All checkpoints among files.

    Args:
      names: of the files of a directory or of the top of a repository.
      read_json: gives the content of one of them.

    Raises:
      CheckpointError: config.json or an index is damaged.
    """
    weights = sorted(name for name in names if _is_weights(name))
    stems = sorted({_SHARD.sub("", name) for name in weights} | _stems_of_indices(names))
    found = [each for stem in stems for each in _of_stem(stem, weights, names, read_json)]
    if named := _named_by_config(names, read_json):
        found = [_of_name(named, 0, read_json), *(c for c in found if c.name != named)]
    used = {file for each in found if each.rank < _OTHER_RANK for file in each.files}
    return [each for each in found if each.rank < _OTHER_RANK or not used & {*each.files}]


def by_rank(found: Iterable[Candidate]) -> Iterator[list[Candidate]]:
    """Groups of equal rank, the lowest first."""
    ranks: dict[int, list[Candidate]] = {}
    for each in found:
        ranks.setdefault(each.rank, []).append(each)
    for rank in sorted(ranks):
        yield ranks[rank]


def choose(
    names: Collection[str], read_json: Callable[[str], Mapping[str, Any]], where: str
) -> list[str]:
    """The files of the one checkpoint that is meant, with its index; none if there is none.

    Raises:
      CheckpointError: as `candidates` does, and where several could be meant.
    """
    for group in by_rank(candidates(names, read_json)):
        if len(group) > 1:
            raise ambiguous(where, group)
        index = [group[0].name] if group[0].name.endswith(INDEX) else []
        return [*group[0].files, *index]
    return []


def ambiguous(where: str, several: Iterable[Candidate]) -> CheckpointError:
    """The error of several checkpoints of which any could be meant."""
    listed = ", ".join(each.name for each in several)
    return CheckpointError(
        f"{where} holds several checkpoints, {listed}: name one of the files (of a download, if "
        "this is a repository), or call the right one model.safetensors or ckpt.pt"
    )


def _is_weights(name: str) -> bool:
    return name.endswith(_SUFFIXES) and "/" not in name and not _NO_WEIGHTS.fullmatch(name)


def _stems_of_indices(names: Collection[str]) -> set[str]:
    indexed = {name.removesuffix(INDEX) for name in names if name.endswith(INDEX)}
    return {stem for stem in indexed if _is_weights(stem)}


def _named_by_config(
    names: Collection[str], read_json: Callable[[str], Mapping[str, Any]]
) -> str | None:
    named = read_json("config.json").get("transformers_weights") if "config.json" in names else None
    if named is not None and (not isinstance(named, str) or named not in names):
        raise CheckpointError(
            f"config.json says that the weights are in {named!r} (transformers_weights), which is "
            "not there: remove it, or add the file"
        )
    return named


def _of_stem(
    stem: str,
    weights: Collection[str],
    names: Collection[str],
    read_json: Callable[[str], Mapping[str, Any]],
) -> Iterator[Candidate]:
    """The file of this name; else what its index names; else sets of numbered parts."""
    rank = 1 + _MANIFESTS.index(stem) if stem in _MANIFESTS else _OTHER_RANK
    for name in (stem, stem + INDEX):
        if name in names:
            yield _of_name(name, rank, read_json)
            return
    totals = {
        m[2] for name in weights if (m := _SHARD.search(name)) and _SHARD.sub("", name) == stem
    }
    base, _, suffix = stem.rpartition(".")
    for total in sorted(totals):
        numbers = range(1, int(total) + 1)
        files = tuple(f"{base}-{i:0{len(total)}}-of-{total}.{suffix}" for i in numbers)
        yield Candidate(f"{base}-*-of-{total}.{suffix}", rank, files)


def _of_name(name: str, rank: int, read_json: Callable[[str], Mapping[str, Any]]) -> Candidate:
    if name.endswith(INDEX):
        return of_index(name, read_json(name), rank)
    return Candidate(name, rank, (name,))


def of_index(name: str, content: Mapping[str, Any], rank: int = 0) -> Candidate:
    """The checkpoint of an index.

    Raises:
      CheckpointError: it is damaged, or names files elsewhere.
    """
    weight_map = content.get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    if not files or not all(isinstance(file, str) for file in files):
        raise CheckpointError(f"{name} has no weight_map of tensors to files: download it again")
    for file in files:
        if "/" in file or "\\" in file:
            raise CheckpointError(f"{name} names {file}, which is not beside it")
    return Candidate(name, rank, tuple(sorted(set(files))), weight_map)
