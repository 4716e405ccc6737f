"""The weights of a watermark: SilentCipher's PyTorch files to one native file, and back from it.

    DIR/hparams.yaml, enc_c.ckpt, dec_c.ckpt, dec_m_0.ckpt  ->  NAME.safetensors

The native file has the arrays by path (`carrier.0.kernel`) and the sizes in its metadata.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.typing import DTypeLike

from csm_jax.checkpoints.torch_files import load_tensors, plain_names
from csm_jax.errors import CheckpointError, first_line
from csm_jax.io.files import replace_file
from csm_jax.watermark.config import WatermarkConfig
from csm_jax.watermark.network import Params
from csm_jax.watermark.winograd import transform_kernel

HPARAMS = "hparams.yaml"
_PARTS = {"carrier": "enc_c.ckpt", "decoder": "dec_c.ckpt", "message": "dec_m_0.ckpt"}
FILES = (HPARAMS, *_PARTS.values())
_METADATA = "watermark"
# What the networks are, where hparams.yaml offers a choice.
_FIXED = {
    "n_messages": "1",
    "ensure_negative_message": "true",
    "no_normalization": "false",
    "frame_level_normalization": "false",
    "utterance_level_normalization": "true",
}
# Copies of the carrier, and of the message, in the input of the reference's decoder.
_REPEATS = 32


@dataclass(frozen=True)
class Weights:
    """The networks of a watermark.

    Attributes:
      params: `carrier`, `decoder` and `message`, lists of layers; `symbols` and `band`, linear.
      dtype: of the products of most layers that make a mark. The first layers have float32, as
        weak partials of speech are lost beside strong ones otherwise.
    """

    config: WatermarkConfig
    params: Params
    dtype: DTypeLike = jnp.bfloat16

    @functools.cached_property
    def fast_kernels(self) -> dict[str, list[list[jax.Array]]]:
        """The kernels that make a mark, but for the last, as `winograd.convolve` takes them."""
        first, *others = [layer["kernel"] for layer in self.params["decoder"][:-1]]
        exact = [transform_kernel(layer["kernel"], jnp.float32) for layer in self.params["carrier"]]
        return {
            "carrier": exact,
            "decoder": [
                transform_kernel(first, jnp.float32),
                *(transform_kernel(kernel, self.dtype) for kernel in others),
            ],
        }


def read_torch(directory: Path) -> Weights:
    """Reads a directory of SilentCipher's files; needs torch.

    Raises:
      CheckpointError: a file is missing or damaged, or has other sizes than hparams.yaml says.
    """
    config = _read_hparams(directory / HPARAMS)
    tensors = {part: _read_state(directory / file) for part, file in _PARTS.items()}
    return _convert(tensors, config, directory)


def _read_hparams(file: Path) -> WatermarkConfig:
    if not file.is_file():
        raise CheckpointError(
            f"{file.parent} has no {file.name}: name the directory of SilentCipher's model for "
            "44.1 kHz, such as 44_1_khz/73999_iteration"
        )
    pairs = (line.partition(":") for line in file.read_text(encoding="utf-8").splitlines())
    given = {name.strip(): value.strip() for name, _, value in pairs}
    for name, value in _FIXED.items():
        if given.get(name, "").lower() != value:
            shown = given.get(name, "missing")
            raise CheckpointError(f"{file}: {name} is {shown}, and only {value} can be read")
    try:
        config = WatermarkConfig(
            sample_rate=int(given["SR"]),
            n_fft=int(given["N_FFT"]),
            band=int(given["message_band_size"]),
            num_symbols=int(given["message_dim"]),
            period=int(given["message_len"]),
            carrier_layers=int(given["enc_n_layers"]),
            decoder_layers=int(given["dec_c_n_layers"]),
        )
        hop = int(given["HOP_LENGTH"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: {first_line(error)} is missing or no number") from error
    if hop != config.hop:
        raise CheckpointError(
            f"{file}: HOP_LENGTH is {hop}, and only half of N_FFT ({config.hop}) can be read"
        )
    return config


def _read_state(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    tensors = load_tensors(file)
    names = plain_names(tensors, str(file))
    return {plain: np.asarray(tensors[name], np.float32) for plain, name in names.items()}


def _convert(
    tensors: dict[str, dict[str, np.ndarray]], config: WatermarkConfig, directory: Path
) -> Weights:
    counts = (config.carrier_layers, config.decoder_layers, config.message_layers)
    params: Params = {}
    try:
        for part, count in zip(_PARTS, counts, strict=True):
            # The decoder of messages has a dropout before each layer.
            step, first = (2, 1) if part == "message" else (1, 0)
            params[part] = [
                _convert_layer(tensors[part], f"main.{first + step * layer}")
                for layer in range(count)
            ]
        carrier, message = tensors["carrier"], tensors["message"]
        params["symbols"] = {
            "kernel": carrier["linear.weight"].T.copy(),
            "bias": carrier["linear.bias"],
        }
        params["band"] = {
            "kernel": message["linear.weight"][0].copy(),
            "bias": message["linear.bias"],
        }
    except KeyError as error:
        raise CheckpointError(f"{directory}: {error.args[0]} is missing") from error
    first = params["decoder"][0]
    first["kernel"] = _sum_repeats(first["kernel"])
    return _place(config, params)


def _convert_layer(tensors: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Torch's [C', C, bins, time] -> [time, bins, C, C']; values and gates become one kernel."""
    kernels = [tensors[f"{name}.{half}.weight"].transpose(3, 2, 1, 0) for half in ("conv", "gate")]
    biases = [tensors[f"{name}.{half}.bias"] for half in ("conv", "gate")]
    return {
        "kernel": np.concatenate(kernels, axis=-1),
        "bias": np.concatenate(biases),
        "scale": tensors[f"{name}.bn.weight"],
        "shift": tensors[f"{name}.bn.bias"],
        "mean": tensors[f"{name}.bn.running_mean"],
        "variance": tensors[f"{name}.bn.running_var"],
    }


