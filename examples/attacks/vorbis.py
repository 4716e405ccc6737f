"""Small Ogg Vorbis files, written bit by bit (Vorbis I, sections 3 and 4; RFC 3533)."""

import struct


class Bits:
    """Numbers one after another, the lowest bit of each first."""

    def __init__(self):
        self.value = self.size = 0

    def put(self, *pairs: tuple[int, int]) -> None:
        """Appends numbers, each with its size in bits."""
        for number, size in pairs:
            self.value |= number << self.size
            self.size += size

    @property
    def bytes(self) -> bytes:
        return self.value.to_bytes((self.size + 7) // 8, "little")


def page(*packets: bytes, number: int = 0, flags: int = 0, serial: int = 1) -> bytes:
    """A page of whole packets."""
    lengths = b"".join(bytes([255] * (len(each) // 255) + [len(each) % 255]) for each in packets)
    head = struct.pack("<4sBBqIIIB", b"OggS", 0, flags, 0, serial, number, 0, len(lengths))
    data = head + lengths + b"".join(packets)
    return data[:22] + struct.pack("<I", checksum(data)) + data[26:]


def checksum(data: bytes) -> int:
    """RFC 3533, 6: the polynomial 0x04c11db7, from 0 on, the highest bit first."""
    crc = 0
    for byte in data:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1) & 0xFFFFFFFF ^ (0x04C11DB7 if crc & 1 << 31 else 0)
    return crc


def head(num_books: int, code_bits: int, dimensions: int = 1) -> list[bytes]:
    """The three packets that a file begins with.

    Args:
      num_books: codebooks, each of 2**code_bits entries with codes of equal length.
    """
    identification = b"\x01vorbis" + struct.pack("<IBIiiiBB", 0, 1, 24_000, 0, 0, 0, 0xB8, 1)
    comments = b"\x03vorbis" + struct.pack("<IIB", 0, 0, 1)
    bits, entries = Bits(), 1 << code_bits
    bits.put((num_books - 1, 8))
    for _ in range(num_books):
        bits.put((0x564342, 24), (dimensions, 16), (entries, 24), (1, 1), (code_bits - 1, 5))
        bits.put((entries, entries.bit_length()), (0, 4))
    bits.put((0, 6), (0, 16))  # times
    bits.put((0, 6), (1, 16), (0, 5), (0, 2), (4, 4))  # a floor
    bits.put((0, 6), (0, 16), (0, 24), (0, 24), (0, 24), (0, 6), (0, 8), (0, 3), (0, 1))  # residue
    bits.put((0, 6), (0, 16), (0, 1), (0, 1), (0, 2), (0, 8), (0, 8), (0, 8))  # a mapping
    bits.put((0, 6), (0, 1), (0, 16), (0, 16), (0, 8), (1, 1))  # a mode
    return [identification, comments, b"\x05vorbis" + bits.bytes]


def file(num_books: int, code_bits: int, dimensions: int = 1) -> bytes:
    """A file without any audio."""
    first, *others = head(num_books, code_bits, dimensions)
    audio = page(bytes(20), number=2, flags=4)
    return page(first, flags=2) + page(*others, number=1) + audio
