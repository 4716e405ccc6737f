"""API keys: parsing the lines of a keys file, and finding the caller of a key."""

import hashlib
import hmac
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from csm_jax.errors import InputError
from csm_jax.inference.scheduler import MAX_WEIGHT
from csm_jax.serve.admission.caller import Caller

# Digits of a key's digest that name its owner.
_OWNER_DIGITS = 32
# Shorter than a digest, so that no tenant has the name of another key's owner.
_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,30}")


@dataclass(frozen=True)
class ApiKey:
    """An API key, as its digest, and the caller that it belongs to."""

    digest: bytes
    caller: Caller


def parse_keys(lines: Sequence[str]) -> list[ApiKey]:
    """Parses lines `KEY [tenant=NAME] [weight=NUMBER]`.

    Keys of one tenant have one owner and one share.

    Raises:
      InputError: a line cannot be understood. The message does not contain the key.
    """
    keys: list[ApiKey] = []
    weights: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        key = _parse_key(line, f"API key {number}")
        if any(key.digest == other.digest for other in keys):
            raise InputError(f"API key {number} is given twice: remove one of them")
        caller = key.caller
        if weights.setdefault(caller.owner, caller.weight) != caller.weight:
            raise InputError(f"tenant {caller.owner} has two weights: give all its keys the same")
        keys.append(key)
    return keys


def _parse_key(line: str, what: str) -> ApiKey:
    key, *options = line.split(" ")
    options = [option for option in options if option]
    if not key or not line.isascii() or not line.isprintable() or "," in key:
        raise InputError(f"{what} has to be printable ASCII characters without spaces and commas")
    if key.startswith(("tenant=", "weight=")):
        raise InputError(f"{what} is missing before its options: write KEY tenant=NAME")
    values: dict[str, str] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in ("tenant", "weight") or name in values or not value:
            raise InputError(f"{what} has an option that is not tenant=NAME or weight=NUMBER")
        values[name] = value
    digest = _digest(key)
    owner = _tenant(values["tenant"], what) if "tenant" in values else _owner(digest)
    return ApiKey(digest, Caller(owner, owner, _weight(values.get("weight", "1"), what)))


def _tenant(name: str, what: str) -> str:
    if not _TENANT.fullmatch(name):
        rule = "up to 31 of a-z, 0-9, _ and -, beginning with a letter or digit"
        raise InputError(f"{what} has the tenant {name[:40]!r}, but a name is {rule}")
    return name


def _weight(text: str, what: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 1 / MAX_WEIGHT <= weight <= MAX_WEIGHT:
        rule = f"a number from {1 / MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
        raise InputError(f"{what} has the weight {text[:40]!r}, but a weight is {rule}")
    return weight


def read_keys(text: str) -> list[str]:
    """The lines of a keys file without empty lines and comments."""
    lines = (line.strip() for line in text.removeprefix("\ufeff").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def find_key(given: str, keys: Sequence[ApiKey]) -> ApiKey | None:
    """The key that equals `given`, if there is one."""
    digest = _digest(given)
    # All keys are compared, so that the time does not depend on which one matches.
    found = [key for key in keys if hmac.compare_digest(key.digest, digest)]
    return found[0] if found else None


def _owner(digest: bytes) -> str:
    return digest.hex()[:_OWNER_DIGITS]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
