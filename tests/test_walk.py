"""The walks of a request in BUILD.md name functions that exist."""

import pkgutil
import re
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[1] / "BUILD.md"
MAX_STOPS = 12


def walks() -> dict[str, list[str]]:
    """The numbered stops of both walks, by the package in which their names begin."""
    section = BUILD.read_text().split("## The walk of a request")[1].split("\n## ")[0]
    library, server = section.split("From an HTTP route")
    return {"csm_jax": stops(library), "csm_jax.serve": stops(server)}


def stops(text: str) -> list[str]:
    return re.findall(r"^\d+\. (?:.|\n(?=  ))+", text, re.M)


@pytest.mark.parametrize(("package", "walk"), walks().items())
def test_the_stops_of_a_walk_exist_and_are_few(package, walk):
    assert 8 <= len(walk) <= MAX_STOPS
    for stop in walk:
        name = re.search(r"`([\w.]+)`", stop)[1]
        assert callable(pkgutil.resolve_name(f"{package}.{name}")), name
