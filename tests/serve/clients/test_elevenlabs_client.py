"""ElevenLabs' own client, unchanged."""

import base64

import numpy as np
import pytest
from hearing import recognize_digits
from serving import as_samples

from csm_jax.evaluate.word_errors import count_errors

TEXT = "one two three four"


def check_speech(audio: np.ndarray, rate: int = 24_000) -> None:
    assert count_errors(TEXT.split(), recognize_digits(audio, rate)).errors <= 1


@pytest.mark.parametrize("method", ["convert", "stream"])
def test_speech(server, python, method):
    data = python(
        "elevenlabs",
        """
        import base64, json
        from elevenlabs.client import ElevenLabs
        from elevenlabs.types import VoiceSettings

        client = ElevenLabs(api_key="none", base_url=URL)
        pieces = getattr(client.text_to_speech, METHOD)(
            "slt", text=TEXT, model_id="eleven_multilingual_v2", output_format="mp3_44100_128",
            voice_settings=VoiceSettings(stability=0.5, speed=1.0), seed=4,
        )
        print(json.dumps(base64.b64encode(b"".join(pieces)).decode()))
        """,
        TEXT=TEXT,
        URL=server.url,
        METHOD=method,
    )
    check_speech(as_samples(base64.b64decode(data)), 44_100)


@pytest.mark.parametrize("method", ["convert_with_timestamps", "stream_with_timestamps"])
def test_speech_with_the_times_of_its_characters(server, python, method):
    data, characters, starts, ends = python(
        "elevenlabs",
        """
        import base64, json
        from elevenlabs.client import ElevenLabs

        client = ElevenLabs(api_key="none", base_url=URL)
        found = getattr(client.text_to_speech, METHOD)(
            "slt", text=TEXT, output_format="pcm_24000", seed=4
        )
        chunks = list(found) if METHOD.startswith("stream") else [found]
        data = b"".join(base64.b64decode(chunk.audio_base_64) for chunk in chunks)
        timed = [chunk.alignment for chunk in chunks if chunk.alignment]
        names = "characters", "character_start_times_seconds", "character_end_times_seconds"
        lists = [[x for each in timed for x in getattr(each, name)] for name in names]
        print(json.dumps([base64.b64encode(data).decode(), *lists]))
        """,
        TEXT=TEXT,
        URL=server.url,
        METHOD=method,
    )
    audio = np.frombuffer(base64.b64decode(data), "<i2").astype(np.float32) / 32768
    check_speech(audio)
    assert "".join(characters) == TEXT
    assert starts == sorted(starts)
    assert all(start <= end for start, end in zip(starts, ends, strict=True))
    assert len(audio) / 24_000 - 1 < ends[-1] <= len(audio) / 24_000


def test_voices_and_errors(server, python):
    names, status, detail = python(
        "elevenlabs",
        """
        import json
        from elevenlabs.client import ElevenLabs
        from elevenlabs.core.api_error import ApiError

        client = ElevenLabs(api_key="none", base_url=URL)
        names = [voice.voice_id for voice in client.voices.get_all().voices]
        assert names == [voice.voice_id for voice in client.voices.search().voices]
        try:
            list(client.text_to_speech.convert("slt", text="a" * 10_001))
        except ApiError as error:
            print(json.dumps([names, error.status_code, error.body["detail"]["status"]]))
        """,
        URL=server.url,
    )
    assert {"rms", "slt"} <= set(names)
    assert (status, detail) == (400, "text_too_long")
