"""Recordings of phones and browsers, in formats that libsndfile has not: m4a, mp4, webm, aac, ...

ffmpeg's libraries (PyAV) decode them, within these limits, since anyone may send one:
 - The first bytes decide the demuxer, so that none can be chosen that reads lists of other files.
 - Nothing but the given bytes is opened: no file, no URL.
 - Only the codecs that such recorders use are decoded; Vorbis is not, whose heads can unpack to
   gigabytes.
 - Tables of an MP4 file that describe more packets than recordings have are refused unread, because
   ffmpeg allocates an entry for each.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

from csm_jax.errors import InputError
from csm_jax.io import av_decoder

SUFFIXES = (".m4a", ".mp4", ".mov", ".3gp", ".webm", ".aac", ".amr")
_MP4, _MATROSKA, _ADTS, _AMR = "mov", "matroska", "aac", "amr"
# The first box of an MP4 file; older ones begin with other boxes.
_BOX = re.compile(rb".{4}(ftyp|moov|mdat|wide|free|skip|pnot)", re.DOTALL)
# Seconds that decoding may take beside one for each of the recording.
_TIMEOUT = 60
# Over an hour of packets of 21 ms; there are entries for each in several tables.
_MAX_PACKETS = 200_000
_MAX_BOXES = 100_000
# Tables whose entries stand for many packets each, and compressed heads.
_TABLES = re.compile(rb"stsz|stz2|stts|ctts|trun|cmov")


def find_demuxer(data: bytes) -> str | None:
    """ffmpeg's name for the container of a recording; None for what is not decoded here."""
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return _MATROSKA
    if data.startswith(b"#!AMR"):
        return _AMR
    # 12 bits of synchronization, and the layer, whose bits are those of MP3 otherwise.
    if len(data) > 1 and data[0] == 0xFF and data[1] & 0xF6 == 0xF0:
        return _ADTS
    return _MP4 if _BOX.match(data) else None


def decode_compressed(
    data: bytes, name: str, max_seconds: float = math.inf
) -> tuple[np.ndarray, int]:
    """Decodes a recording that `find_demuxer` knows to mono float32 [num_samples], and its rate.

    Args:
      name: what errors call it.

    Raises:
      InputError: it cannot be decoded, is longer than `max_seconds`, or PyAV is missing.
    """
    demuxer = find_demuxer(data)
    if demuxer is None:
        raise ValueError(f"{name}: not in a container that is decoded here")
    if demuxer == _MP4:
        # A user's own file may be long, but its packets are not shorter than a byte.
        _check_tables(data, name, len(data) if max_seconds == math.inf else _MAX_PACKETS)
    done = _run(data, demuxer, name, max_seconds)
    last = (done.stderr.decode(errors="replace").splitlines() or [""])[-1]
    if done.returncode == 0 and last.isdecimal():
        return np.frombuffer(done.stdout, np.float32), int(last)
    if done.returncode == av_decoder.REFUSED:
        raise InputError(f"{name}: {last}")
    if last.startswith(("ModuleNotFoundError", "ImportError")):
        raise InputError(
            f"{name}: PyAV reads this format, and is missing: pip install av, or convert the "
            "recording to wav"
        )
    raise InputError(_failed(name, f"its decoder ended with {done.returncode}"))


def _run(
    data: bytes, demuxer: str, name: str, max_seconds: float
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-P", av_decoder.__file__, demuxer, str(max_seconds)]
    try:
        return subprocess.run(  # noqa: S603, its arguments are those of this module
            command,
            input=data,
            capture_output=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # threads take memory
            timeout=None if max_seconds == math.inf else _TIMEOUT + max_seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(_failed(name, type(error).__name__)) from error


def _failed(name: str, reason: str) -> str:
    return f"{name}: not readable as audio ({reason}); convert it to wav, flac, mp3, ogg or opus"


def _check_tables(data: bytes, name: str, most: int) -> None:
    """Raises `InputError` for an MP4 file whose heads describe too many packets."""
    num_packets = 0
    for head in _heads(data, name):
        for found in _TABLES.finditer(data, *head):
            if found[0] == b"cmov":
                raise InputError(f"{name}: its head is compressed; convert it to wav")
            num_packets += _count(data, found[0], found.end())
    if num_packets > most:
        raise InputError(
            f"{name}: its tables describe {num_packets} packets, and at most {most} are "
            "read; convert it to wav, or cut it"
        )


def _heads(data: bytes, name: str) -> Iterator[tuple[int, int]]:
    """Start and end of the boxes of an MP4 file that are not its samples."""
    start, num_boxes = 0, 0
    while start + 8 <= len(data):
        size, kind = int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
        if size == 1:
            size = int.from_bytes(data[start + 8 : start + 16])
        end = start + size if size >= 8 else len(data)  # 0 is the rest of the file
        if kind != b"mdat":
            yield start, min(end, len(data))
        start, num_boxes = end, num_boxes + 1
        if num_boxes > _MAX_BOXES:
            raise InputError(f"{name}: more than {_MAX_BOXES} boxes; convert it to wav")


def _count(data: bytes, kind: bytes, start: int) -> int:
    """How many packets a table describes, at least; `start` is behind its name."""

    def number(offset: int) -> int:
        return int.from_bytes(data[start + offset : start + offset + 4])

    if kind in (b"stsz", b"stz2"):  # version and flags, a size, a count
        return number(8)
    if kind == b"trun":  # version and flags, a count
        return number(4)
    entries = min(number(4), (len(data) - start) // 8)
    counts = np.frombuffer(data, ">u4", 2 * entries, start + 8)[::2] if entries else np.zeros(0)
    return int(counts.sum(dtype=np.uint64))
