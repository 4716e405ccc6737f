"""Checks the structure of an Ogg file before libogg and libvorbis read it.

A Vorbis file begins with the codebooks of its decoder, and libvorbis builds the tables of all of
them when the file is opened, and sorts each on the stack. A codebook of a few bytes can have four
million entries: that overflows the stack, which ends the process, and many small ones take 13 GB.
So the entries are counted here first.

Between pages libogg searches for the next one byte by byte, and computes a checksum of 64 kB at
each possible beginning, which takes minutes for 10 MB. So only consecutive pages are handed on.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Entries of all codebooks times their dimensions. Encoders write at most 90 000.
MAX_VALUES = 1 << 17
# A minute has 3000 pages of 20 ms.
MAX_PAGES = 20_000
# Limit for the packet with the codebooks. Encoders write a few kB.
_SETUP_BYTES = 65_536
_HEAD = struct.Struct("<4sBBqIIIB")
_CRC_AT, _NO_CRC = 22, bytes(4)
_CONTINUED = 1
_IDENTIFICATION, _SETUP = b"\x01vorbis", b"\x05vorbis"
_CODEBOOK = 0x564342
# The maximum length of code words in bits, which is also that of runs of an ordered codebook.
_LONGEST_CODE = 32
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class OggError(Exception):
    """An Ogg file that must not be decoded, with the reason."""


class _Page(NamedTuple):
    """A page with a valid checksum, which ends at the byte `end` of the file."""

    flags: int
    serial: int
    number: int
    lengths: bytes
    body: bytes
    end: int


def checked_ogg(data: bytes) -> bytes:
    """The file up to its last complete page.

    Raises:
      OggError: a page is damaged, or the codebooks of a Vorbis file are malformed or too large.
    """
    pages = list(_pages(data))
    packets = _packets(pages)
    if next(packets).startswith(_IDENTIFICATION):
        next(packets)  # comments
        _check_codebooks(next(packets))
    return data[: pages[-1].end]


def _pages(data: bytes) -> Iterator[_Page]:
    at, count = 0, 0
    while data.startswith(b"OggS", at) and at + _HEAD.size <= len(data):
        _, version, flags, _, serial, number, crc, num_lengths = _HEAD.unpack_from(data, at)
        body = at + _HEAD.size + num_lengths
        lengths = data[at + _HEAD.size : body]
        end = body + sum(lengths)
        if end > len(data):
            return  # cut off
        if version or _crc(data[at : at + _CRC_AT] + _NO_CRC + data[at + _CRC_AT + 4 : end]) != crc:
            raise OggError("a page of the Ogg file is damaged")
        count += 1
        if count > MAX_PAGES:
            raise OggError(f"the Ogg file has more than {MAX_PAGES} pages")
        yield _Page(flags, serial, number, lengths, data[body:end], end)
        at = end


def _packets(pages: Iterable[_Page]) -> Iterator[bytes]:
    """The packets of the first stream. Raises `OggError` if its pages are not in order.

    Everything that libogg would skip is refused, so that libogg reads the same packets.
    """
    packet, serial = b"", None
    for number, page in enumerate(pages):
        serial = page.serial if serial is None else serial
        is_next = page.serial == serial and page.number == number
        if not is_next or bool(page.flags & _CONTINUED) != bool(packet):
            raise OggError("the pages of the Ogg file are not in order")
        start = 0
        for length in page.lengths:
            packet += page.body[start : start + length]
            start += length
            if length < 255:
                yield packet
                packet = b""
    raise OggError("the head of the Ogg file is not complete")


def _crc(data: bytes) -> int:
    """Ogg's checksum: that of zlib with reversed bits and the initial value 0."""
    crc = zlib.crc32(data.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2)


def _check_codebooks(setup: bytes) -> None:
    if not setup.startswith(_SETUP) or len(setup) > _SETUP_BYTES:
        raise OggError("the Vorbis file has no codebooks, or too large ones")
    bits = _Bits(setup[len(_SETUP) :])
    num_values = 0
    for _ in range(bits.read(8) + 1):
        num_values += _read_codebook(bits, MAX_VALUES - num_values)


class _Bits:
    """Reads the bits of a packet, the lowest of each byte first. Raises `OggError` at its end."""

    def __init__(self, data: bytes):
        self._data = data
        self._at = 0

    def read(self, count: int) -> int:
        start = self._at
        self.skip(count)
        piece = self._data[start >> 3 : (self._at + 7) >> 3]
        return (int.from_bytes(piece, "little") >> (start & 7)) & ((1 << count) - 1)

    def skip(self, count: int) -> None:
        self._at += count
        if self._at > 8 * len(self._data):
            raise OggError("the codebooks of the Vorbis file are cut off")


def _read_codebook(bits: _Bits, most: int) -> int:
    """Skips a codebook (Vorbis I, 3.2.1), and returns its entries times its dimensions.

    Raises `OggError` if they are more than `most`.
    """
    mark, dimensions, entries = bits.read(24), bits.read(16), bits.read(24)
    if mark != _CODEBOOK or not dimensions or not entries:
        raise OggError("a codebook of the Vorbis file is malformed")
    if entries * dimensions > most:
        raise OggError(f"the codebooks of the Vorbis file have more than {MAX_VALUES} values")
    _skip_lengths(bits, entries)
    kind = bits.read(4)
    if kind:
        bits.skip(32 + 32)
        width = bits.read(4) + 1
        bits.skip(1)
        bits.skip(width * (_root(entries, dimensions) if kind == 1 else entries * dimensions))
    return entries * dimensions


def _skip_lengths(bits: _Bits, entries: int) -> None:
    is_ordered = bits.read(1)
    if is_ordered:
        bits.skip(5)
        for _ in range(_LONGEST_CODE):
            entries -= bits.read(entries.bit_length())
            if entries <= 0:
                break
        if entries:
            raise OggError("a codebook of the Vorbis file is malformed")
    elif bits.read(1):  # sparse
        for _ in range(entries):
            if bits.read(1):
                bits.skip(5)
    else:
        bits.skip(5 * entries)


def _root(number: int, degree: int) -> int:
    """The largest integer whose power is not larger than `number`."""
    root = 1
    while (root + 1) ** degree <= number:
        root += 1
    return root
