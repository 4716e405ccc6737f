"""The page in a real browser: headless Chromium, driven by Playwright."""

import base64
import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import av
import numpy as np
import soundfile

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync"),
    # A fake microphone that beeps, which the page may use without a question.
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
]
# The first request of a server without warm-up waits for the compiler.
SPEAK_MS = 180_000


@dataclass
class Visit:
    """A visit to the page, with the browser's errors and requests."""

    page: object
    url: str
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    sent: list[dict] = field(default_factory=list)

    def __post_init__(self):
        page = self.page
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", self._follow)
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(self.url)
        page.locator("#speak").wait_for()

    def _note(self, message) -> None:
        # A browser logs every error response; the page shows these itself.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def _follow(self, socket) -> None:
        self.requests.append(socket.url)
        socket.on("framesent", lambda data: self.sent.append(json.loads(data)))

    def write(self, text: str) -> None:
        """Enters a dialogue as text."""
        self.page.get_by_role("button", name="Text", exact=True).click()
        self.page.locator("#text").fill(text)

    def set(self, label: str, value: str) -> None:
        """Fills in a setting."""
        self.page.evaluate("document.querySelector('#settings').open = true")
        self.page.get_by_label(label, exact=True).fill(value)

    def choose(self, speaker: str, voice: str) -> None:
        self.panel(speaker).get_by_label("Voice", exact=True).select_option(label=voice)

    def panel(self, speaker: str):
        return self.page.get_by_role("region", name=f"Voice of {speaker}")

    def start(self) -> None:
        self.page.locator("#speak").click()

    def speak(self) -> np.ndarray:
        """Speaks, and downloads the speech: float32 [num_samples]."""
        self.start()
        self.page.get_by_text("s of speech").wait_for(timeout=SPEAK_MS)
        return self.download("WAV")

    def download(self, name: str) -> np.ndarray:
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name=name, exact=True).click()
        data = download.value.path().read_bytes()
        # libsndfile cannot read a streamed FLAC file, which has no length in its head.
        resampler = av.AudioResampler("flt", "mono", 24_000)
        with av.open(io.BytesIO(data)) as file:
            frames = [each for frame in file.decode(audio=0) for each in resampler.resample(frame)]
        return np.concatenate([frame.to_ndarray()[0] for frame in frames])

    def wait_until(self, condition: str, seconds: float = 30) -> None:
        """Waits until an expression of JavaScript is true. The page's policy forbids what
        Playwright's own function does, which compiles text."""
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            self.page.wait_for_timeout(20)

    def delay(self, pattern: str, seconds: float = 0.3) -> None:
        """Delays the responses to requests whose addresses match a pattern."""

        def pass_on(route) -> None:
            time.sleep(seconds)
            route.continue_()

        self.page.route(pattern, pass_on)

    def status(self, text: str, seconds: float = 30) -> None:
        """Waits until the page shows this status."""
        self.page.locator("#status").get_by_text(text).wait_for(timeout=1000 * seconds)


class FakeServer:
    """A fake WebSocket of a server: a function responds to the messages of the page."""

    def __init__(self, page, respond: Callable[["FakeServer", dict], None]):
        self._respond = respond
        self.messages: list[dict] = []
        page.route_web_socket("**/v1/realtime", self._open)

    def _open(self, socket) -> None:
        self.socket = socket
        socket.on_message(self._take)

    def _take(self, data: str) -> None:
        self.messages.append(message := json.loads(data))
        self._respond(self, message)

    def tell(self, kind: str, **fields: object) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def play(self, seconds: float) -> None:
        """Sends a tone as frames of 80 ms."""
        times = np.arange(round(24_000 * seconds)) / 24_000
        samples = (8000 * np.sin(2 * np.pi * 220 * times)).astype("<i2")
        for start in range(0, len(samples), 1920):
            self.socket.send(samples[start : start + 1920].tobytes())


def answer_with(speak: Callable[[FakeServer], None]) -> Callable[[FakeServer, dict], None]:
    """The responses of a server that generates each turn by `speak`."""

    def respond(server: FakeServer, message: dict) -> None:
        if message["type"] == "session":
            server.tell("session")
        elif message["type"] == "say":
            number = sum(each["type"] == "say" for each in server.messages)
            server.tell("started", id=number, text=message["text"])
            speak(server)
            server.tell("done", id=number, seconds=1, cancelled=False, notices="")

    return respond


def pcm(text: str) -> np.ndarray:
    """float32 [num_samples] of a recording in base64."""
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(text)), dtype="float32")
    assert rate == 24_000
    return samples
