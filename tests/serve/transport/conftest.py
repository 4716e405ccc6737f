"""A server and raw connections to it."""

import pytest
from raw_server import run


@pytest.fixture(scope="module")
def running():
    with run() as made:
        yield made


@pytest.fixture
def opened(running):
    """Connections that are closed after the test."""
    made = []
    yield made
    for each in made:
        each.close()
    # The server may take a while to read what they have sent.
    running.wait_for(0, seconds=30)
