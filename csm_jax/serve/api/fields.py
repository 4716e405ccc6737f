"""What all request bodies have in common: null is not given, and unknown fields are reported."""

import re
from collections.abc import Iterable
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

from csm_jax.inference.request import Notice

# Fields that clients send for other reasons than the speech.
_WITHOUT_EFFECT = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "stream_options",
        "logprobs",
        "top_logprobs",
        "logit_bias",
        "parallel_tool_calls",
        "timeout",
    ]
)
# Of a field with fixed values, which are lower case: accepts them in any case.
AnyCase = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_MOST_NAMED = 16


class Fields(BaseModel):
    """The fields of a request. A field that is null is one that is not given.

    Attributes:
      unknown: names of the fields that this model does not have.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    # Fields for which null has a meaning of its own.
    keeps_null: ClassVar[frozenset[str]] = frozenset()
    _unknown: tuple[str, ...] = PrivateAttr(default=())

    @property
    def unknown(self) -> tuple[str, ...]:
        return self._unknown

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict):
            return handler(data)
        kept = cls.keeps_null
        given = {name: data[name] for name in data if data[name] is not None or name in kept}
        fields = handler(given)
        fields._unknown = tuple(name for name in given if name not in cls.model_fields)
        return fields


def reported(names: Iterable[str]) -> list[str]:
    """Those of the names of fields that are worth a notice: a few, short and printable."""
    relevant = (name for name in names if name not in _WITHOUT_EFFECT)
    printable = (name if _NAME.fullmatch(name) else "field" for name in relevant)
    return list(dict.fromkeys(printable))[:_MOST_NAMED]


def ignored(names: Iterable[str]) -> list[Notice]:
    """Notices of fields that are not followed, such as "instructions_ignored"."""
    return [
        Notice(f"{name}_ignored", f"{name} is not known here: the speech does not follow it")
        for name in reported(names)
    ]
