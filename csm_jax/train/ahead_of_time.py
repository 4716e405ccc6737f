"""A step of training compiled without weights, for chips that need not be there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered

from csm_jax.checkpoint import param_shapes
from csm_jax.config import CSMConfig
from csm_jax.layers import LowRank
from csm_jax.lora import Adapters, LoRAConfig, adapter_shapes
from csm_jax.train import placement
from csm_jax.train.batches import Batch
from csm_jax.train.step import Recipe, init_state, train_step


def lower_step(recipe: Recipe, rows: int, length: int) -> Lowered:
    """The step of a run on `recipe.mesh`, for batches of `rows` x `length` positions."""
    config = recipe.config
    frozen = None
    trained = param_shapes(config)["csm"]
    if recipe.lora is not None:
        frozen = _placed(param_shapes(config, recipe.precision)["csm"], recipe)
        trained = _adapters(config, recipe.lora)
    state = jax.eval_shape(functools.partial(init_state, recipe=recipe), trained)
    columns = config.num_codebooks + 1
    where = placement.rows_sharding(recipe.mesh)
    batch = Batch(
        frames=jax.ShapeDtypeStruct((rows, length, columns), jnp.int32, sharding=where),
        mask=jax.ShapeDtypeStruct((rows, length, columns), bool, sharding=where),
        targets=jax.ShapeDtypeStruct((rows, length), bool, sharding=where),
    )
    return train_step.lower(_placed(state, recipe), frozen, batch, np.uint32(0), recipe=recipe)


def _adapters(config: CSMConfig, lora: LoRAConfig) -> Adapters:
    return {
        path: LowRank(
            jax.ShapeDtypeStruct((lora.rank, width), jnp.float32),
            jax.ShapeDtypeStruct((out, lora.rank), jnp.float32),
        )
        for path, (out, width) in adapter_shapes(config, lora.targets).items()
    }


def _placed(shapes, recipe: Recipe):
    def place(leaf):
        where = placement.sharding(leaf.shape, recipe.mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(place, shapes)
