"""`best_of`: several takes of a request, if the server allows them."""

import numpy as np
import pytest
from serving import SMALL, as_samples, serve

from csm_jax import Request
from csm_jax.inference.takes import take_seeds
from csm_jax.serve.settings import Settings

TEXT = "three one four one"
FIELDS = {"input": TEXT, "voice": "0", "seed": 4, "response_format": "wav"}


@pytest.fixture(scope="module")
def generous(model):
    with serve(model, Settings(**SMALL, max_best_of=3)) as running:
        yield running


def test_the_best_take_is_sent(generous, model):
    response = generous.post("/v1/audio/speech", json=FIELDS | {"best_of": 2})
    assert response.status_code == 200, response.text
    samples = as_samples(response.content)
    # A batch of another size can round differently.
    best = model.generate(Request(TEXT, seed=4, best_of=2))
    alone = [model.generate(TEXT, seed=seed) for seed in take_seeds(4, 2)]
    assert len(alone[0]) != len(alone[1])
    assert len(samples) == len(best)
    np.testing.assert_allclose(samples, np.clip(best, -1, 1), atol=2e-3)


def test_a_stream_of_takes_is_sent_when_all_are_done(generous):
    fields = {"text": TEXT, "seed": 4, "streaming": True, "best_of": 2}
    streamed = generous.post("/generate", json=fields)
    whole = generous.post("/v1/audio/speech", json=FIELDS | {"best_of": 2})
    assert streamed.status_code == 200
    assert len(as_samples(streamed.content)) == len(as_samples(whole.content))


@pytest.mark.parametrize("count", [2, 16])
def test_more_takes_than_the_server_allows_are_refused(server, count):
    response = server.post("/v1/audio/speech", json=FIELDS | {"best_of": count})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "best_of"
    assert error["message"] == f"best_of is {count}, but at most 1 are generated"


@pytest.mark.parametrize("count", [0, 17, "many"])
def test_a_number_of_takes_that_is_none_is_refused(server, count):
    response = server.post("/v1/audio/speech", json=FIELDS | {"best_of": count})
    assert response.status_code in {400, 422}
    assert "best_of" in response.text
