"""Recordings of phones and browsers: the samples are ffmpeg's, and only the bytes are opened."""

import errno
import io
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from csm_jax.errors import InputError
from csm_jax.io import av_decoder, compressed
from csm_jax.io.audio import load_audio
from csm_jax.io.compressed import decode_compressed, find_demuxer
from csm_jax.serve.audio.decoding import check_head, decode_recording
from csm_jax.serve.settings import Limits

RATE = 24_000
# Container, codec and rate of what recorders write.
KINDS = {
    "iPhone, Mac (m4a)": ("ipod", "aac", 44_100),
    "Safari, video (mp4)": ("mp4", "aac", 48_000),
    "QuickTime (mov)": ("mov", "aac", 48_000),
    "Apple Lossless (m4a)": ("ipod", "alac", 44_100),
    "Chrome, Firefox (webm)": ("webm", "libopus", 48_000),
    "Android (aac)": ("adts", "aac", 16_000),
    "Opus in mp4": ("mp4", "libopus", 48_000),
    "phones of 3G (amr)": ("amr", "libopencore_amrnb", 8_000),
    "phones of 3G (3gp)": ("3gp", "libopencore_amrnb", 8_000),
}


def encode(
    container: str, codec: str, rate: int, channels: int = 1, seconds: float = 1.0, **options
):
    """The bytes of a tone of 440 Hz with an amplitude of 0.5."""
    file = io.BytesIO()
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
    with av.open(file, "w", format=container, options=options) as written:
        stream = written.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(
            np.tile(wave.astype(np.float32), (channels, 1)), format="fltp", layout=layout
        )
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            written.mux(packet)
    return file.getvalue()


