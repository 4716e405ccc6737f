"""Objects of a published `config.json`, whose values are checked as they are read."""

from collections.abc import Collection, Mapping
from typing import Any

from csm_jax.config import check_boolean, check_integer, check_number
from csm_jax.errors import CheckpointError


class Section:
    """One object of a config.json. A value that is null counts as not given.

    All methods raise `CheckpointError` for a value of a wrong type.

    Args:
      values: the object.
      name: of the object in the file; empty for the whole file.
    """

    def __init__(self, values: Any, name: str = ""):
        self._prefix = f"{name}." if name else ""
        if not isinstance(values, dict):
            raise CheckpointError(f"config.json has {name}={values!r}, but it must be an object")
        self._given: Mapping[str, Any] = {k: v for k, v in values.items() if v is not None}

    def __bool__(self) -> bool:
        return bool(self._given)

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number; without a default it is required."""
        return check_integer(self._where(name), self._get(name, default), least)

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0; without a default it is required."""
        return check_number(self._where(name), self._get(name, default))

    def boolean(self, name: str, default: bool) -> bool:
        return check_boolean(self._where(name), self._get(name, default))

    def integers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A list of whole numbers."""
        values = self._get(name, list(default))
        if not isinstance(values, list) or not values:
            raise CheckpointError(f"{self._where(name)} is {values!r}, but must be a list")
        return tuple(check_integer(self._where(name), value) for value in values)

    def token_id(self, name: str, default: int) -> int:
        """An id, or the first of a list of ids."""
        value = self._get(name, default)
        first = value[0] if isinstance(value, list) and value else value
        return check_integer(self._where(name), first, least=0)

    def string(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise CheckpointError(f"{self._where(name)} is {value!r}, but must be a string")
        return value

    def section(self, name: str) -> "Section":
        """An object in this one; an empty one if there is none."""
        return Section(self._get(name, {}), self._prefix + name)

    def expect(self, name: str, only: Any) -> None:
        """Raises `CheckpointError` if a value is given and is another."""
        value = self._given.get(name, only)
        if value != only or isinstance(value, bool) != isinstance(only, bool):
            raise CheckpointError(
                f"config.json has {self._prefix}{name}={value}; only {only} is supported"
            )

    def refuse(self, name: str, way_out: str) -> None:
        """Raises `CheckpointError` if something is given that would be ignored."""
        if self._given.get(name):
            raise CheckpointError(f"config.json has {self._prefix}{name}: {way_out}")

    def allow(self, names: Collection[str], what: str) -> None:
        """Raises `CheckpointError` if anything else is given."""
        if others := sorted(self._given.keys() - set(names)):
            raise CheckpointError(
                f"config.json has {self._prefix}{others[0]}, which is not supported for {what}"
            )

    def nested(self, names: Collection[str]) -> list["Section"]:
        """The objects of these names."""
        return [self.section(name) for name in names if name in self]

    def _get(self, name: str, default: Any) -> Any:
        value = self._given.get(name, default)
        if value is None:
            where = f" in {self._prefix[:-1]}" if self._prefix else ""
            raise CheckpointError(f"config.json lacks {name}{where}")
        return value

    def _where(self, name: str) -> str:
        return f"config.json: {self._prefix}{name}"
