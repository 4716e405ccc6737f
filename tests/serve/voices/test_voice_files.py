"""Voices in files: invalid ones are skipped and logged, and do not prevent the start."""

import logging
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from csm_jax.errors import InputError
from csm_jax.serve.settings import Limits
from csm_jax.serve.voices.files import read_voices

LIMITS = Limits(text_characters=100, audio_seconds=2.0, audio_bytes=500_000)


@pytest.fixture
def voices(tmp_path) -> Path:
    """A directory with a valid voice."""
    directory = tmp_path / "voices"
    directory.mkdir()
    add(directory, "good")
    return directory


def tone(seconds: float = 0.5, level: float = 0.1) -> np.ndarray:
    return level * np.sin(np.arange(round(seconds * 24_000)) / 10)


def add(directory: Path, name: str, text: str | bytes = "hello", audio=None, **more) -> Path:
    path = directory / f"{name}.wav"
    soundfile.write(path, tone() if audio is None else audio, 24_000, **more)
    data = text.encode() if isinstance(text, str) else text
    path.with_suffix(".txt").write_bytes(data)
    return path


def a_pipe(directory: Path) -> None:
    os.mkfifo(directory / "bad.wav")
    (directory / "bad.txt").write_text("hello")


def a_pipe_as_transcript(directory: Path) -> None:
    add(directory, "bad").with_suffix(".txt").unlink()
    os.mkfifo(directory / "bad.txt")


def a_link_that_loops(directory: Path) -> None:
    (directory / "bad.wav").symlink_to(directory / "bad.wav")
    (directory / "bad.txt").write_text("hello")


def a_link_out(directory: Path) -> None:
    shutil.move(add(directory, "bad"), directory.parent / "bad.wav")
    (directory / "bad.wav").symlink_to(directory.parent / "bad.wav")


def a_transcript_that_is_a_link_out(directory: Path) -> None:
    path = add(directory, "bad").with_suffix(".txt")
    shutil.move(path, directory.parent / "bad.txt")
    path.symlink_to(directory.parent / "bad.txt")


def a_device(directory: Path) -> None:
    (directory / "bad.wav").symlink_to("/dev/zero")
    (directory / "bad.txt").write_text("hello")


def a_directory(directory: Path) -> None:
    (directory / "bad.wav").mkdir()
    (directory / "bad.txt").write_text("hello")


def a_huge_file(directory: Path) -> None:
    path = add(directory, "bad")
    os.truncate(path, 10**12)


def a_huge_transcript(directory: Path) -> None:
    os.truncate(add(directory, "bad").with_suffix(".txt"), 10**12)


BAD_TEXTS = {
    "empty": b"",
    "of space": b" \n\t ",
    "a speaker only": b"speaker: 1\n",
    "Latin-1": "fünf".encode("latin-1"),
    "UTF-16": "hello".encode("utf-16"),
    "too long": b"a" * 101,
    "a speaker of 5000 digits": b"speaker: " + b"9" * 5000 + b"\nhello",
    "a speaker that is too large": b"speaker: 2147483648\nhello",
    "a negative speaker": b"speaker: -1\nhello",
}
BAD_AUDIO = {
    "silent": np.zeros(12_000),
    "of one sample": np.full(1, 0.5),
    "too long": tone(3.0),
    "of amplitude 1e38": tone(level=1e38).astype(np.float32),
    "not finite": np.where(np.arange(12_000) == 100, np.nan, tone()).astype(np.float32),
}
BAD_FILES = [
    a_pipe,
    a_pipe_as_transcript,
    a_link_that_loops,
    a_link_out,
    a_transcript_that_is_a_link_out,
    a_device,
    a_directory,
    a_huge_file,
    a_huge_transcript,
]


def check(directory: Path, caplog) -> None:
    """The valid voice is read, and one log line says why the other is not."""
    with caplog.at_level(logging.WARNING):
        assert [voice.name for voice in read_voices(directory, LIMITS)] == ["good"]
    assert len(caplog.records) == 1
    assert "bad" in caplog.text
    assert "\n" not in caplog.records[0].getMessage()


@pytest.mark.parametrize("text", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_a_bad_transcript_is_skipped(voices, caplog, text):
    add(voices, "bad", text)
    check(voices, caplog)


@pytest.mark.parametrize("audio", BAD_AUDIO.values(), ids=BAD_AUDIO)
def test_a_bad_recording_is_skipped(voices, caplog, audio):
    add(voices, "bad", audio=audio, subtype="FLOAT")
    check(voices, caplog)


@pytest.mark.parametrize("make", BAD_FILES)
def test_a_bad_file_is_skipped(voices, caplog, make):
    make(voices)
    check(voices, caplog)


def test_a_recording_without_speech_is_skipped(voices, caplog):
    add(voices, "bad").write_bytes(np.random.default_rng(0).bytes(10_000))
    check(voices, caplog)


@pytest.mark.parametrize("name", [".wav", "._good.wav", "a.exe"])
def test_hidden_and_other_files_are_skipped(voices, name, caplog):
    shutil.copy(voices / "good.wav", voices / name)
    assert [voice.name for voice in read_voices(voices, LIMITS)] == ["good"]
    assert not caplog.records


@pytest.mark.parametrize("name", ["-a", "a\nb", "a ", "a" * 65, "a(1)", "\u202ea", "_"])
def test_a_file_with_an_invalid_name_is_skipped(voices, name, caplog):
    add(voices, name)
    assert [voice.name for voice in read_voices(voices, LIMITS)] == ["good"]
    [record] = caplog.records
    assert "cannot be called" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("Mary Jane", "Mary Jane"),
        ("anna.v2", "anna.v2"),
        ("zoë", "zoë"),
        ("zoe\u0308", "zoë"),  # as Apple's file systems write it
        ("हिन्दी", "हिन्दी"),
        ("小明", "小明"),
        ("7", "7"),
    ],
)
def test_names_of_people_are_names_of_voices(voices, file, name):
    add(voices, file, "speaker: 2\nhello")
    [voice] = [voice for voice in read_voices(voices, LIMITS) if voice.name != "good"]
    assert (voice.name, voice.speaker, voice.text) == (name, 2, "hello")


