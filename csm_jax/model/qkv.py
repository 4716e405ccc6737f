"""The one projection of an attention layer: queries, keys and values of each kv head side by side.

For each of the K kv heads it has the rows of its G query heads, of its key and of its value
([K * (G + 2) * H, D]), so that a mesh can split it by kv heads.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from csm_jax.config import LlamaConfig


def fuse(query: Any, key: Any, value: Any, config: LlamaConfig) -> Any:
    """Joins the rows of three projections, [N * H, D] and twice [K * H, D] (numpy's or jax's)."""
    kv_heads, head_dim = config.num_kv_heads, config.head_dim
    heads = [x.reshape(kv_heads, -1, head_dim, x.shape[-1]) for x in (query, key, value)]
    # Values are numpy's; jax's are traced, for gradients or for shapes alone.
    xp = np if isinstance(heads[0], np.ndarray) else jnp
    return xp.concatenate(heads, axis=1).reshape(-1, query.shape[-1])


def split(fused: Any, config: LlamaConfig) -> tuple[Any, Any, Any]:
    """The reverse of `fuse`."""
    group = config.num_heads // config.num_kv_heads
    heads = fused.reshape(config.num_kv_heads, group + 2, config.head_dim, -1)
    parts = heads[:, :group], heads[:, group : group + 1], heads[:, group + 1 :]
    query, key, value = (part.reshape(-1, fused.shape[-1]) for part in parts)
    return query, key, value
