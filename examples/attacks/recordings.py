"""Audio files with false headers, and rare encodings."""

import base64
import io
import os
import struct

from attacks import vorbis
from attacks.registry import Server, attack
from attacks.target import BrokeError, Target, add_voice, count_statuses


def _wav_head(channels: int, rate: int, data_bytes: int, bits: int = 16) -> bytes:
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * frame % 2**32, frame % 65_536, bits)
    head = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", data_bytes)
    return b"RIFF" + struct.pack("<I", (data_bytes + 36) % 2**32) + head


def _encoded(form: str, subtype: str | None = None, seconds: float = 2.0) -> bytes:
    import numpy as np
    import soundfile

    samples = np.sin(np.arange(int(24_000 * seconds)) / 10).astype(np.float32) / 2
    file = io.BytesIO()
    soundfile.write(file, samples, 24_000, format=form, subtype=subtype)
    return file.getvalue()


def _flac_head(channels: int, rate: int, samples: int) -> bytes:
    """A FLAC file whose STREAMINFO states `samples`, without any."""
    packed = (rate << 44) | ((channels - 1) << 41) | (15 << 36) | samples
    info = struct.pack(">HH", 4096, 4096) + bytes(6) + packed.to_bytes(8, "big") + bytes(16)
    return b"fLaC" + bytes([0x80]) + len(info).to_bytes(3, "big") + info


def _lies() -> dict[str, bytes]:
    tone = b"\x00\x40\x00\xc0" * 24_000
    flac, ogg, mp3 = _encoded("FLAC"), _encoded("OGG", "VORBIS"), _encoded("MP3")
    tag = b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f"
    big_tag = b"ID3\x04\x00\x00" + bytes([0x01, 0x7F, 0x7F, 0x7F]) + bytes(4_194_303)
    return {
        "65535 channels": _wav_head(65_535, 24_000, len(tone)) + tone,
        "no channels": _wav_head(0, 24_000, len(tone)) + tone,
        "rate 0": _wav_head(1, 0, len(tone)) + tone,
        "rate 4 GHz": _wav_head(1, 2**32 - 1, len(tone)) + tone,
        "4 GB in the head": _wav_head(1, 24_000, 2**32 - 40) + tone[:100],
        "FLAC of 2**36 samples": _flac_head(1, 24_000, 2**36 - 1),
        "FLAC cut off": flac[: len(flac) // 2],
        "FLAC of noise": flac[:200] + bytes(range(256)) * 20,
        "mp3 of a tag": tag + bytes(100),
        "mp3 of a tag of 4 MB": big_tag,
        "1000 Ogg streams": ogg * 100,
        "1000 mp3 files": mp3 * 100,
        "one byte": b"R",
        "text": b"RIFF but not really",
        "a zip": b"PK\x03\x04" + bytes(1000),
    }


def _rare() -> dict[str, bytes]:
    kinds = ["AU", "W64", "CAF", "AIFF", "NIST", "VOC", "IRCAM", "PVF", "SVX", "RF64", "WVE", "HTK"]
    found = {}
    for kind in [*kinds, "MAT4", "MAT5", "PAF", "XI", "MPC2K", "AVR", "SDS"]:
        try:
            found[kind] = _encoded(kind)
        except Exception:  # noqa: S112, this libsndfile does not write it
            continue
    return found


@attack(Server.OPEN)
async def lying_recordings(target: Target) -> str:
    """Sends audio files with false lengths, channels, rates and tags, and in rare formats."""
    lies, spoken, bad, rare = _lies(), [], [], _rare()
    async with target.client() as client:
        for name, data in [*lies.items(), *rare.items()]:
            form = {"text": "one", "audio_text": "one", "max_audio_length_ms": "160"}
            response = await client.post("/generate", data=form, files={"audio": ("a", data)})
            spoken += [name] if response.is_success else []
            if response.status_code >= 500 or b" object at 0x" in response.content[:500]:
                bad.append(f"{name} {response.status_code}")
    if bad:
        raise BrokeError(f"internal errors or object addresses: {', '.join(bad)}")
    read = [name for name in rare if name in spoken]
    if read:
        raise BrokeError(f"formats beyond the documented ones are read: {', '.join(read)}")
    return f"{len(lies) + len(rare)} files; spoken after: {', '.join(spoken) or 'none'}"


@attack(Server.OPEN)
async def unpacking_codebooks(target: Target) -> str:
    """Sends Vorbis files of 3 kB whose codebooks unpack to 800 MB, as recordings and as voices."""
    # Enough to be seen, and not so much that this machine runs out of memory.
    bomb, before, statuses = vorbis.file(16, 22), target.memory_mb(), []
    async with target.client() as client:
        for _ in range(3):
            form = {"text": "one", "audio_text": "one", "max_audio_length_ms": "160"}
            response = await client.post("/generate", data=form, files={"audio": ("a", bomb)})
            statuses.append(response.status_code)
            statuses.append((await add_voice(client, "bomb", bomb)).status_code)
    most = target.peak_memory_mb()
    if most and before and most - before > 400:
        raise BrokeError(f"the server has taken {most - before:.0f} MB more")
    return count_statuses(statuses)


@attack(Server.OPEN, floods=False)
async def formats_behind_tags(target: Target) -> str:
    """Sends recordings in rare formats behind an ID3 tag."""
    tag, read = b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10), []
    async with target.client() as client:
        for name, data in _rare().items():
            form = {"text": "one", "audio_text": "one", "max_audio_length_ms": "160"}
            response = await client.post("/generate", data=form, files={"audio": ("a", tag + data)})
            read += [name] if response.status_code != 400 else []
    if read:
        raise BrokeError(f"formats beyond the documented ones are read: {', '.join(read)}")
    return "none is read"


