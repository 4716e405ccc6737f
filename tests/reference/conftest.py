"""The tiny model of transformers, and the same weights in this library."""

import pytest


@pytest.fixture(scope="module")
def reference():
    """Random weights of transformers' own classes; modules may hook them."""
    import csm_jax
    import oracles

    return oracles.hf_model(csm_jax.tiny(), seed=3)


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    """The weights of `reference`, written by transformers."""
    from fixtures import params_of

    import csm_jax
    import oracles
    from csm_jax.convert.layouts import open_checkpoint
    from csm_jax.model.precision import FLOAT32
    from csm_jax.prompt.tokenizer import byte_tokenizer

    directory = oracles.save_hf(reference, tmp_path_factory.mktemp("hf") / "model")
    params = params_of(open_checkpoint(directory), FLOAT32)
    config = csm_jax.tiny()
    return csm_jax.Generator.from_params(config, params, byte_tokenizer(config), FLOAT32)
