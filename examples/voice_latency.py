"""How soon a voice of its own is heard: its recording sent along, added before, spoken with before.

    python -m csm_jax.serve --checkpoint=demo &
    python examples/voice_latency.py --seconds=10

Prints a JSON object with the median time to the first samples of a stream, in seconds.

- plain: a request with no voice.
- sent: the recording comes with every request; it is decoded, encoded to codes and read.
- cold: of a voice that was just added: its codes are there, and are read into the KV cache.
- cached: of the same voice afterwards: its keys and values are there.
"""

import base64
import json
import statistics
import time

import httpx
import numpy as np
from absl import app, flags, logging

from csm_jax.audio import SAMPLE_RATE, encode_audio, load_audio
from csm_jax.loading import BUNDLED

URL = flags.DEFINE_string("url", "http://127.0.0.1:8000", "the server")
SECONDS = flags.DEFINE_float("seconds", 10.0, "of the recording")
REPEATS = flags.DEFINE_integer("repeats", 9, "requests of each kind")
TEXT = "one two three"


def make_recording(seconds: float, index: int) -> bytes:
    """A wav file of the demo's prompts, beginning a bit later each time: no two are alike."""
    paths = sorted((BUNDLED["demo"] / "prompts").glob("*.flac"))
    audio = np.concatenate([load_audio(path, SAMPLE_RATE) for path in paths])
    samples = np.resize(np.roll(audio, -4800 * index), int(seconds * SAMPLE_RATE))
    return encode_audio(samples, SAMPLE_RATE, ".wav")


def first_audio(client: httpx.Client, body: dict) -> float:
    """Seconds until the first samples of the answer."""
    body = {"text": TEXT, "streaming": True, "seed": 1} | body
    started = time.perf_counter()
    with client.stream("POST", "/generate", json=body) as answer:
        answer.raise_for_status()
        for _ in answer.iter_raw():
            return time.perf_counter() - started
    raise SystemExit("the answer was empty")


def with_voice(client: httpx.Client, name: str, recording: bytes) -> tuple[float, float]:
    """Cold and cached, of a voice that is added, and deleted again."""
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
