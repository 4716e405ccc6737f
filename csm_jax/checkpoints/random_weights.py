"""Random weights in the real shapes, for dry runs and benchmarks."""

from collections.abc import Iterator

import numpy as np

from csm_jax.checkpoints.native_format import (
    Place,
    flatten,
    on_default_device,
    param_shapes,
    place_params,
)
from csm_jax.config import CSMConfig
from csm_jax.model.layers import Params
from csm_jax.model.precision import FLOAT32, Precision


def random_params(
    config: CSMConfig,
    precision: Precision = FLOAT32,
    seed: int = 0,
    place: Place = on_default_device,
) -> Params:
    """Random weights for dry runs, of unit gain in every layer."""
    return place_params(random_tensors(config, seed), config, precision, place)


def random_tensors(config: CSMConfig, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, array) of all parameters, float32, each drawn when it is asked for.

    They are numpy's: 1.6 G of them take seconds, and a minute from `jax.random` on a CPU. The
    modules' own initializers are for training.
    """
    random = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        name = path.rpartition("/")[2]
        if name in ("scale", "bias"):
            return np.full(shape, 1 if name == "scale" else 0, np.float32)
        values = random.random(shape, np.float32)
        values -= 0.5
        values *= (12 / _fan_in(path, shape)) ** 0.5
        return values

    shapes = flatten(param_shapes(config))
    return ((path, draw(path, shape.shape)) for path, shape in shapes.items())


def _fan_in(path: str, shape: tuple[int, ...]) -> float:
    """The number of inputs of an output of a layer, from the shape of its weight."""
    sizes = list(shape)
    if not path.startswith("codec/") or len(sizes) < 3:
        return sizes[-1]
    taps, inputs, *_, outputs = sizes
    is_depthwise = len(sizes) == 4 and outputs == 1
    # Twice as many: residual branches add up, and the audio should stay under full scale.
    return 2 * taps * (1 if is_depthwise else inputs)
