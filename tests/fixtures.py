"""Tiny random checkpoints in every published layout, written without torch.

The files are made by running the project's own tables backwards; `test_rules.py` and the parity
tests show that the tables are right.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from csm_jax.checkpoints import native_format
from csm_jax.checkpoints.random_weights import random_params
from csm_jax.config import CSMConfig, tiny
from csm_jax.convert import configs, csm, mimi
from csm_jax.convert.layouts import Checkpoint, open_checkpoint
from csm_jax.convert.rules import Table, invert
from csm_jax.inference.decode_batch import DecodeBatch, Utterance, bucket
from csm_jax.inference.decode_step import CHUNK_FRAMES
from csm_jax.io.audio import save_audio
from csm_jax.model.precision import FLOAT32, Precision
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.tokenizer import byte_tokenizer
from csm_jax.prompt.turns import Prompt

CONFIG = tiny()
TOKENIZER = byte_tokenizer(CONFIG)

Tensors = dict[str, np.ndarray]

# The command in a process of its own.
CONVERT = [sys.executable, "-m", "csm_jax.convert"]

TABLES = {
    "sesame": ("csm/", csm.sesame_table(CONFIG.backbone, CONFIG.depth_decoder)),
    "huggingface": ("csm/", csm.huggingface_table(CONFIG.backbone, CONFIG.depth_decoder)),
    "kyutai_codec": ("codec/", mimi.kyutai_table(CONFIG.codec)),
    "huggingface_codec": ("codec/", mimi.huggingface_table(CONFIG.codec)),
}


@functools.cache
def shapes() -> dict[str, jax.ShapeDtypeStruct]:
    return native_format.flatten(native_format.param_shapes(CONFIG))


def shallow(backbone: int = 1) -> CSMConfig:
    """The tiny model with fewer layers, which compiles in less time."""
    return dataclasses.replace(
        CONFIG,
        backbone=dataclasses.replace(CONFIG.backbone, num_layers=backbone),
        depth_decoder=dataclasses.replace(CONFIG.depth_decoder, num_layers=1),
    )


@functools.cache
def params() -> Tensors:
    """All parameters by path. No scale is 1 and no bias 0, so a missing one changes the outputs."""
    rng = np.random.default_rng(5)
    drawn = native_format.flatten(random_params(CONFIG, seed=5))
    return {
        path: np.asarray(array) + 0.05 * rng.standard_normal(array.shape, np.float32)
        for path, array in drawn.items()
    }


def language_params(config: CSMConfig) -> native_format.Params:
    """New arrays of a model without its codec: `tiny()`, or a shallow one. A step donates them."""
    shapes = native_format.param_shapes(config)
    flat = {path: params()[path].copy() for path in native_format.flatten(shapes)}
    return jax.tree.map(jax.numpy.asarray, native_format.unflatten(flat, shapes)["csm"])


def section(prefix: str, values: dict) -> dict:
    return {p.removeprefix(prefix): v for p, v in values.items() if p.startswith(prefix)}


def written(table: Table, own: Tensors) -> Tensors:
    """The tensors of a layout that hold these parameters."""
    return {
        name: np.ascontiguousarray(make()) for name, make in invert(table, own, own.__getitem__)
    }


def layout(name: str) -> Tensors:
    prefix, table = TABLES[name]
    return written(table, section(prefix, params()))


def huggingface_tensors() -> Tensors:
    """Layout 2, including the codec."""
    codec = {f"codec_model.{name}": t for name, t in layout("huggingface_codec").items()}
    return layout("huggingface") | codec


def write_config(directory: Path, values: dict | None = None) -> None:
    values = configs.csm_to_huggingface(CONFIG) if values is None else values
    (directory / "config.json").write_text(json.dumps(values))


def write_sesame(directory: Path) -> Path:
    """Layout 1. Its config has only flavours, so the tiny sizes are in a Hugging Face config."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(layout("sesame"), directory / "model.safetensors")
    write_config(directory)
    TOKENIZER.save(directory)
    return directory


