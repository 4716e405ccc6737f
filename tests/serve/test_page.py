"""The page in a real browser: headless Chromium, driven by Playwright."""

import asyncio
import io
import shutil
from concurrent.futures import ThreadPoolExecutor

import gradio
import httpx
import numpy as np
import pytest
import soundfile
from gradio.processing_utils import async_move_files_to_cache
from serving import SMALL, serve

from csm_jax.errors import InputError
from csm_jax.serve.page import Broadcast, parse_lines, without_fetching
from csm_jax.serve.scene import Line
from csm_jax.serve.settings import Settings

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required"),
]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="apt install chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    page = browser.new_page(viewport={"width": 1100, "height": 1200})
    page.goto(server.url)
    page.get_by_role("button", name="Speak").wait_for()
    yield page
    page.close()


def speak(page) -> np.ndarray:
    """Presses the button, and downloads what it comes to."""
    page.get_by_role("button", name="Speak").click()
    page.get_by_text("s of speech").wait_for(timeout=60_000)
    with page.expect_download() as download:
        page.get_by_label("Download").last.click()
    return soundfile.read(io.BytesIO(download.value.path().read_bytes()), dtype="float32")[0]


@needs_browser
def test_dialogue_is_spoken_heard_and_downloaded(page, server, tmp_path):
    audio = speak(page)
    assert 3 < len(audio) / 24_000 < 15
    assert np.sqrt(np.mean(audio**2)) > 0.01
    # It was played while it was made.
    played = "Array.from(document.querySelectorAll('audio')).map(a => [a.src, a.duration])"
    live = [found for found in page.evaluate(played) if "/page/live/" in found[0]]
    assert len(live) == 1
    page.wait_for_function("document.querySelector('audio[src*=live]').ended", timeout=30_000)
    duration = page.evaluate("document.querySelector('audio[src*=live]').duration")
    assert duration == pytest.approx(len(audio) / 24_000, abs=0.2)  # mp3 pads its ends
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert "impersonate" in page.content()


@needs_browser
def test_a_recording_of_one_s_own(page, recording, transcript):
    page.get_by_label("A", exact=True).click()
    page.get_by_role("option", name="(my recording)").click()
    file = {"name": "a.flac", "mimeType": "audio/flac", "buffer": recording}
    page.locator("input[type=file]").first.set_input_files(file)
    page.get_by_label("What is said in my recording").first.fill(transcript)
    page.get_by_label("Dialogue").fill("A: one two three")
    assert len(speak(page)) > 10_000


@needs_browser
def test_a_voice_that_was_added_can_be_chosen(page, server, recording, transcript):
    fields, files = {"name": "late", "text": transcript}, {"audio": ("a.flac", recording)}
    assert server.post("/v1/audio/voices", data=fields, files=files).status_code == 201
    page.reload()
    page.get_by_label("A", exact=True).click()
    page.get_by_role("option", name="late").click(timeout=10_000)
    httpx.delete(f"{server.url}/v1/audio/voices/late").raise_for_status()


@needs_browser
@pytest.mark.parametrize(
    ("lines", "message"), [("   ", "there is no line to say"), ("x" * 20_000, "at most 10000")]
)
def test_what_is_wrong_is_said(page, lines, message):
    page.get_by_label("Dialogue").fill(lines)
    page.get_by_role("button", name="Speak").click()
    page.get_by_text(message).first.wait_for(timeout=20_000)


@needs_browser
def test_a_seed_is_a_number(page):
    page.get_by_text("Advanced").click()
    page.get_by_label("Seed").fill("seven")
    page.get_by_role("button", name="Speak").click()
    page.get_by_text("seed: Input should be a valid integer").first.wait_for(timeout=20_000)


@needs_browser
def test_stop(page, server):
    page.get_by_label("Dialogue").fill("A: one two three four five six seven eight\n" * 10)
    page.get_by_role("button", name="Speak").click()
    page.get_by_text("Line 1 of 10").wait_for(timeout=20_000)
    page.get_by_role("button", name="Stop").click()
    server.wait_until_idle(seconds=5)


@needs_browser
def test_with_keys_it_asks_for_one(model, browser):
    with serve(model, Settings(**SMALL, api_keys=("secret",))) as guarded:
        for password, opens in {"wrong": False, "secret": True}.items():
            page = browser.new_page()
            page.goto(guarded.url)
            page.get_by_label("username").fill("me")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            answer = page.get_by_role("button", name="Speak") if opens else None
            (answer or page.get_by_text("Incorrect")).first.wait_for(timeout=30_000)
            assert page.get_by_role("button", name="Speak").count() == opens
            page.close()


def test_a_recording_is_no_address():
    """Gradio fetches what it is given, from anywhere."""
    recording = without_fetching(gradio.Audio(type="filepath"))
    given = {"path": "http://127.0.0.1:1/a.wav", "meta": {"_type": "gradio.FileData"}}
    fetching = async_move_files_to_cache(given, recording, check_in_upload_folder=True)
    with pytest.raises(gradio.Error, match="no address"):
        fetching.send(None)  # the browser's driver has a loop in this thread


def test_lines():
    assert parse_lines("A: one\nb:two\n\n three\nA four") == [
        Line("one", 0),
        Line("two", 1),
        Line("three", 0),
        Line("A four", 1),
    ]
    with pytest.raises(InputError):
        parse_lines("\n A: \n")


def test_whoever_listens_hears_it_from_the_beginning():
    """A browser asks twice for the same, the first time for its kind only."""

    async def scenario() -> list[bytes]:
        broadcast = Broadcast(24_000)

        async def hear(name: str) -> bytes:
            return b"".join([data async for data in broadcast.listen(name)])

        with broadcast.open() as (name, send):
            first = asyncio.create_task(hear(name))
            for _ in range(3):
                send(np.zeros(24_000, np.float32))
                await asyncio.sleep(0)
            second = asyncio.create_task(hear(name))
            await asyncio.sleep(0)
        return [await first, await second, await hear(name), await hear("another")]

    with ThreadPoolExecutor() as thread:  # the browser's driver has a loop in this one
        first, *others, nothing = thread.submit(asyncio.run, scenario()).result()
    assert len(soundfile.read(io.BytesIO(first))[0]) > 70_000
    assert others == [first, first]
    assert nothing == b""
