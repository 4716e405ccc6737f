"""Fixtures of the tests of inference: one small model, and what it generates without an engine."""

import dataclasses
import threading

import pytest
from engine_requests import REQUESTS, SMALL

import csm_jax


@pytest.fixture(autouse=True)
def no_thread_is_left():
    # Tests in other files of the same worker may still have an engine.
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert "csm_jax.Engine" not in left


@pytest.fixture(scope="session")
def model(shallow):
    return dataclasses.replace(csm_jax.load(shallow), inference=SMALL)


@pytest.fixture(scope="session")
def alone(model):
    """The codes and notices of each request without an engine."""
    outcomes = {}
    for name, request in REQUESTS.items():
        notices = []
        outcomes[name] = model.generate_codes(request, notify=notices.append), notices
    return outcomes
