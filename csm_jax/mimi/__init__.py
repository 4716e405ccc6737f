"""Mimi, the speech codec."""

from csm_jax.mimi.codec import Codec, Mimi, bind

__all__ = ["Codec", "Mimi", "bind"]
