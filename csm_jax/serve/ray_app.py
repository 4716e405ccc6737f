"""The application on Ray Serve: replicas behind one address, scaled with the load.

serve run csm_jax.serve.ray_app:build checkpoint=demo max_batch=8 min_replicas=1 max_replicas=4
"""

import dataclasses
from pathlib import Path
from typing import Any

from fastapi import FastAPI

# Ray is not installed where the types are checked.
from ray import serve  # pyright: ignore[reportMissingImports]
from ray.serve.config import AutoscalingConfig  # pyright: ignore[reportMissingImports]

from csm_jax.serve.app import load_app
from csm_jax.serve.settings import Settings
from csm_jax.watermark import choose, parse_key

# Arguments that are not in `Settings`, and their defaults.
DEFAULTS = {
    "checkpoint": "sesame/csm-1b",
    "dtype": "auto",
    "quantize": None,
    "kernels": "xla",
    "min_replicas": 1,
    "max_replicas": 1,
    "num_gpus": 0,
    "watermark": "auto",
    "watermark_weights": None,
    "watermark_key": None,
}


def build(arguments: dict[str, Any]) -> serve.Application:
    """Makes a deployment that scales with the number of requests in progress.

    Args:
      arguments: those of `DEFAULTS`, where `num_gpus` is per replica and those of the watermark are
        as the flags of `csm_jax.serve`, and the numbers, texts and
        lists of `Settings`. Ray's command line passes strings for all of them.

    Raises:
      ValueError: an argument is unknown, or is not a number.
    """
    values = DEFAULTS | {k: v for k, v in arguments.items() if k in DEFAULTS}
    settings = _settings({k: v for k, v in arguments.items() if k not in DEFAULTS})

    key = None if values["watermark_key"] is None else parse_key(values["watermark_key"])

    def make_app() -> FastAPI:
        model = values["checkpoint"], settings, values["dtype"], values["quantize"]
        watermark = choose(values["watermark"], values["watermark_weights"], key)
        return load_app(*model, watermark=watermark, kernels=values["kernels"])

    scaling = AutoscalingConfig(
        min_replicas=int(values["min_replicas"]),
        max_replicas=int(values["max_replicas"]),
        target_ongoing_requests=settings.max_batch,
    )
    deployment = serve.deployment(
        serve.ingress(make_app)(),
        name="csm_jax",
        ray_actor_options={"num_gpus": float(values["num_gpus"])},
        autoscaling_config=scaling,
        # Further requests wait before the replicas, so that new replicas can take them.
        max_ongoing_requests=settings.max_batch + settings.max_queue,
    )
    return deployment.bind()


def _settings(arguments: dict[str, Any]) -> Settings:
    kinds = {field.name: field.type for field in dataclasses.fields(Settings)}
    simple = {name: kind for name, kind in kinds.items() if kind in (int, str)}
    simple |= {"voices": Path}
    simple |= {name: _split for name, kind in kinds.items() if kind == tuple[str, ...]}
    if unknown := sorted(arguments.keys() - simple.keys()):
        known = ", ".join([*DEFAULTS, *simple])
        raise ValueError(f"unknown argument {unknown[0]}; known are {known}")
    values: dict[str, Any] = {name: simple[name](value) for name, value in arguments.items()}
    return Settings(**values)


def _split(value: str) -> tuple[str, ...]:
    """The values of a list that is separated by commas."""
    return tuple(value.split(","))
