"""The tables of the database, and their version."""

import sqlite3

VERSION = 1

# Large values are the last in their rows, or in tables of their own, because a value behind a large
# one is slow to read.
SCHEMA = """
CREATE TABLE files (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, purpose TEXT NOT NULL,
    created INTEGER NOT NULL, num_bytes INTEGER NOT NULL, batch TEXT);
CREATE INDEX files_of_owner ON files (owner);
CREATE TABLE uploads (file TEXT PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE batches (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, share TEXT NOT NULL, weight REAL NOT NULL,
    input_file TEXT NOT NULL, output_file TEXT NOT NULL, created INTEGER NOT NULL, ended INTEGER,
    is_cancelled INTEGER NOT NULL DEFAULT 0, metadata TEXT, total INTEGER NOT NULL,
    completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
    num_bytes INTEGER NOT NULL);
CREATE INDEX batches_of_owner ON batches (owner);
CREATE INDEX open_batches ON batches (owner) WHERE ended IS NULL;
CREATE TABLE lines (
    batch TEXT NOT NULL, number INTEGER NOT NULL, custom_id TEXT NOT NULL, is_good INTEGER,
    body TEXT NOT NULL, result TEXT, PRIMARY KEY (batch, number));
CREATE INDEX pending ON lines (batch, number) WHERE result IS NULL;
CREATE TABLE trash (
    batch TEXT PRIMARY KEY, owner TEXT NOT NULL, num_bytes INTEGER NOT NULL);
CREATE TABLE voices (
    owner TEXT NOT NULL, name TEXT NOT NULL, speaker INTEGER NOT NULL, text TEXT NOT NULL,
    num_bytes INTEGER NOT NULL, recording BLOB NOT NULL, PRIMARY KEY (owner, name));
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, share TEXT NOT NULL, weight REAL NOT NULL,
    kind TEXT NOT NULL, webhook TEXT, attempts INTEGER NOT NULL DEFAULT 0, until REAL,
    seconds REAL NOT NULL DEFAULT 0, logs TEXT NOT NULL, error TEXT,
    num_bytes INTEGER NOT NULL, result TEXT, body TEXT);
CREATE INDEX jobs_of_owner ON jobs (owner);
CREATE INDEX ended_jobs ON jobs (until) WHERE until IS NOT NULL;
CREATE INDEX open_jobs ON jobs (id) WHERE until IS NULL;
CREATE TABLE deliveries (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, url TEXT NOT NULL, attempts INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL, body BLOB NOT NULL);
CREATE TABLE downloads (
    name TEXT PRIMARY KEY, owner TEXT NOT NULL, media_type TEXT NOT NULL, until REAL NOT NULL,
    num_bytes INTEGER NOT NULL, data BLOB NOT NULL);
CREATE INDEX downloads_of_owner ON downloads (owner);
CREATE INDEX downloads_by_age ON downloads (until);
"""


class SchemaError(Exception):
    """The database has other tables than those of this server."""


def prepare(connection: sqlite3.Connection) -> None:
    """Creates the tables of an empty database, or checks the existing ones, in a transaction.

    Raises:
      SchemaError: it is the database of another program, or of another version.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, VERSION):
        way_out = "upgrade the server" if version > VERSION else "move it away"
        raise SchemaError(f"it has version {version}, and this server knows {VERSION}: {way_out}")
    if version == 0 and _layout(connection):
        raise SchemaError("it is not a database of this server: move it away")
    if version == 0:
        _execute(connection, SCHEMA)
        connection.execute(f"PRAGMA user_version = {VERSION}")
    if _layout(connection) != _layout_of(SCHEMA):
        raise SchemaError("its tables are not those of this server: move it away")


def _execute(connection: sqlite3.Connection, script: str) -> None:
    """`executescript` without the commit before it."""
    for statement in script.split(";"):
        connection.execute(statement)


_COLUMNS = {
    "table": "SELECT name, type FROM pragma_table_xinfo(?)",
    "index": "SELECT name, cid FROM pragma_index_xinfo(?)",
}


def _layout(connection: sqlite3.Connection) -> dict[str, list[tuple]]:
    """The columns of each table and index."""
    names = connection.execute(
        "SELECT name, type FROM sqlite_master WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    ).fetchall()
    # Views and triggers, which this server does not have, count as empty.
    return {
        name: connection.execute(_COLUMNS[kind], (name,)).fetchall() if kind in _COLUMNS else []
        for name, kind in names
    }


def _layout_of(script: str) -> dict[str, list[tuple]]:
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(script)
        return _layout(connection)
    finally:
        connection.close()
