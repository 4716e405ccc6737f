"""Finds out the layout of a checkpoint, and opens it."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.checkpoints import peft_files
from csm_jax.checkpoints.torch_files import NoTensorsError
from csm_jax.config import CSMConfig, MimiConfig, read_json
from csm_jax.convert import configs, csm, mimi
from csm_jax.convert.flavors import csm_from_shapes
from csm_jax.convert.rules import Shape, Table, TensorSource, convert
from csm_jax.convert.sources import list_candidates, open_candidate, open_file
from csm_jax.convert.weight_files import ambiguous, by_rank
from csm_jax.errors import CheckpointError

# The name of a tensor in each layout, which no other layout has.
_HUGGINGFACE_KEY = "backbone_model.layers.0.input_layernorm.weight"
_SESAME_KEY = "backbone.layers.0.sa_norm.scale"
_HUGGINGFACE_CODEC_KEY = "encoder.layers.0.conv.weight"
_KYUTAI_CODEC_KEY = "encoder.model.0.conv.conv.weight"
_CODEC_PREFIX = "codec_model."


@dataclass(frozen=True)
class Part:
    """A table, the tensors it reads, and the section of the parameters that it fills."""

    section: str
    table: Table
    source: TensorSource


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in one of the published layouts, opened but not read."""

    config: CSMConfig
    parts: tuple[Part, ...]

    def tensors(self, targets: Mapping[str, Shape]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields every parameter, one at a time; `targets` as in `rules.convert`."""
        sections = []
        for part in self.parts:
            prefix = f"{part.section}/"
            own = {p.removeprefix(prefix): s for p, s in targets.items() if p.startswith(prefix)}
            sections.append((prefix, convert(part.table, part.source, own)))
        for prefix, tensors in sections:
            for path, tensor in tensors:
                yield prefix + path, tensor


# Weights of other programs: llama.cpp, MLX, Keras, Flax, ONNX, and parts of torch's runs.
_UNREAD_SUFFIXES = (".gguf", ".ggml", ".npz", ".h5", ".msgpack", ".onnx", ".distcp")


def open_checkpoint(
    source: Path, codec: Path | None = None, config: CSMConfig | None = None
) -> Checkpoint:
    """Finds out the layout of a directory (or a single file) and opens it.

    Args:
      source: a directory in the Sesame or the Hugging Face layout, or both side by side (then
        the Hugging Face one is read, which has a codec); or one file of them.
      codec: Mimi in the kyutai or the Hugging Face layout; the Sesame layout has no codec inside.
      config: sizes, if the layout's own config does not have them.

    Raises:
      CheckpointError: nothing known is there, or the codec is missing.
    """
    tensors = _find_model(source)
    if _HUGGINGFACE_KEY in tensors.shapes:
        return _open_huggingface(source, tensors, config, codec)
    return _open_sesame(source, tensors, config, codec)


def needs_codec(source: Path) -> bool:
    """Whether the checkpoint in a directory has no codec of its own.

    Raises:
      CheckpointError: there is no checkpoint.
    """
    return _HUGGINGFACE_KEY not in _find_model(source).shapes


def open_codec(source: Path, config: MimiConfig) -> tuple[MimiConfig, Part]:
    """Opens Mimi alone: a directory, or one safetensors file.

    The Hugging Face layout has its own sizes; kyutai's is read with those of `config`.

    Raises:
      CheckpointError: there is no Mimi.
    """
    tensors = _find(source, (_HUGGINGFACE_CODEC_KEY, _KYUTAI_CODEC_KEY))
    if tensors is None:
        raise CheckpointError(
            f"{source} holds no Mimi codec: expected model.safetensors of kyutai/mimi, or "
            "tokenizer-e351c8d8-checkpoint125.safetensors"
        )
    if _HUGGINGFACE_CODEC_KEY in tensors.shapes:
        config = configs.mimi_from_huggingface(_read_config(source))
        return config, Part("codec", mimi.huggingface_table(config), tensors)
    return config, Part("codec", mimi.kyutai_table(config, tensors.shapes), tensors)


def _find_model(source: Path) -> TensorSource:
    tensors = _find(source, (_HUGGINGFACE_KEY, _SESAME_KEY))
    if tensors is not None:
        return tensors
    directory = source if source.is_dir() else source.parent
    for adapters in (directory, *sorted(directory.iterdir())):
        if peft_files.is_adapters(adapters):
            config = read_json(adapters / peft_files.CONFIG)
            raise peft_files.not_a_checkpoint(adapters, config)
    # Below `snapshots` they are in the cache of the hub's library.
    configs_inside = [*directory.glob("*/config.json"), *directory.glob("snapshots/*/config.json")]
    inside = [str(file.parent) for file in sorted(configs_inside)]
    if source.is_dir() and inside:
        raise CheckpointError(
            f"{source} holds no CSM checkpoint itself: name {' or '.join(inside)}"
        )
    raise CheckpointError(
        f"{source} holds no CSM checkpoint: expected transformers-*.safetensors or "
        "model.safetensors of a CSM model, ckpt.pt, or a directory written by csm_jax.convert"
        + _others_in(directory)
    )


def _others_in(directory: Path) -> str:
    """What a directory holds instead of weights that are read, for the end of a message."""
    files = [*sorted(directory.glob("*")), *sorted(directory.glob("*/*"))]
    others = [file.relative_to(directory) for file in files if file.suffix in _UNREAD_SUFFIXES]
    return f"; {others[0]} is in a format that is not read" if others else ""


def _find(source: Path, keys: Collection[str]) -> TensorSource | None:
    """The checkpoint that has one of these tensors; None if there is none.

    Raises:
      CheckpointError: there are several that could be meant, or one that could be is damaged.
    """
    if not source.exists():
        raise CheckpointError(f"{source} does not exist")
    if not source.is_dir():
        tensors = open_file(source)
        return tensors if any(key in tensors.shapes for key in keys) else None
    no_tensors: NoTensorsError | None = None
    for group in by_rank(list_candidates(source)):
        matching = []
        for each in group:
            try:
                tensors = open_candidate(source, each)
            except NoTensorsError as error:
                no_tensors = no_tensors or error
                continue
            if any(key in tensors.shapes for key in keys):
                matching.append((each, tensors))
        if len(matching) > 1:
            raise ambiguous(str(source), [each for each, _ in matching])
        if matching:
            return matching[0][1]
    if no_tensors is not None:
        raise no_tensors
    return None


def _open_huggingface(
    source: Path, tensors: TensorSource, config: CSMConfig | None, codec: Path | None
) -> Checkpoint:
    config = config or configs.csm_from_huggingface(_read_config(source))
    model = Part(
        "csm",
        csm.huggingface_table(config.backbone, config.depth_decoder),
        _subset(tensors, codec=False),
    )
    if codec is not None:
        codec_config, codec_part = open_codec(codec, config.codec)
        return Checkpoint(dataclasses.replace(config, codec=codec_config), (model, codec_part))
    table = mimi.huggingface_table(config.codec).prefixed(_CODEC_PREFIX, "")
    return Checkpoint(config, (model, Part("codec", table, _subset(tensors, codec=True))))


def _open_sesame(
    source: Path, tensors: TensorSource, config: CSMConfig | None, codec: Path | None
) -> Checkpoint:
    if codec is None:
        raise CheckpointError(
            f"{source} is in Sesame's layout, which has no codec inside: convert it with "
            f"python -m csm_jax.convert --source={source} --codec=MIMI --out=DIR, where MIMI is a "
            "directory or file of kyutai's Mimi"
        )
    config = config or _sesame_config(source, tensors)
    codec_config, codec_part = open_codec(codec, config.codec)
    config = dataclasses.replace(config, codec=codec_config)
    table = csm.sesame_table(config.backbone, config.depth_decoder)
    return Checkpoint(config, (Part("csm", table, tensors), codec_part))


def _sesame_config(source: Path, tensors: TensorSource) -> CSMConfig:
    """The sizes in `config.json`; without them those of the known model with these shapes."""
    path = _config_path(source)
    published = configs.csm_from_published(read_json(path)) if path.exists() else None
    return published or csm_from_shapes(str(source), tensors.shapes)


def open_all(source: Path) -> Iterator[TensorSource]:
    """All checkpoints of a directory, or the one in a file."""
    if source.is_dir():
        for each in list_candidates(source):
            yield open_candidate(source, each)
    else:
        yield open_file(source)


def read_sizes(path: Path) -> CSMConfig:
    """The config in a JSON file: of a native checkpoint, of a published one, or its fields alone.

    Raises:
      CheckpointError: it cannot be read, or has a wrong set of fields.
    """
    values = read_json(path)
    fields = values.get("config", values)
    return configs.csm_from_published(values) or CSMConfig.from_dict(fields)


def _read_config(source: Path) -> dict[str, Any]:
    return read_json(_config_path(source))


def _config_path(source: Path) -> Path:
    return (source if source.is_dir() else source.parent) / "config.json"


def _subset(tensors: TensorSource, codec: bool) -> TensorSource:
    """The tensors of the codec inside a Hugging Face checkpoint, or all others."""
    return _Subset(tensors, [k for k in tensors.shapes if k.startswith(_CODEC_PREFIX) == codec])


class _Subset:
    """Some of a source's tensors."""

    def __init__(self, source: TensorSource, keys: list[str]):
        self.name = source.name
        self.shapes = {key: source.shapes[key] for key in keys}
        self.read = source.read