def test_a_second_recording_of_a_name_is_skipped(voices, caplog):
    soundfile.write(voices / "good.flac", tone(0.7), 24_000)
    [voice] = read_voices(voices, LIMITS)
    assert len(voice.audio) == round(0.7 * 24_000)
    assert "good.flac has the same name" in caplog.text


def test_a_recording_without_a_transcript_is_used_and_logged(voices, caplog):
    add(voices, "anna").with_suffix(".txt").unlink()
    assert [(each.name, each.text) for each in read_voices(voices, LIMITS)] == [
        ("anna", ""),
        ("good", "hello"),
    ]
    assert "anna.txt' is missing" in caplog.text


def test_a_byte_order_mark_is_not_part_of_the_transcript(voices):
    add(voices, "good", "\ufeffspeaker: 3\r\nhello".encode())
    [voice] = read_voices(voices, LIMITS)
    assert (voice.speaker, voice.text) == (3, "hello")


def test_a_link_inside_the_directory_is_followed(voices):
    """Kubernetes mounts files of a ConfigMap in this way."""
    (voices / "..data").mkdir()
    for suffix in (".wav", ".txt"):
        shutil.move(voices / f"good{suffix}", voices / "..data" / f"good{suffix}")
        (voices / f"good{suffix}").symlink_to(Path("..data") / f"good{suffix}")
    assert [voice.name for voice in read_voices(voices, LIMITS)] == ["good"]


def test_a_file_that_cannot_be_opened_is_skipped(voices, caplog, monkeypatch):
    path = add(voices, "bad")
    before = os.open

    def refuse(name, *arguments, **named):
        if Path(name) == path:
            raise PermissionError(13, "Permission denied", str(path))
        return before(name, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)
    check(voices, caplog)


@pytest.mark.parametrize("make", [Path.touch, lambda path: None])
def test_a_missing_directory_is_refused(tmp_path, make):
    make(tmp_path / "voices")
    with pytest.raises(InputError, match="cannot be read"):
        list(read_voices(tmp_path / "voices", LIMITS))


NAMES = ["Mary Jane", "anna.v2", "zoë", "李雷", "a", "x" * 64]


@pytest.mark.parametrize("name", NAMES)
def test_a_voice_has_the_name_of_its_file(voices, name):
    add(voices, name, text=f"I am {name}.")
    found = {voice.name: voice.text for voice in read_voices(voices, LIMITS)}
    assert found == {"good": "hello", name: f"I am {name}."}


def test_a_decomposed_name_is_the_composed_one(voices):
    """macOS stores a diaeresis as a character of its own."""
    add(voices, unicodedata.normalize("NFD", "zoë"))
    assert [voice.name for voice in read_voices(voices, LIMITS)] == ["good", "zoë"]


TOLD = ["-a.wav", "a\nb.wav", "a,b.wav", "a|b.wav", "a\u200bb.wav", "a .wav", "y" * 65 + ".wav"]
TOLD += ["O'Neil (older).wav", "50% slower.wav", "a.aiff", "a.wma", "a.AU"]


@pytest.mark.parametrize("name", TOLD)
def test_a_recording_that_is_no_voice_is_told_of(voices, caplog, name):
    shutil.copy(voices / "good.wav", voices / name)
    (voices / name).with_suffix(".txt").write_text("hello")
    with caplog.at_level(logging.WARNING):
        assert [voice.name for voice in read_voices(voices, LIMITS)] == ["good"]
    (record,) = caplog.records
    assert "is left out" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("name", ["._good.wav", ".hidden.wav", "README.md", "notes.json"])
def test_files_that_are_not_meant_as_voices_are_passed_over(voices, caplog, name):
    shutil.copy(voices / "good.wav", voices / name)
    with caplog.at_level(logging.WARNING):
        assert [voice.name for voice in read_voices(voices, LIMITS)] == ["good"]
    assert not caplog.records


def test_of_two_files_of_one_name_the_second_is_told_of(voices, caplog):
    soundfile.write(voices / "good.flac", tone(), 24_000)
    with caplog.at_level(logging.WARNING):
        assert [voice.name for voice in read_voices(voices, LIMITS)] == ["good"]
    (record,) = caplog.records
    assert "good.flac has the same name" in record.getMessage()
