"""The store of a server: all tables of its database."""

import asyncio
import logging
from pathlib import Path

from csm_jax.errors import first_line
from csm_jax.serve.errors import StorageError
from csm_jax.serve.settings import Limits
from csm_jax.serve.store.batches import Batches
from csm_jax.serve.store.database import Database
from csm_jax.serve.store.downloads import Downloads
from csm_jax.serve.store.jobs import JobStore
from csm_jax.serve.store.quota import Quota
from csm_jax.serve.store.voices import VoiceStore

logger = logging.getLogger("csm_jax.serve")

_TIDY_SECONDS = 5.0
# Limit without a directory, when everything is in memory.
_MEMORY_BYTES = 1_000_000_000


class Store:
    """All tables of a server.

    Attributes:
      database: their connection, lock and state.
      batches, voices, jobs, downloads: the tables by subject.
    """

    def __init__(self, directory: Path | None, limits: Limits):
        """Opens or makes the database.

        Raises:
          OutputError: the directory cannot be used, or another server uses it.
          StorageError: the database is damaged, or not one of this server.
        """
        self.database = database = Database(directory)
        most = limits.stored_bytes
        quota = Quota(
            total_bytes=most if directory else min(most, _MEMORY_BYTES),
            owner_bytes=limits.stored_bytes_per_owner,
            owner_files=limits.files_per_owner,
            owner_batches=limits.batches_per_owner,
            owner_voices=limits.voices_per_owner,
            voices=limits.voices,
        )
        self.batches = Batches(database, quota)
        self.voices = VoiceStore(database, quota)
        self.jobs = JobStore(database, quota)
        self.downloads = Downloads(database, limits.download_bytes, limits.download_bytes_per_owner)

    @property
    def problem(self) -> str | None:
        """Why the server is not ready; None if nothing has failed."""
        return next(iter(list(self.database.problems.values())), None)

    async def tidy(self) -> None:
        """Removes deleted and expired rows periodically, until it is cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.database.check_directory)
                while await self.batches.purge():
                    pass
                await self.downloads.expire()
                await self.jobs.expire()
                self.database.problems.pop("tidy", None)
            except StorageError:
                pass  # the database has logged it
            except Exception as error:
                message = f"deleted and expired rows are not removed: {first_line(error)}"
                self.database.report("tidy", message, error)
            await asyncio.sleep(_TIDY_SECONDS)

    def close(self) -> None:
        """Finishes the queued transactions, and releases the directory."""
        self.database.close()
