"""Files of prompts: what to speak, and in which voice.

The format is that of seed-tts-eval's `meta.lst`, a line for each text:

    ID|TRANSCRIPT OF THE PROMPT|prompt.wav|TEXT

Recordings are relative to the file. Two columns, `ID|TEXT`, have no prompt; a fifth column, the
recording of a person who speaks the text, is not used. Files named `.jsonl` have the lines of
`csm_jax.generate --manifest` instead.
"""

from pathlib import Path

from csm_jax.cli.manifest import Line, read_manifest
from csm_jax.errors import InputError
from csm_jax.inference.request import Request


def read_prompts(path: Path) -> list[Line]:
    """Reads and checks a file of prompts; speaker and prompt of `meta.lst` are speaker 0.

    Raises:
      InputError: the file or one of its lines is malformed; the line is named by its number.
    """
    default = Request("?")
    if path.suffix == ".jsonl":
        return read_manifest(path, default)
    return read_manifest(path, default, read_fields=_read_columns)


def _read_columns(text: str) -> dict[str, object]:
    columns = [column.strip() for column in text.split("|")]
    match columns:
        case [name, words]:
            return {"id": name, "text": words}
        case [name, transcript, recording, words] | [name, transcript, recording, words, _]:
            turn = {"speaker": 0, "text": transcript, "audio": recording}
            return {"id": name, "text": words, "context": [turn]}
        case [_, _, _]:
            raise InputError("three columns: a prompt needs its transcript, in the second of four")
    raise InputError(
        f"{len(columns)} columns with | between, expected id|text or "
        "id|prompt text|prompt audio|text"
    )
