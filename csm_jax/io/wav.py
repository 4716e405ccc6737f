"""Heads of WAV files: of streams, whose length is not known, and of files that recorders leave."""

import struct

from csm_jax.errors import InputError

# Chunks that may follow the samples: directly behind an empty head, they say that it has none.
_AFTER = {b"LIST", b"id3 ", b"ID3 ", b"bext", b"cue ", b"fact", b"smpl", b"iXML", b"_PMX", b"JUNK"}
_MAX_CHUNKS = 1000


def wav_header(sample_rate: int) -> bytes:
    """The header of a wav file of 16-bit mono samples whose length is not known yet.

    It has the largest possible lengths, which players take for "until it ends" (as ffmpeg and sox
    write and read it).
    """
    unknown = 0xFFFFFFFF
    audio_format = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    riff = struct.pack("<4sI4s", b"RIFF", unknown, b"WAVE")
    return riff + audio_format + struct.pack("<4sI", b"data", unknown)


def whole_wav(data: bytes, name: str) -> bytes:
    """A WAV file with the length of its samples in its head; any other bytes unchanged.

    Recorders and pipes leave 0 there, and the samples go on to the end of the file, as ffmpeg reads
    it; libsndfile reads none of them.

    Args:
      name: what errors call it.

    Raises:
      InputError: another file comes after it, which libsndfile leaves out without a word.
    """
    if data[:4] == b"RF64" and data[12:16] == b"ds64":
        return _whole_rf64(data)
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE" or (at := _find_samples(data)) is None:
        return data
    size, left = int.from_bytes(data[at - 4 : at], "little"), len(data) - at
    if size == 0 and data[at : at + 4] not in _AFTER | {b""}:
        head = bytearray(data[:at])
        head[4:8] = struct.pack("<I", min(len(data) - 8, 0xFFFFFFFF))
        head[-4:] = struct.pack("<I", min(left, 0xFFFFFFFF))
        return bytes(head) + data[at:]
    behind = at + size + size % 2
    if data[behind : behind + 4] == b"RIFF" and data[behind + 8 : behind + 12] == b"WAVE":
        raise InputError(
            f"{name}: a second WAV file begins at byte {behind}; split them, or join their samples"
        )
    return data


def _whole_rf64(data: bytes) -> bytes:
    """The same of a file with lengths of 64 bits: of the file, and then of the samples."""
    at = _find_samples(data)
    if at is None or int.from_bytes(data[28:36], "little") not in (0, 2**64 - 1):
        return data
    return data[:20] + struct.pack("<QQ", len(data) - 8, len(data) - at) + data[36:]


def _find_samples(data: bytes) -> int | None:
    """The place of the first sample; None if there is no such chunk."""
    at = 12
    for _ in range(_MAX_CHUNKS):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 > len(data):
            return None
        if data[at : at + 4] == b"data":
            return at + 8
        at += 8 + size + size % 2
    return None