def _sum_repeats(kernel: np.ndarray) -> np.ndarray:
    """Adds up the kernels of inputs that are all the same: [..., 32 * 3, C'] -> [..., 34, C']."""
    encoded, carrier, message = np.split(kernel, [-2 * _REPEATS, -_REPEATS], axis=2)
    sums = [part.sum(axis=2, keepdims=True, dtype=np.float64) for part in (carrier, message)]
    return np.concatenate([encoded, *sums], axis=2).astype(np.float32)


def _place(config: WatermarkConfig, params: Params) -> Weights:
    return Weights(config, jax.tree.map(jnp.asarray, params))


def save(weights: Weights, file: Path) -> None:
    """Writes a native file, whole or not at all."""
    metadata = {_METADATA: json.dumps(weights.config.to_dict())}
    arrays = {name: np.asarray(value) for name, value in _flatten(weights.params).items()}
    replace_file(file, safetensors.numpy.save(arrays, metadata))


def load(file: Path) -> Weights:
    """Reads a native file. Raises `CheckpointError` if it is none, or damaged."""
    try:
        with safetensors.safe_open(str(file), framework="numpy") as opened:
            metadata = (opened.metadata() or {}).get(_METADATA)
            if metadata is None:
                raise CheckpointError(
                    f"{file} holds no watermark: python -m csm_jax.watermark --convert makes it"
                )
            config = WatermarkConfig(**json.loads(metadata))
            flat = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error
    expected = map_shapes(config, lambda _, shape: shape)
    wrong = {name for name, shape in _flatten(expected).items() if _shape(flat, name) != shape}
    if wrong or len(flat) != len(_flatten(expected)):
        shown = min(wrong, default="more than its sizes say")
        raise CheckpointError(f"{file} is damaged: {shown} is missing or has another shape")
    return _place(config, map_shapes(config, lambda name, _: flat[name]))


def _shape(flat: dict[str, np.ndarray], name: str) -> tuple[int, ...] | None:
    return flat[name].shape if name in flat else None


def map_shapes(config: WatermarkConfig, make: Callable[[str, tuple[int, ...]], Any]) -> Params:
    """The tree of parameters, with what `make` returns for the path and shape of each."""

    def layer(part: str, index: int, size: int, inputs: int, outputs: int) -> Params:
        shapes: dict[str, tuple[int, ...]] = {
            "kernel": (size, size, inputs, 2 * outputs),
            "bias": (2 * outputs,),
            **dict.fromkeys(("scale", "shift", "mean", "variance"), (outputs,)),
        }
        return {name: make(f"{part}.{index}.{name}", shape) for name, shape in shapes.items()}

    def stack(part: str, channels: list[int], last_size: int = 3) -> list[Params]:
        sizes = [3] * (len(channels) - 2) + [last_size]
        pairs = zip(sizes, channels[:-1], channels[1:], strict=True)
        return [layer(part, index, *pair) for index, pair in enumerate(pairs)]

    carrier, decoder = config.carrier_channels, config.decoder_channels
    message, symbols = config.message_channels, config.num_symbols
    inside = [decoder] * (config.decoder_layers - 1)
    read = [message] * (config.message_layers - 1)
    return {
        "carrier": stack("carrier", [1, *[carrier] * config.carrier_layers]),
        "decoder": stack("decoder", [carrier + 2, *inside, 1], last_size=1),
        "message": stack("message", [1, *read, symbols]),
        "symbols": {
            "kernel": make("symbols.kernel", (symbols, config.band)),
            "bias": make("symbols.bias", (config.band,)),
        },
        "band": {
            "kernel": make("band.kernel", (config.band,)),
            "bias": make("band.bias", (1,)),
        },
    }


def random_weights(config: WatermarkConfig, seed: int = 0) -> Weights:
    """Random networks, for tests and for measuring: their marks hold no message."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(("scale", "variance")):
            values = rng.uniform(0.5, 1.5, shape)
        else:
            fan_in = np.prod(shape[:-1]) if name.endswith("kernel") else 100
            values = rng.normal(0, 1 / np.sqrt(max(fan_in, 1)), shape)
        return values.astype(np.float32)

    return _place(config, map_shapes(config, draw))


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return {path: tree}
    flat: dict[str, Any] = {}
    for name, value in items:
        flat |= _flatten(value, f"{path}.{name}" if path else str(name))
    return flat