@attack(floods=False)
async def kinds_of_base64(target: Target) -> str:
    """Sends base64 with spaces, line ends, other alphabets, wrong padding and unusual prefixes."""
    good = base64.b64encode(_encoded("FLAC")).decode()
    cases = [good + "=", good[:-1], "\n".join(good[at : at + 76] for at in range(0, len(good), 76))]
    cases += [good.replace("+", "-").replace("/", "_"), f" {good}", "data:audio/flac," + good]
    cases += ["data:;base64," + good, "data:" + "a;" * 100_000 + "base64," + good, "data:;base64"]
    cases += ["=" * 1000, "A" * 13_500_000, "é" * 100]
    statuses = []
    async with target.client() as client:
        for case in cases:
            body = {"text": "one", "audio": case, "audio_text": "one", "max_audio_length_ms": 160}
            statuses.append((await client.post("/generate", json=body)).status_code)
    if max(statuses) >= 500:
        raise BrokeError(f"{statuses}")
    return count_statuses(statuses)


@attack(floods=False)
async def hopeless_recordings(target: Target) -> str:
    """Sends recordings of one sample, silence, an amplitude of 1e38, and noise as a FLAC file."""

    def wav(samples: list[float]) -> bytes:
        data = struct.pack(f"<{len(samples)}f", *samples)
        form = struct.pack("<HHIIHH", 3, 1, 24_000, 96_000, 4, 32)
        body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(data))
        return b"RIFF" + struct.pack("<I", len(body) + len(data)) + body + data

    cases = {"one sample": wav([0.5]), "silence": wav([0.0] * 24_000)}
    cases |= {"constant": wav([0.5] * 24_000), "1e38": wav([1e38, -1e38] * 12_000)}
    cases |= {"not a number": wav([float("nan")] * 24_000), "noise": b"fLaC" + os.urandom(4000)}
    accepted = []
    async with target.client() as client:
        for name, data in cases.items():
            body = {"text": "one", "audio_text": "one", "max_audio_length_ms": 400}
            body["audio"] = base64.b64encode(data).decode()
            response = await client.post("/generate", json=body)
            message = response.text if response.status_code >= 400 else ""
            if response.status_code != 400 or " object at 0x" in message:
                accepted.append(f"{name} {response.status_code} {message[:80]}")
    if accepted:
        raise BrokeError("; ".join(accepted))
    return f"{len(cases)} recordings refused"