def write_huggingface(directory: Path, tensors: Tensors | None = None, shards: int = 1) -> Path:
    """Layout 2 under the file names of the hub, so that layout 1 fits into the same directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = huggingface_tensors() if tensors is None else tensors
    names = [f"transformers-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    keys = sorted(tensors)
    for i, name in enumerate(names):
        save_file({key: tensors[key] for key in keys[i::shards]}, directory / name)
    weight_map = {key: names[i % shards] for i, key in enumerate(keys)}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "transformers.safetensors.index.json").write_text(json.dumps(index))
    write_config(directory)
    TOKENIZER.save(directory)
    return directory


def write_mixed(directory: Path) -> Path:
    """Layouts 1 and 2 side by side, as in the hub repository of CSM-1B. Here the first has other
    weights, so a test notices if it is read."""
    write_huggingface(directory, shards=2)
    other = {name: tensor + 1 for name, tensor in layout("sesame").items()}
    save_file(other, directory / "model.safetensors")
    return directory


def write_codec(directory: Path, kind: str) -> Path:
    """Layout 3 (kyutai_codec) or 4 (huggingface_codec)."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(layout(kind), directory / "model.safetensors")
    if kind == "huggingface_codec":
        write_config(directory, configs.csm_to_huggingface(CONFIG)["codec_config"])
    return directory


def write_native(directory: Path, config: CSMConfig = CONFIG) -> Path:
    """A native checkpoint of `tiny()`, or of a shallow model."""
    paths = native_format.flatten(native_format.param_shapes(config))
    native_format.save(directory, config, ((path, params()[path]) for path in paths), TOKENIZER)
    return directory


def load_params(directory: Path, config: CSMConfig, precision: Precision) -> native_format.Params:
    """All parameters of a native checkpoint."""
    return native_format.place_params(
        native_format.read_params(directory, config), config, precision
    )


def loaded(directory: Path, precision: Precision = FLOAT32) -> dict[str, jax.Array]:
    return native_format.flatten(load_params(directory, CONFIG, precision))


def params_of(opened: Checkpoint, precision: Precision) -> native_format.Params:
    """All parameters of a published layout."""
    tensors = opened.tensors(native_format.flatten(native_format.param_shapes(opened.config)))
    return native_format.place_params(tensors, opened.config, precision)


def tensors_of(directory: Path, codec: Path | None = None) -> Tensors:
    """All parameters of a published layout by their paths, in the types of its files."""
    return dict(open_checkpoint(directory, codec).tensors(shapes()))


def write_conversations(
    directory: Path, lengths: Sequence[Sequence[int]] = ((3, 2), (4,), (2,), (3, 3))
) -> Path:
    """A training manifest: conversations whose turns have these numbers of frames of noise."""
    random = np.random.default_rng(1)
    lines = []
    for i, turns in enumerate(lengths):
        conversation = []
        for j, num_frames in enumerate(turns):
            audio = 0.1 * random.standard_normal(num_frames * CONFIG.codec.frame_size)
            save_audio(directory / f"{i}-{j}.wav", audio.astype(np.float32), 24_000)
            conversation.append({"speaker": j, "text": f"{i} {j}", "audio": f"{i}-{j}.wav"})
        lines.append(json.dumps(conversation))
    path = directory / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def assert_same_params(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for path, array in got.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(want[path]), path)


def one_error(capsys) -> str:
    """The one line of error output of `csm_jax.convert`."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("csm_jax.convert: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def generate(
    config: CSMConfig,
    params: dict,
    prompts: Sequence[Prompt],
    sampling: Sequence[Sampling],
    seeds: Sequence[int],
    max_frames: int,
    chunk: int = CHUNK_FRAMES,
    watch: Callable[[int], None] = lambda num_frames: None,
) -> list[np.ndarray]:
    """The codes [n, Q] of all prompts, generated in one batch, each up to its end of speech.

    Args:
      chunk: frames between two calls of `watch`, which gets the number of frames so far.
    """
    length = bucket(max(len(frames) for frames, _ in prompts) + max_frames)
    batch = DecodeBatch(config, params, len(prompts), min(length, config.backbone.max_seq_len))
    for index, (prompt, *row) in enumerate(zip(prompts, sampling, seeds, strict=True)):
        batch.join(index, Utterance(Prompt(*prompt), *row, max_frames))
    codes = np.zeros((len(prompts), 0, config.num_codebooks), np.int32)
    ended = np.zeros(len(prompts), bool)
    while codes.shape[1] < max_frames and not ended.all():
        more, _, ended = batch.run(chunk)
        assert more.shape[1] > 0, "neither at its limit nor at its end, but no frames"
        codes = np.concatenate([codes, more], axis=1)
        watch(codes.shape[1])
    return [up_to_the_end(row) for row in codes]


def up_to_the_end(codes: np.ndarray) -> np.ndarray:
    """Codes [n, Q] without the first frame of zeros and what follows."""
    ends = np.flatnonzero((codes == 0).all(axis=-1))
    return codes[: ends[0]] if len(ends) else codes
