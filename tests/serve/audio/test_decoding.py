"""Recordings in requests: limits, and `InputError` for anything that cannot be decoded."""

import base64
import contextlib
import io
import time
import tracemalloc

import numpy as np
import pytest
import soundfile
from attacks import vorbis
from hypothesis import example, given, settings
from hypothesis import strategies as st

from csm_jax.errors import InputError
from csm_jax.serve.audio.decoding import check_head, decode_base64, decode_recording
from csm_jax.serve.settings import Limits

LIMITS = Limits(audio_bytes=100_000, audio_seconds=2.0)
RATE = 24_000


def tone(seconds: float, rate: int = RATE, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * 220 * np.arange(int(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def as_file(samples: np.ndarray, rate: int = RATE, form: str = "WAV", coding=None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=coding)
    return file.getvalue()


@pytest.mark.parametrize(
    ("form", "coding"),
    [("WAV", None), ("FLAC", None), ("OGG", "OPUS"), ("OGG", "VORBIS"), ("MP3", None)],
)
@pytest.mark.parametrize(("rate", "channels"), [(24_000, 1), (48_000, 2), (8_000, 1)])
def test_every_format_rate_and_channel_count_is_decoded(form, coding, rate, channels):
    data = as_file(tone(1, rate, channels), rate, form, coding)
    audio = decode_recording(data, Limits(audio_seconds=2.0))
    assert audio.dtype == np.float32
    assert len(audio) == pytest.approx(RATE, rel=0.1)
    assert np.sqrt(np.mean(audio**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.1)


@pytest.mark.parametrize("form", ["AU", "AIFF", "CAF", "W64", "RF64", "VOC", "MAT5", "SDS", "NIST"])
def test_rare_formats_are_refused_before_libsndfile_opens_them(form, monkeypatch):
    data = as_file(tone(0.3), form=form)
    monkeypatch.setattr(soundfile, "SoundFile", None)
    with pytest.raises(InputError, match="send WAV, FLAC, Ogg or MP3"):
        decode_recording(data, LIMITS)


TAG = b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10)


@pytest.mark.parametrize("form", ["AU", "AIFF", "WAV"])
def test_rare_formats_behind_a_tag_are_refused_before_libsndfile_opens_them(form, monkeypatch):
    data = TAG + as_file(tone(0.3), form=form)
    assert soundfile.info(io.BytesIO(data)).frames
    monkeypatch.setattr(soundfile, "SoundFile", None)
    with pytest.raises(InputError, match="send WAV, FLAC, Ogg or MP3"):
        decode_recording(data, LIMITS)


@pytest.mark.parametrize("form", ["MP3", "FLAC"])
def test_a_recording_can_have_tags(form):
    assert len(decode_recording(TAG + as_file(tone(0.3), form=form), LIMITS)) > 0.2 * RATE


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not readable"),
        (b"RIFF", "not readable"),
        (b"x" * 100_001, "more than 100000 bytes"),
        (as_file(tone(2.5, 8000), 8000), "longer than 2 s"),
        (as_file(tone(0.1, channels=9)), "9 channels"),
        (as_file(tone(0.1, 1000), 1000), "1000 Hz"),
        (as_file(np.zeros((0, 1), np.float32)), "no samples"),
        (as_file(np.full((1, 1), 0.5, np.float32)), "silent"),
        (as_file(np.array([[0.5], [-0.5]], np.float32)), "2 samples last"),
        (as_file(tone(0.09)), "at least 0.1 s"),
        (as_file(np.zeros((RATE, 1), np.float32)), "silent"),
        (as_file(9e-4 * tone(1)), "silent"),
        (as_file(tone(1) * 32768, coding="FLOAT"), "divide by 32768"),
        (as_file(2e38 * tone(1), coding="FLOAT"), "a peak of 1e\\+38"),
        (as_file(np.full((4000, 2), 3e38, np.float32), coding="FLOAT"), "not finite|a peak of"),
        (as_file(np.full((RATE, 1), np.inf, np.float32), coding="FLOAT"), "not finite"),
        (as_file(np.zeros((99, 1), np.float32)), "silent"),
        (as_file(np.full((9999, 1), 0.5, np.float32)), "silent"),
        (as_file(np.full((99, 1), np.nan, np.float32), coding="FLOAT"), "not finite"),
    ],
)
def test_errors_say_why_a_recording_cannot_be_used(data, message):
    with pytest.raises(InputError, match=message):
        decode_recording(data, LIMITS)


@pytest.mark.parametrize("data", [b"", b"RIFF", b"x" * 1000, as_file(tone(1))[:40]])
def test_messages_contain_no_memory_addresses(data):
    for read in (decode_recording, check_head):
        with pytest.raises(InputError) as error:
            read(data, LIMITS)
        assert "0x" not in str(error.value)
        assert "BytesIO" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"RIFF", "not readable"),
        (as_file(tone(2.5, 8000), 8000), "longer than 2 s"),
        (as_file(tone(0.1, channels=9)), "9 channels"),
    ],
)
def test_check_head_refuses_unusable_recordings(data, message):
    with pytest.raises(InputError, match=message):
        check_head(data, LIMITS)
    check_head(as_file(tone(1)), LIMITS)


def test_a_small_file_that_unpacks_to_much_takes_little_memory():
    """An hour of silence in a few kilobytes; decoding stops at the limit."""
    data = as_file(np.zeros((3600 * 8000, 1), np.float32), 8000, "FLAC")
    limits = Limits(audio_bytes=10**7, audio_seconds=2.0)
    tracemalloc.start()
    with pytest.raises(InputError, match="longer than 2 s"):
        decode_recording(data, limits)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def assert_no_decoder_opens(data: bytes, monkeypatch) -> None:
    monkeypatch.setattr(soundfile, "SoundFile", None)
    for read in (decode_recording, check_head):
        with pytest.raises(InputError, match="not readable as audio"):
            read(data, LIMITS)


