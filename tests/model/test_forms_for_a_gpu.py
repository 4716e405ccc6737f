"""Frames from the forms that a GPU runs, here on a CPU, equal those of the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from csm_jax.config import tiny
from csm_jax.model.csm import CSM
from csm_jax.model.layers import Linear
from csm_jax.model.precision import FLOAT32, Precision
from csm_jax.model.sampling import Sampling, SamplingParams

CONFIG = tiny()
INT8 = Precision(FLOAT32.weights, FLOAT32.activations, int8=True)
SAMPLINGS = {
    "greedy": Sampling(greedy=True),
    "defaults": Sampling(),
    "filters": Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
}


def frames(model: CSM, sampling: Sampling, batch: int) -> np.ndarray:
    """Codes [4 * B, Q] from random states of the backbone."""
    seen = np.zeros((batch, CONFIG.audio_vocab_size), bool)
    params = SamplingParams.stack([sampling] * batch)
    keys = jax.vmap(jax.random.key)(np.arange(batch, dtype=np.uint32))

    @jax.jit
    def frame(hidden: jax.Array) -> jax.Array:
        return model.generate_frame(hidden, keys, params, seen)[0]

    shape = 4, batch, CONFIG.backbone.embed_dim
    states = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return np.concatenate([frame(state) for state in states])


def widened(model: CSM) -> CSM:
    """The same model with the int8 weights as the float32 numbers that they stand for."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            scale = module.weight_scale[...]
            module.weight = nnx.Param(module.weight[...].astype(jnp.float32) * scale[..., None])
            module.weight_scale = None
    return model


@pytest.fixture
def forms_for_a_gpu(monkeypatch):
    def choose(*arguments, default, **forms):
        return forms.get("cuda", default)(*arguments)

    def use() -> None:
        monkeypatch.setattr(jax.lax, "platform_dependent", choose)

    return use


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
@pytest.mark.parametrize("precision", [FLOAT32, INT8], ids=["float32", "int8"])
def test_codes_equal_those_of_the_plain_forms(forms_for_a_gpu, precision, sampling, batch):
    model = CSM(CONFIG, precision=precision, rngs=nnx.Rngs(0))
    plain = CSM(CONFIG, precision=precision, rngs=nnx.Rngs(0))
    expected = frames(widened(plain) if precision.int8 else plain, sampling, batch)
    forms_for_a_gpu()
    np.testing.assert_array_equal(frames(model, sampling, batch), expected)
    assert len(np.unique(expected)) > 4
