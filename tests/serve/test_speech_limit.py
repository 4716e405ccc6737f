"""The limit of one response's speech, whatever the model's own limit is."""

import dataclasses
from types import SimpleNamespace

import pytest
from fixtures import CONFIG

from csm_jax import InputError, Request
from csm_jax.serve.service import Service
from csm_jax.serve.settings import Limits

LONGER = dataclasses.replace(CONFIG, default_max_audio_length_ms=90_000)


def limited(request: Request, config, limit_ms: float) -> Request:
    service = SimpleNamespace(
        settings=SimpleNamespace(limits=Limits(speech_ms=limit_ms)),
        model=SimpleNamespace(config=config),
    )
    return Service._limited(service, request)


@pytest.mark.parametrize(
    ("config", "limit_ms", "expected"),
    [(CONFIG, 30_000, None), (LONGER, 30_000, 30_000), (LONGER, 90_000, None), (CONFIG, 900, 900)],
)
def test_a_short_text_has_no_more_than_the_servers_limit(config, limit_ms, expected):
    assert limited(Request("one"), config, limit_ms).max_audio_length_ms == expected


def test_a_longer_limit_of_a_request_is_refused():
    with pytest.raises(InputError, match="at most 900 are spoken"):
        limited(Request("one", max_audio_length_ms=1000), CONFIG, 900)
