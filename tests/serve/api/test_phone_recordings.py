"""Recordings of phones as context: lossless ones give the speech of their FLAC file."""

import base64
import shutil
import subprocess

import pytest
from hearing import median_pitch
from serving import as_samples, same

pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")

# Arguments of the ffmpeg command.
LOSSLESS = {
    "m4a": ["-c:a", "alac", "-f", "ipod"],
    "mov": ["-c:a", "pcm_s16le", "-f", "mov"],
    "mkv": ["-c:a", "flac", "-f", "matroska"],
}
LOSSY = {
    "webm": ["-c:a", "libopus", "-f", "webm"],
    "aac": ["-c:a", "aac", "-f", "adts"],
    "fragmented mp4": ["-c:a", "aac", "-movflags", "frag_keyframe+empty_moov", "-f", "mp4"],
}
FIELDS = {"text": "one two three four", "speaker": 0, "seed": 5}


@pytest.fixture(scope="module")
def convert(recording, tmp_path_factory):
    def converted(arguments: list[str]) -> bytes:
        path = tmp_path_factory.mktemp("recording") / "out"
        command = ["ffmpeg", "-v", "error", "-i", "-", *arguments, str(path)]
        subprocess.run(command, input=recording, check=True)
        return path.read_bytes()

    return converted


def generate(server, transcript: str, recording: bytes, kind: str = "") -> bytes:
    audio = kind + base64.b64encode(recording).decode()
    fields = FIELDS | {"audio_text": transcript, "audio": audio}
    response = server.post("/generate", json=fields)
    assert response.status_code == 200, response.text
    return response.content


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lossless_recording_gives_the_same_speech(server, recording, transcript, convert, name):
    wanted = generate(server, transcript, recording)
    assert same(generate(server, transcript, convert(LOSSLESS[name])), wanted)


@pytest.mark.parametrize("name", LOSSY)
def test_a_recording_gives_the_voice(server, transcript, convert, name):
    """As a data URI, as browsers' MediaRecorder names it; speaker 0 is a woman otherwise."""
    kind = "data:audio/webm;codecs=opus;base64,"
    speech = as_samples(generate(server, transcript, convert(LOSSY[name]), kind))
    assert median_pitch(speech, 24_000) < 130


def test_what_is_no_recording_is_one_line(server, convert):
    """Its head is that of a recording; the rest is not."""
    damaged = convert(LOSSLESS["m4a"])[:200]
    fields = FIELDS | {"audio_text": "a", "audio": base64.b64encode(damaged).decode()}
    response = server.post("/generate", json=fields)
    assert response.status_code == 400
    assert "not readable as audio" in response.text
    assert "0x" not in response.text
