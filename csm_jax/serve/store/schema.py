"""The tables, their version, and how older versions become this one."""

import sqlite3

VERSION = 1

# Large values stand last in their rows, or in tables of their own: what is behind one is slow to
# read.
SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, purpose TEXT NOT NULL,
    created INTEGER NOT NULL, num_bytes INTEGER NOT NULL, batch TEXT);
CREATE INDEX IF NOT EXISTS files_of_owner ON files (owner);
CREATE TABLE IF NOT EXISTS uploads (file TEXT PRIMARY KEY, data BLOB NOT NULL);
-- Columns of version 0 first, as ALTER TABLE adds the others behind them.
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, input_file TEXT, output_file TEXT, created INTEGER, ended INTEGER,
    is_cancelled INTEGER DEFAULT 0,
    owner TEXT NOT NULL DEFAULT '', share TEXT NOT NULL DEFAULT '',
    weight REAL NOT NULL DEFAULT 1, metadata TEXT,
    total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0, num_bytes INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS batches_of_owner ON batches (owner);
CREATE INDEX IF NOT EXISTS open_batches ON batches (owner) WHERE ended IS NULL;
CREATE TABLE IF NOT EXISTS lines (
    batch TEXT, number INTEGER, body TEXT, result TEXT, is_good INTEGER,
    PRIMARY KEY (batch, number));
CREATE INDEX IF NOT EXISTS pending ON lines (batch, number) WHERE result IS NULL;
CREATE TABLE IF NOT EXISTS trash (batch TEXT PRIMARY KEY, num_bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS voices (
    owner TEXT NOT NULL, name TEXT NOT NULL, speaker INTEGER NOT NULL, text TEXT NOT NULL,
    num_bytes INTEGER NOT NULL, recording BLOB NOT NULL, PRIMARY KEY (owner, name));
CREATE TABLE IF NOT EXISTS imports (directory TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, share TEXT NOT NULL, weight REAL NOT NULL,
    kind TEXT NOT NULL, webhook TEXT, attempts INTEGER NOT NULL DEFAULT 0, until REAL,
    seconds REAL NOT NULL DEFAULT 0, logs TEXT NOT NULL, error TEXT,
    num_bytes INTEGER NOT NULL, result TEXT, body TEXT);
CREATE INDEX IF NOT EXISTS jobs_of_owner ON jobs (owner);
CREATE INDEX IF NOT EXISTS ended_jobs ON jobs (until) WHERE until IS NOT NULL;
CREATE INDEX IF NOT EXISTS open_jobs ON jobs (id) WHERE until IS NULL;
CREATE TABLE IF NOT EXISTS deliveries (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, url TEXT NOT NULL, attempts INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS downloads (
    name TEXT PRIMARY KEY, owner TEXT NOT NULL, media_type TEXT NOT NULL, until REAL NOT NULL,
    num_bytes INTEGER NOT NULL, data BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS downloads_of_owner ON downloads (owner);
CREATE INDEX IF NOT EXISTS downloads_by_age ON downloads (until);
"""

# Version 0 had no owners and counted lines when it was asked.
_SCHEMA_0 = """
CREATE TABLE files (
    id TEXT PRIMARY KEY, name TEXT, purpose TEXT, created INTEGER, data BLOB, batch TEXT);
CREATE TABLE batches (
    id TEXT PRIMARY KEY, input_file TEXT, output_file TEXT, created INTEGER, ended INTEGER,
    is_cancelled INTEGER DEFAULT 0);
CREATE TABLE lines (
    batch TEXT, number INTEGER, body TEXT, result TEXT, is_good INTEGER,
    PRIMARY KEY (batch, number));
CREATE INDEX pending ON lines (batch, number) WHERE result IS NULL;
"""

_FROM_0 = """
ALTER TABLE files RENAME TO old_files;
ALTER TABLE batches ADD COLUMN owner TEXT NOT NULL DEFAULT '';
ALTER TABLE batches ADD COLUMN share TEXT NOT NULL DEFAULT '';
ALTER TABLE batches ADD COLUMN weight REAL NOT NULL DEFAULT 1;
ALTER TABLE batches ADD COLUMN metadata TEXT;
ALTER TABLE batches ADD COLUMN total INTEGER NOT NULL DEFAULT 0;
ALTER TABLE batches ADD COLUMN completed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE batches ADD COLUMN failed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE batches ADD COLUMN num_bytes INTEGER NOT NULL DEFAULT 0;
UPDATE batches SET (total, completed, failed, num_bytes) = (
    SELECT COUNT(*), COALESCE(SUM(is_good = 1), 0), COALESCE(SUM(is_good = 0), 0),
        COALESCE(SUM(length(CAST(body AS BLOB)) + COALESCE(length(CAST(result AS BLOB)), 0)), 0)
    FROM lines WHERE batch = id);
"""
_COPY_FROM_0 = """
INSERT INTO files SELECT id, '', name, purpose, created, COALESCE(length(data), 0), batch
    FROM old_files;
INSERT INTO uploads SELECT id, data FROM old_files WHERE data IS NOT NULL;
DROP TABLE old_files;
"""


class SchemaError(Exception):
    """The tables are not those of this server."""


def prepare(connection: sqlite3.Connection) -> None:
    """Makes the tables of an empty database, or checks those that are there; in a transaction.

    Raises:
      SchemaError: it is another program's database, or a newer version's.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise SchemaError(f"it has version {version}, and this server knows {VERSION}: upgrade it")
    found = _layout(connection)
    if version == 0 and found:
        if found != _layout_of(_SCHEMA_0):
            raise SchemaError("it is not a database of this server")
        _execute(connection, _FROM_0 + SCHEMA + _COPY_FROM_0)
    if version == 0:
        _execute(connection, SCHEMA)
        connection.execute(f"PRAGMA user_version = {VERSION}")
    if _layout(connection) != _layout_of(SCHEMA):
        raise SchemaError("its tables are not those of this server")


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
    # Nothing for views and triggers, which this server does not have.
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
