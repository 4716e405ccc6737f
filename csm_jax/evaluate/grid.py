"""Configurations: every combination of the values that are given for the options of a request."""

import dataclasses
import itertools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from absl import flags

from csm_jax.cli import dataclass_flags
from csm_jax.cli.manifest import Line
from csm_jax.errors import InputError
from csm_jax.inference.request import Request
from csm_jax.model.sampling import Sampling

# A line of the prompts has the first of these itself; the others are no values of a flag.
_NO_FLAGS = {"text", "speaker", "context", "shared_turns", "sampling"}
_NO_FLAGS |= {"interventions", "voice", "rank"}
_REQUEST_OPTIONS = [f.name for f in dataclasses.fields(Request) if f.name not in _NO_FLAGS]
_SAMPLING_OPTIONS = [field.name for field in dataclasses.fields(Sampling)]


@dataclass(frozen=True)
class Configuration:
    """Values of options that replace those of every line of the prompts.

    Attributes:
      options: fields of `Request` and of its `Sampling`.
    """

    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Such as "guard=off,temperature=0.7": the name of its directory and its column."""
        return ",".join(f"{n}={_written(v)}" for n, v in self.options.items()) or "default"

    def request(self, line: Line) -> Request:
        """The request for a line, without its context.

        Its seed is derived from those of the configuration and the line, and from the line's id, so
        that the takes of different lines are independent. Configurations with the same seed have
        the same random numbers for the same line.

        Raises:
          InputError: a value is out of range.
        """
        given = dict(self.options)
        sampling = {name: given.pop(name) for name in _SAMPLING_OPTIONS if name in given}
        seed = f"{given.pop('seed', 0)} {line.request.seed} {line.name}"
        return dataclasses.replace(
            line.request,
            sampling=dataclasses.replace(line.request.sampling, **sampling),
            seed=zlib.crc32(seed.encode("utf-8", "surrogatepass")),
            **given,
        )


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def define_flags(values: flags.FlagValues) -> None:
    """Defines a flag for each option of a request that is the same for all lines."""
    dataclass_flags.define_list_flags(values, Request, _REQUEST_OPTIONS)
    dataclass_flags.define_list_flags(values, Sampling, _SAMPLING_OPTIONS)


def read_configurations(values: flags.FlagValues) -> list[Configuration]:
    """The configurations that the flags give, in their order; one if no flag has several values.

    Raises:
      InputError: a value is malformed or out of range.
    """
    given = dataclass_flags.read_list_flags(values, Request, _REQUEST_OPTIONS)
    given |= dataclass_flags.read_list_flags(values, Sampling, _SAMPLING_OPTIONS)
    found = [
        Configuration(dict(zip(given, combination, strict=True)))
        for combination in itertools.product(*given.values())
    ]
    for configuration in found:
        try:
            configuration.request(Line("", "", Request("?"), ()))
        except InputError as error:
            raise InputError(f"{configuration.name}: {error}") from error
    return found
