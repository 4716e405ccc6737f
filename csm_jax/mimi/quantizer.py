"""Split residual vector quantization (Mimi, Defossez et al., 2024, section 3.2)."""

import jax.numpy as jnp
from flax import nnx

from csm_jax.config import MimiConfig
from csm_jax.model.layers import Array, Linear, Rngs, linear_float32, normal
from csm_jax.model.precision import FLOAT32


class ResidualQuantizer(nnx.Module):
    """Codebooks that each quantize the residual of those before.

    Attributes:
      codebooks: one float32 [V, C] per codebook. Separate arrays, as checkpoints have them:
        stacking them in every call costs 20 ms on a CPU, twice what a frame takes to decode.
    """

    def __init__(self, config: MimiConfig, num_codebooks: int, *, rngs: Rngs):
        dim, codebook_dim = config.embed_dim, config.codebook_dim
        self.in_proj = Linear(dim, codebook_dim, precision=FLOAT32, rngs=rngs)
        self.out_proj = Linear(codebook_dim, dim, precision=FLOAT32, rngs=rngs)
        shape = (config.codebook_size, codebook_dim)
        # Near the size of the latents, so that random weights use many codes.
        std = 0.25 * num_codebooks**-0.5
        self.codebooks = nnx.List(
            nnx.Param(normal(rngs, shape, std, jnp.float32)) for _ in range(num_codebooks)
        )

    def encode(self, latent: Array, num_codebooks: int) -> Array:
        """Quantizes [B, T, D] to int32 [B, T, num_codebooks]."""
        residual = self.in_proj(latent)
        codes = []
        for codebook in self.codebooks[:num_codebooks]:
            codes.append(nearest(residual, codebook[...]))
            residual = residual - codebook[...][codes[-1]]
        return jnp.stack(codes, axis=-1)

    def decode(self, codes: Array) -> Array:
        """Latents [B, T, D] of codes, int32 [B, T, Q], from the first Q codebooks."""
        used = self.codebooks[: codes.shape[-1]]
        entries = [codebook[...][codes[..., i]] for i, codebook in enumerate(used)]
        return self.out_proj(sum(entries[1:], entries[0]))


class SplitQuantizer(nnx.Module):
    """Semantic and acoustic codebooks side by side.

    Both groups quantize the same latent, and their outputs are added: the acoustic codebooks do not
    get the residual of the semantic ones.
    """

    def __init__(self, config: MimiConfig, *, rngs: Rngs):
        self.num_semantic = config.num_semantic_codebooks
        num_acoustic = config.num_codebooks - self.num_semantic
        self.semantic = ResidualQuantizer(config, self.num_semantic, rngs=rngs)
        self.acoustic = ResidualQuantizer(config, num_acoustic, rngs=rngs)

    def encode(self, latent: Array, num_codebooks: int) -> Array:
        """Quantizes [B, T, D] to int32 [B, T, num_codebooks], the semantic codes first."""
        semantic = self.semantic.encode(latent, min(num_codebooks, self.num_semantic))
        if num_codebooks <= self.num_semantic:
            return semantic
        acoustic = self.acoustic.encode(latent, num_codebooks - self.num_semantic)
        return jnp.concatenate([semantic, acoustic], axis=-1)

    def decode(self, codes: Array) -> Array:
        """Latents [B, T, D] of codes, int32 [B, T, Q] for any Q from 1 to all."""
        latent = self.semantic.decode(codes[..., : self.num_semantic])
        if codes.shape[-1] <= self.num_semantic:
            return latent
        return latent + self.acoustic.decode(codes[..., self.num_semantic :])


def nearest(x: Array, codebook: Array) -> Array:
    """Index of the entry nearest to each vector in Euclidean distance.

    Args:
      x: float32 [B, T, C].
      codebook: float32 [V, C].

    Returns:
      int32 [B, T].
    """
    # |x - c|^2 without |x|^2, which is the same for every entry.
    norms = jnp.sum(jnp.square(codebook), axis=-1)
    distances = norms[None, None] - 2 * linear_float32(x, codebook)  # [B, T, V]
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)
