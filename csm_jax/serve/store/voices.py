"""The added voices as rows; one is replaced in one transaction."""

import sqlite3
from typing import NamedTuple

from csm_jax.serve.store.database import Database
from csm_jax.serve.store.quota import Quota, check_count


class VoiceRow(NamedTuple):
    """An added voice.

    Attributes:
      recording: a FLAC file.
    """

    owner: str
    name: str
    speaker: int
    text: str
    recording: bytes


class VoiceStore:
    """The added voices. All methods block, so they are to be called in threads."""

    def __init__(self, database: Database, quota: Quota):
        self._database = database
        self._quota = quota

    def names(self) -> list[tuple[str, str]]:
        """The owner and the name of each voice."""
        return self._database.call(_keys)

    def find(self, owner: str, name: str) -> VoiceRow | None:
        return self._database.call(_find, owner, name)

    def put(self, voice: VoiceRow) -> None:
        """Adds or replaces a voice. Raises `QuotaError`."""
        self._database.call(self._put, voice)

    def delete(self, owner: str, name: str) -> None:
        self._database.call_free(_delete, owner, name)

    def _put(self, connection: sqlite3.Connection, voice: VoiceRow) -> None:
        quota = self._quota
        known = _keys(connection)
        if (voice.owner, voice.name) not in known:
            own = sum(owner == voice.owner for owner, _ in known)
            check_count(own, quota.owner_voices, "voices")
            check_count(len(known), quota.voices, "voices of all owners")
        quota.check_bytes(connection, voice.owner, len(voice.recording))
        _insert(connection, voice)


def _keys(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    return connection.execute("SELECT owner, name FROM voices ORDER BY owner, name").fetchall()


def _find(connection: sqlite3.Connection, owner: str, name: str) -> VoiceRow | None:
    query = "SELECT owner, name, speaker, text, recording FROM voices WHERE owner = ? AND name = ?"
    found = connection.execute(query, (owner, name)).fetchone()
    return found and VoiceRow(*found)


def _insert(connection: sqlite3.Connection, voice: VoiceRow) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO voices (owner, name, speaker, text, recording, num_bytes) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (*voice, len(voice.recording)),
    )


def _delete(connection: sqlite3.Connection, owner: str, name: str) -> None:
    connection.execute("DELETE FROM voices WHERE owner = ? AND name = ?", (owner, name))
