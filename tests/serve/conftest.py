"""Servers, browsers and recordings that tests of the server share."""

import subprocess
from pathlib import Path

import httpx
import pytest
import trustme
from browser import ARGUMENTS, CHROMIUM, Visit
from serving import PRESETS, SMALL, serve

import csm_jax
from csm_jax.inference.generator import Generator
from csm_jax.serve.settings import Limits, Settings
from csm_jax.serve.store import Store


@pytest.fixture(scope="session")
def model() -> Generator:
    return csm_jax.load("demo", dtype="float32")


@pytest.fixture(scope="session")
def server(model):
    with serve(model, Settings(**SMALL)) as running:
        yield running


@pytest.fixture(autouse=True)
def no_slot_is_leaked(request):
    """All slots are free when a test ends."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").wait_until_idle()


@pytest.fixture(scope="session")
def recording() -> bytes:
    """A recording of a voice as a FLAC file."""
    return (PRESETS[0] / "rms.flac").read_bytes()


@pytest.fixture(scope="session")
def transcript() -> str:
    return (PRESETS[0] / "rms.txt").read_text().splitlines()[-1]


@pytest.fixture(scope="session")
def run():
    """Runs a shell command, and raises an error if it fails."""

    def call(line: str) -> str:
        # The commands are literals of tests, as in the README.
        return subprocess.run(  # noqa: S602
            line,
            shell=True,
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout

    return call


@pytest.fixture
def open_store():
    """Opens stores, and closes them after the test."""
    stores = []

    def open_one(directory: Path | None = None, **limits: int) -> Store:
        stores.append(Store(directory, Limits(**limits)))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; without it the tests of the page are skipped."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("apt install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """A visit to the page, which fails on requests to other hosts and on errors in the browser."""
    page = browser.new_page(viewport={"width": 1100, "height": 1200})
    visit = Visit(page, server.url)
    yield visit
    page.close()
    hosts = {
        httpx.URL(url).netloc for url in visit.requests if not url.startswith(("blob:", "data:"))
    }
    assert hosts == {httpx.URL(server.url).netloc}
    assert visit.complaints == []


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A directory with ca.pem, and cert.pem and key.pem of localhost."""
    directory = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(directory / "key.pem")
    issued.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    return directory
