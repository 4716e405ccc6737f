"""A real server: uvicorn in a thread, on a free port, with the demo checkpoint."""

import contextlib
import io
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import soundfile

from csm_jax.inference.generator import Generator
from csm_jax.loading import BUNDLED
from csm_jax.serve.app import create_app
from csm_jax.serve.service import Service
from csm_jax.serve.settings import Settings
from csm_jax.serve.transport.server import make_server
from csm_jax.watermark import Watermark

PRESETS = [Path(BUNDLED["demo"]) / "prompts"]
# Shapes that are compiled once for all tests.
SMALL = dict(max_batch=4, max_seq_len=256)
READY_SECONDS = 300


@dataclass
class Server:
    """A running server and its service."""

    url: str
    service: Service

    def get(self, path: str, **more) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **more)

    def post(self, path: str, **more) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **more)

    def wait_until_idle(self, seconds: float = 20) -> None:
        """Fails if a request still has a slot or waits for one."""
        engine = self.service.engine
        deadline = time.monotonic() + seconds
        while engine.num_running or engine.num_waiting:
            assert time.monotonic() < deadline, (engine.num_running, engine.num_waiting)
            time.sleep(0.02)


@contextlib.contextmanager
def serve(
    model: Generator,
    settings: Settings,
    warm: bool | None = False,
    watermark: Watermark | None = None,
    **more,
):
    """Runs a server, with arguments `more` of `make_server`.

    Args:
      warm: waits until it is ready; False compiles what is needed when it is, None does not wait.
    """
    app = create_app(model, settings, PRESETS, watermark=watermark)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    server = make_server(app, settings, **more)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    kind = "https" if "ssl_certfile" in more else "http"
    running = Server(f"{kind}://localhost:{port}", app.state.service)
    deadline = time.monotonic() + READY_SECONDS
    try:
        while not (server.started and (running.service.is_ready or not warm)):
            assert time.monotonic() < deadline
            assert thread.is_alive()
            time.sleep(0.05)
        if warm is False:
            warming = running.service.warmed
            warming.get_loop().call_soon_threadsafe(warming.cancel)
            # The requests of a test must not be confused with the one of the warm-up.
            running.wait_until_idle(READY_SECONDS)
        yield running
    finally:
        server.should_exit = True
        thread.join()


def as_samples(data: bytes) -> np.ndarray:
    """float32 [num_samples] of a wav, mp3, flac or opus file."""
    return soundfile.read(io.BytesIO(data), dtype="float32")[0]


def as_wav(audio: np.ndarray, sample_rate: int = 24_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, sample_rate, format="WAV")
    return file.getvalue()


def same(one: bytes, other: bytes) -> bool:
    """Whether two recordings, 16-bit samples with or without a wav head, are the same speech.

    Chunks of one frame and of many round differently in the last place of float32, which can
    move a sample by one step of 16 bits.
    """
    first, second = (_samples(each) for each in (one, other))
    if len(first) != len(second):
        return False
    return int(np.abs(first - second).max(initial=0)) <= 1


def _samples(data: bytes) -> np.ndarray:
    start = 44 if data[:4] == b"RIFF" else 0
    return np.frombuffer(data[start:], "<i2").astype(np.int32)
