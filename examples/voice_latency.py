"""Measures the time to first audio with a voice that is sent along, added before, or used before.

    python -m csm_jax.serve --checkpoint=demo &
    python examples/voice_latency.py --seconds=10

The program prints a JSON object with the median time to the first samples of a stream, in seconds.

- plain: a request without a voice.
- sent: the recording is part of every request; it is decoded, encoded to codes and prefilled.
- cold: the first request with an added voice: its codes are stored and are prefilled.
- cached: a later request with the same voice: its keys and values are stored.
"""

import base64
import json
import statistics
import time

import httpx
import numpy as np
from absl import app, flags, logging

from csm_jax.io.audio import encode_audio, load_audio
from csm_jax.io.samples import SAMPLE_RATE
from csm_jax.loading import BUNDLED

URL = flags.DEFINE_string("url", "http://127.0.0.1:8000", "the server")
SECONDS = flags.DEFINE_float("seconds", 10.0, "seconds of the recording")
REPEATS = flags.DEFINE_integer("repeats", 9, "requests of each kind")
TEXT = "one two three"


def make_recording(seconds: float, index: int) -> bytes:
    """A wav file of the demo's prompts; `index` moves its beginning, so all differ."""
    paths = sorted((BUNDLED["demo"] / "prompts").glob("*.flac"))
    audio = np.concatenate([load_audio(path, SAMPLE_RATE) for path in paths])
    samples = np.resize(np.roll(audio, -4800 * index), int(seconds * SAMPLE_RATE))
    return encode_audio(samples, SAMPLE_RATE, ".wav")


def first_audio(client: httpx.Client, body: dict) -> float:
    """Seconds until the first samples of the response."""
    body = {"text": TEXT, "streaming": True, "seed": 1} | body
    started = time.perf_counter()
    with client.stream("POST", "/generate", json=body) as response:
        response.raise_for_status()
        for _ in response.iter_raw():
            return time.perf_counter() - started
    raise SystemExit("the response was empty")


def with_voice(client: httpx.Client, name: str, recording: bytes) -> tuple[float, float]:
    """Measures `cold` and `cached` with a voice that is added, and deleted afterwards."""
    files = {"audio": ("voice.wav", recording)}
    added = client.post("/v1/audio/voices", data={"name": name, "text": TEXT}, files=files)
    added.raise_for_status()
    try:
        return first_audio(client, {"voice": name}), first_audio(client, {"voice": name})
    finally:
        client.delete(f"/v1/audio/voices/{name}").raise_for_status()


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    times = {"plain": [], "sent": [], "cold": [], "cached": []}
    with httpx.Client(base_url=URL.value, timeout=300) as client:
        for index in range(REPEATS.value):
            recording = make_recording(SECONDS.value, index)
            sent = {"audio": base64.b64encode(recording).decode(), "audio_text": TEXT}
            times["plain"].append(first_audio(client, {}))
            times["sent"].append(first_audio(client, sent))
            cold, cached = with_voice(client, f"latency-{index}", recording)
            times["cold"].append(cold)
            times["cached"].append(cached)
    medians = {f"{kind}_s": round(statistics.median(each), 4) for kind, each in times.items()}
    print(json.dumps({"recording_s": SECONDS.value} | medians))


if __name__ == "__main__":
    app.run(main)
