"""Errors of the store."""

from csm_jax.errors import CSMError


class StorageError(CSMError):
    """The database cannot be read or written."""


class StorageFullError(StorageError):
    """The disk has no room."""


class QuotaError(CSMError):
    """An owner, or all owners together, would store more than the limits allow."""