@pytest.mark.parametrize(("books", "bits", "dimensions"), [(256, 22, 1), (1, 18, 2), (2, 10, 200)])
def test_vorbis_codebooks_that_unpack_to_much_are_not_unpacked(
    books, bits, dimensions, monkeypatch
):
    """libvorbis would build 256 tables of 4 million entries from 3 kB."""
    data = vorbis.file(books, bits, dimensions)
    assert len(data) < 4000
    assert_no_decoder_opens(data, monkeypatch)


def test_vorbis_codebooks_are_found_in_the_pages_that_libogg_reads(monkeypatch):
    """A harmless head comes first, which libogg skips."""
    first, comments, harmless = vorbis.head(1, 4)
    bomb = vorbis.page(*vorbis.head(256, 22)[1:], number=1)
    start, good = vorbis.page(first, flags=2), vorbis.page(comments, harmless, number=1)
    wrong = good[:-1] + bytes([good[-1] ^ 1])
    other = vorbis.page(comments, harmless, number=1, serial=2)
    late = vorbis.page(comments, harmless, number=7)
    rest = vorbis.page(comments, harmless, number=1, flags=1)
    for decoy in (wrong, other, late, rest, good[:-20]):
        assert_no_decoder_opens(start + decoy + bomb, monkeypatch)


@pytest.mark.parametrize("coding", ["VORBIS", "OPUS"])
def test_files_with_junk_between_pages_are_refused_before_libogg_opens_them(coding):
    """libogg would compute a checksum at each possible page; junk at the end is cut off."""
    good = as_file(tone(1), form="OGG", coding=coding)
    junk = (b"OggS" + b"\xff" * 23) * 100_000 + bytes(66_000)
    limits = Limits(audio_seconds=2.0)
    started = time.process_time()
    with pytest.raises(InputError, match="not readable as audio"):
        decode_recording(good + junk, limits)
    audio = decode_recording(good + b"x" + junk, limits)
    assert time.process_time() - started < 1
    np.testing.assert_array_equal(audio, decode_recording(good, limits))
    with pytest.raises(InputError, match="20000 pages"):
        check_head(good + vorbis.page() * 20_000, limits)


def test_a_truncated_ogg_file_is_decoded():
    data = as_file(tone(1.5), form="OGG", coding="OPUS")
    assert 0 < len(decode_recording(data[:-10], LIMITS)) < 1.5 * RATE


def test_small_vorbis_codebooks_are_opened():
    data = vorbis.file(3, 8)
    assert soundfile.info(io.BytesIO(data)).subtype == "VORBIS"
    with pytest.raises(InputError, match="no samples"):
        decode_recording(data, LIMITS)


@pytest.mark.parametrize("rate", [8000, 44_100, 48_000, 192_000])
@pytest.mark.parametrize("channels", [1, 2, 6, 8])
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_files_of_encoders_have_small_codebooks(rate, channels, level):
    file = io.BytesIO()
    form = dict(format="OGG", subtype="VORBIS", compression_level=level)
    with contextlib.suppress(soundfile.LibsndfileError):  # unsupported combination
        with soundfile.SoundFile(file, "w", rate, channels, **form) as written:
            written.write(tone(0.2, rate, channels))
        decode_recording(file.getvalue(), Limits())


def test_samples_beyond_the_length_in_the_head_are_counted():
    data = bytearray(as_file(tone(1)))
    data[40:44] = (2**31 - 2).to_bytes(4, "little")
    assert len(decode_recording(bytes(data), LIMITS)) == RATE


@pytest.mark.parametrize("head", ["", "data:audio/wav;base64,", "data:;base64,"])
def test_base64_is_decoded_with_and_without_a_data_uri(head):
    assert decode_base64(head + base64.b64encode(b"abc").decode(), LIMITS) == b"abc"


@pytest.mark.parametrize("text", ["a", "?", "data:audio/wav;base64", "data:audio/wav,abc", "ä"])
def test_invalid_base64_is_refused(text):
    with pytest.raises(InputError):
        decode_base64(text, LIMITS)


def test_the_size_of_base64_is_checked_before_decoding():
    with pytest.raises(InputError, match="more than 100000 bytes"):
        decode_base64("A" * 140_000, LIMITS)


FILES = [
    as_file(tone(0.2), form=form, coding=coding)
    for form, coding in (("WAV", None), ("FLAC", None), ("OGG", "OPUS"), ("MP3", None))
]


@st.composite
def damaged(draw) -> bytes:
    """A recording with changed, removed or inserted bytes."""
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(1, 8))):
        # Most changes are made in the head.
        at = draw(st.integers(0, min(len(data), draw(st.sampled_from([80, 10**6])))))
        size = draw(st.integers(0, 20))
        data[at : at + size] = draw(st.binary(max_size=20))
    return bytes(data)


@settings(max_examples=400, deadline=None)
@given(st.one_of(damaged(), st.binary(max_size=400)))
@example(FILES[0][:44])
@example(FILES[1][:42])
def test_any_bytes_give_samples_or_an_input_error(data):
    try:
        audio = decode_recording(data, LIMITS)
    except InputError:
        return
    assert audio.dtype == np.float32
    assert audio.ndim == 1
    assert np.isfinite(audio).all()
    assert 0 < len(audio) <= LIMITS.audio_seconds * RATE * 1.01


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=100))
def test_any_text_gives_bytes_or_an_input_error(text):
    with contextlib.suppress(InputError):
        assert isinstance(decode_base64(text, LIMITS), bytes)
