"""Flags of a dataclass: a field's type, default and description are those of its flag.

The description is the field's entry in the `Attributes:` section of the class's docstring, so that
the command line, the server's schema and `help()` say the same.
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from csm_jax.errors import InputError

_DEFINE: dict[Any, Callable[..., object]] = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    Path: flags.DEFINE_string,
    tuple[str, ...]: flags.DEFINE_list,
    tuple[float, ...]: flags.DEFINE_list,
}
_PARSE: dict[Any, Callable[[str], Any]] = {
    bool: {"true": True, "false": False}.__getitem__,
    int: int,
    float: float,
    str: str,
}
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_NO_BOUNDS: Mapping[str, float] = types.MappingProxyType({})


def define_flags(
    values: flags.FlagValues,
    cls: type,
    names: Collection[str] | None = None,
    lower_bounds: Mapping[str, float] = _NO_BOUNDS,
) -> None:
    """Defines a flag for each field of a dataclass.

    Args:
      names: the fields that have a flag; None is all.
      lower_bounds: the smallest values of fields that the class itself does not check.

    Raises:
      KeyError: there is no kind of flag for the type of a field.
    """
    kinds, descriptions = field_types(cls), field_descriptions(cls)
    for field in dataclasses.fields(cls):
        if names is None or field.name in names:
            _define(values, field, kinds[field.name], descriptions, lower_bounds)


def _define(
    values: flags.FlagValues,
    field: dataclasses.Field,
    kind: Any,
    descriptions: Mapping[str, str],
    lower_bounds: Mapping[str, float],
) -> None:
    name = field.name
    more = {"lower_bound": lower_bounds[name]} if name in lower_bounds else {}
    _DEFINE[kind](name, _default(field), descriptions.get(name, ""), flag_values=values, **more)


def define_list_flags(values: flags.FlagValues, cls: type, names: Collection[str]) -> None:
    """Defines a flag for each of these fields that takes several values, for `read_list_flags`."""
    descriptions = field_descriptions(cls)
    for field in dataclasses.fields(cls):
        if field.name in names:
            text = f"{descriptions.get(field.name, '')}; several values with commas between them"
            if field.default is not None:
                text += f"; usually {field.default}"
            flags.DEFINE_list(field.name, None, text, flag_values=values)


def read_list_flags(
    values: flags.FlagValues, cls: type, names: Collection[str]
) -> dict[str, list[Any]]:
    """The values of those fields whose flags are given, by name.

    Raises:
      InputError: a value is not of the field's type, or is given twice.
    """
    kinds = field_types(cls)
    given = {}
    for name in names:
        if (texts := values[name].value) is not None:
            given[name] = [_parse(name, text.strip(), kinds[name]) for text in texts]
            if len(set(given[name])) < max(1, len(texts)):
                raise InputError(f"--{name} is {','.join(texts)}: give each value once")
    return given


def _parse(name: str, text: str, kind: Any) -> Any:
    try:
        return _PARSE[kind](text)
    except (KeyError, ValueError) as error:
        raise InputError(f"--{name} is {text}, expected {_TYPE_NAMES[kind]}") from error


def read_flags(
    values: flags.FlagValues, cls: type, names: Collection[str] | None = None
) -> dict[str, Any]:
    """The arguments of a dataclass that its flags give, by name."""
    kinds = field_types(cls)
    wanted = kinds if names is None else names
    return {name: _as_kind(name, values[name].value, kinds[name]) for name in wanted}


def field_types(cls: type) -> dict[str, Any]:
    """The type of each field: `X` also for `X | None`, and that of the default for a union."""
    hints = typing.get_type_hints(cls)
    return {field.name: _one_type(hints[field.name], field) for field in dataclasses.fields(cls)}


def field_descriptions(cls: type) -> dict[str, str]:
    """The descriptions of attributes in the docstring of a class; {} if it has none."""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    section = re.split(r"^\S", section, maxsplit=1, flags=re.MULTILINE)[0]
    entries = re.findall(r"^  (\w[\w, ]*): (.*(?:\n    .*)*)", section, re.MULTILINE)
    return {
        name: " ".join(text.split()).rstrip(".")
        for names, text in entries
        for name in names.split(", ")
    }


def _one_type(hint: Any, field: dataclasses.Field) -> Any:
    if typing.get_origin(hint) not in (types.UnionType, typing.Union, typing.Literal):
        return hint
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else type(field.default)


def _default(field: dataclasses.Field) -> Any:
    if field.default is dataclasses.MISSING:
        return None
    return list(field.default) if isinstance(field.default, tuple) else field.default


def _as_kind(name: str, value: Any, kind: Any) -> Any:
    """The value of a flag as its field has it; an empty path is none."""
    if kind is Path:
        return Path(value) if value else None
    if kind == tuple[float, ...]:
        return tuple(_parse(name, str(text), float) for text in value)
    return tuple(value) if kind == tuple[str, ...] else value
