"""The store of a server: one SQLite database, in which each row has an owner."""

from csm_jax.serve.store.store import Store

__all__ = ["Store"]
