"""Files of JSON lines that grow line by line, and may end in the middle of one."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from csm_jax.io.files import replace_file


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, without an incomplete line at the end; none if there is no file."""
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a file, whole or not at all."""
    replace_file(path, "".join(f"{json.dumps(line)}\n" for line in lines).encode())


def add_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a line to a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