def peak_frequency(samples: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.argmax(spectrum) * rate / len(samples)


# AMR is mono, and its level is not as exact as that of other codecs.
@pytest.mark.parametrize(
    ("kind", "channels"),
    [(kind, n) for kind in KINDS for n in (1, 2) if n == 1 or "3G" not in kind],
)
def test_a_recording_has_its_length_pitch_and_level(kind, channels, tmp_path):
    data = encode(*KINDS[kind], channels)
    (tmp_path / "a.bin").write_bytes(data)
    for audio in (load_audio(tmp_path / "a.bin", RATE), decode_recording(data, Limits())):
        assert audio.dtype == np.float32
        assert len(audio) == pytest.approx(RATE, abs=0.1 * RATE)
        assert peak_frequency(audio, RATE) == pytest.approx(440, abs=2)
        middle = audio[RATE // 4 : RATE // 2]
        assert np.sqrt(np.mean(middle**2)) == pytest.approx(
            0.5 / np.sqrt(2), rel=0.2 if "3G" in kind else 0.05
        )


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
@pytest.mark.parametrize("kind", KINDS)
def test_the_samples_are_those_of_the_ffmpeg_command(kind, tmp_path):
    """Also their number: the delay of the encoder is left out."""
    (tmp_path / "a.bin").write_bytes(encode(*KINDS[kind]))
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.bin", "-f", "f32le", "-"]
    wanted = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, "<f4")
    found, rate = decode_compressed((tmp_path / "a.bin").read_bytes(), "a")
    assert rate == KINDS[kind][2]
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def decoded_or_refused(data: bytes, limits: Limits) -> np.ndarray | None:
    """The recording, or None after a message of one line that has no object in it."""
    messages = []
    try:
        return decode_recording(data, limits)
    except InputError as error:
        messages.append(str(error))
    assert not any(part in messages[0] for part in ("\n", "0x", "BytesIO"))
    return None


def loaded_or_refused(path: Path) -> np.ndarray | None:
    try:
        return load_audio(path, RATE)
    except InputError:
        return None


M4A = encode("ipod", "aac", 44_100)
FRAGMENTED = encode("mp4", "aac", 44_100, movflags="frag_keyframe+empty_moov")
WEBM = encode("webm", "libopus", 48_000)
ADTS = encode("adts", "aac", 44_100)
FILES = [M4A, FRAGMENTED, WEBM, ADTS]


def test_a_fragmented_file_is_read():
    assert len(decode_recording(FRAGMENTED, Limits())) == pytest.approx(RATE, rel=0.1)


def test_the_limits_of_requests_apply():
    with pytest.raises(InputError, match=r"longer than 0\.5 s"):
        decode_recording(M4A, Limits(audio_seconds=0.5))
    with pytest.raises(InputError, match="more than 100 bytes"):
        decode_recording(WEBM, Limits(audio_bytes=100))
    with pytest.raises(InputError, match=r"longer than 0\.5 s"):
        check_head(ADTS, Limits(audio_seconds=0.5))
    check_head(M4A, Limits())


def test_a_recording_that_is_too_short_is_refused():
    with pytest.raises(InputError, match="24 samples last"):
        decode_recording(encode("ipod", "alac", 44_100, seconds=0.001), Limits())


@pytest.mark.parametrize("data", FILES)
def test_a_cut_recording_is_read_as_far_as_it_goes_or_is_one_line(data):
    for end in (16, len(data) // 2, len(data) - 7):
        audio = decoded_or_refused(data[:end], Limits())
        assert audio is None or 0 < len(audio) <= 1.1 * RATE


# Tables of entries for every packet that a few bytes can make as large as memory.
TABLES = [(b"stsz", 8), (b"stts", 8)]


@pytest.mark.parametrize(("table", "offset"), TABLES)
def test_tables_that_describe_too_many_packets_are_not_read(table, offset, monkeypatch):
    data = bytearray(M4A)
    at = data.index(table) + 4 + offset
    data[at : at + 4] = (0x7FFFFFFF).to_bytes(4)
    monkeypatch.setattr(av, "open", None)
    with pytest.raises(InputError, match="its tables describe"):
        decode_recording(bytes(data), Limits())


def test_fragments_that_describe_too_many_packets_are_not_read(monkeypatch):
    data = bytearray(FRAGMENTED)
    at = data.index(b"trun") + 8
    data[at : at + 4] = (0x7FFFFFFF).to_bytes(4)
    monkeypatch.setattr(av, "open", None)
    with pytest.raises(InputError, match="its tables describe"):
        decode_recording(bytes(data), Limits())


def test_a_compressed_head_is_not_read(monkeypatch):
    monkeypatch.setattr(av, "open", None)
    with pytest.raises(InputError, match="its head is compressed"):
        decode_recording(M4A.replace(b"mvhd", b"cmov"), Limits())


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_vorbis_in_webm_is_refused(tmp_path):
    """Its heads can unpack to gigabytes, and are not checked here as those in Ogg are."""
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE), RATE)
    command = ["ffmpeg", "-v", "error", "-i", "a.wav", "-c:a", "libvorbis", "a.webm"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(InputError, match="codec vorbis is not read"):
        decode_recording((tmp_path / "a.webm").read_bytes(), Limits())


def test_a_codec_that_recorders_do_not_use_is_refused():
    with pytest.raises(InputError, match=r"codec mp2.* is not read"):
        decode_recording(encode("matroska", "mp2", 48_000), Limits())


def external_reference(path: Path) -> bytes:
    """An m4a file of zeros that says its samples are in another file, by an alias of QuickTime."""
    target = str(path).encode() + b"\0" * (len(str(path)) % 2)
    alias = b"alis" + bytes(4 + 150) + (2).to_bytes(2) + len(target).to_bytes(2) + target
    alias += b"\xff\xff\0\0"
    entry = (len(alias) + 4).to_bytes(4) + alias
    data = bytearray(M4A)
    at, samples = data.index(b"dref") - 4, data.index(b"mdat") + 4
    assert samples < at, "the samples come first, so that their places do not change"
    data[samples : data.index(b"moov") - 4] = bytes(data.index(b"moov") - 4 - samples)
    size = int.from_bytes(data[at : at + 4])
    box = (16 + len(entry)).to_bytes(4) + b"dref" + (0).to_bytes(4) + (1).to_bytes(4) + entry
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        place = data.index(name) - 4
        grown = int.from_bytes(data[place : place + 4]) + len(box) - size
        data[place : place + 4] = grown.to_bytes(4)
    return bytes(data[:at] + box + data[at + size :])


def test_other_files_are_not_opened(tmp_path):
    """ffmpeg follows a reference if it is asked to."""
    (tmp_path / "other.m4a").write_bytes(M4A)
    data = external_reference(tmp_path / "other.m4a")
    (tmp_path / "a.m4a").write_bytes(data)
    options = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(str(tmp_path / "a.m4a"), options=options) as container:
        followed = [frame.to_ndarray() for frame in container.decode(audio=0)]
    assert max(np.abs(frame).max() for frame in followed) > 0.4
    for audio in (decoded_or_refused(data, Limits()), loaded_or_refused(tmp_path / "a.m4a")):
        assert audio is None or np.abs(audio).max() < 0.01


@pytest.mark.parametrize(
    "data", [b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", b"ffconcat version 1.0\nfile /etc/passwd\n"]
)
def test_playlists_are_no_recordings(data):
    assert find_demuxer(data) is None
    with pytest.raises(InputError, match="not readable as audio"):
        decode_recording(data, Limits())


# What a decoder may do in place of decoding, and what its caller is told.
FAILURES = {
    "raise ModuleNotFoundError(\"No module named 'av'\")": "pip install av",
    "import os; os.kill(os.getpid(), 11)": "its decoder ended with -11",
    "raise RuntimeError('anything')": "its decoder ended with 1",
}


@pytest.mark.parametrize("code", FAILURES)
def test_a_decoder_that_fails_or_crashes_is_one_line(tmp_path, monkeypatch, code):
    (tmp_path / "av.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InputError, match=FAILURES[code]) as caught:
        decode_recording(M4A, Limits())
    assert "\n" not in str(caught.value)


def test_a_decoder_that_does_not_end_is_ended(tmp_path, monkeypatch):
    (tmp_path / "av.py").write_text("while True: pass")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(compressed, "_TIMEOUT", 0)
    with pytest.raises(InputError, match="TimeoutExpired"):
        decode_recording(M4A, Limits(audio_seconds=0.5))


# What the process that decodes can do no more, and the error of the system.
FORBIDDEN = {
    "open('/etc/passwd')": OSError(errno.EMFILE, ""),
    "__import__('socket').socket()": OSError(errno.EMFILE, ""),
    "os.pipe()": OSError(errno.EMFILE, ""),
    "bytearray(1 << 31)": MemoryError(),
}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have fewer limits")
@pytest.mark.parametrize("code", FORBIDDEN)
def test_the_process_that_decodes_is_confined(code):
    wanted = FORBIDDEN[code]
    program = [
        "import os, runpy, socket",
        f"program = runpy.run_path({av_decoder.__file__!r})",
        code.replace("1 << 31", "1"),
        "program['confine'](1000, 60.0)",
        f"try: {code}",
        "except Exception as error: print(type(error).__name__, getattr(error, 'errno', None))",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)], capture_output=True, text=True
    )
    assert done.stdout.split() == [type(wanted).__name__, str(getattr(wanted, "errno", None))]


@st.composite
def damaged(draw) -> bytes:
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 20))] = draw(st.binary(max_size=20))
    return bytes(data)


HEADS = [b"\0\0\0\x20ftyp", b"\x1a\x45\xdf\xa3", b"\xff\xf1", b"#!AMR\n"]


@settings(max_examples=40, deadline=None)  # a process each
@given(st.one_of(damaged(), st.builds(bytes.__add__, st.sampled_from(HEADS), st.binary())))
@example(HEADS[0])
def test_any_bytes_give_samples_or_an_input_error(data):
    audio = decoded_or_refused(data, Limits(audio_seconds=2.0))
    if audio is not None:
        assert audio.dtype == np.float32
        assert np.isfinite(audio).all()
        assert 0 < len(audio) <= 2.02 * RATE
