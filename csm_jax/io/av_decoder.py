"""A program that decodes one recording with ffmpeg's libraries (PyAV).

It is a process of its own because these decoders are C code that reads what strangers send: an
error in them ends this process, and not the server. Nothing of the package is imported, so that it
starts in 0.3 s. Before it reads the container it gives up the right to open files and sockets.

Arguments: ffmpeg's name of the container, and the largest length in seconds. Standard input: the
recording. Standard output: its samples, mono float32. The last line of standard error: the rate in
Hz, or why the recording is refused, with the exit status `REFUSED`.
"""

import contextlib
import importlib
import io
import math
import pkgutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

REFUSED = 3

MAX_CHANNELS = 8
MIN_RATE, MAX_RATE = 4_000, 192_000
# What recorders write. Vorbis is left out: its heads can unpack to gigabytes.
_CODECS = {"aac", "alac", "amrnb", "amrwb", "flac", "mp3", "mp3float", "opus", "libopus"}
_CODECS |= {"libopencore_amrnb", "libopencore_amrwb", "pcm_f32le", "pcm_s16le", "pcm_s16be"}
_CODECS |= {"eac3", "ac3"}
# Lossy codecs overshoot: peaks beyond these are none of the recording.
_PEAKS = -2.0, 2.0
# Bytes of memory beside the recording, of which the libraries take 200 MB; and seconds to decode.
_MEMORY = 1 << 30
_CPU_SECONDS = 20


class RefusedError(Exception):
    """A recording that is not decoded, with the reason."""


def decode(data: bytes, demuxer: str, max_seconds: float) -> Iterator[tuple[np.ndarray, int]]:
    """Mono float32 [n] of each frame, and the rate in Hz. Raises `RefusedError`."""
    import av

    options = {"enable_drefs": "0", "use_absolute_path": "0"} if demuxer == "mov" else {}
    opened = av.open(
        io.BytesIO(data),
        "r",
        format=demuxer,
        options={"protocol_whitelist": "", "format_whitelist": demuxer, **options},
        metadata_errors="ignore",
        io_open=_open_nothing,
    )
    with opened as container:
        stream = _audio_stream(container)
        is_lossy = not stream.codec_context.name.startswith("pcm")
        rate, count = 0, 0
        for block, block_rate in _blocks(container, stream):
            rate = rate or block_rate
            if not MIN_RATE <= rate <= MAX_RATE:
                raise RefusedError(f"{rate} Hz; {MIN_RATE} to {MAX_RATE} Hz can be read")
            if block_rate != rate:
                raise RefusedError("its sample rate changes; convert it to wav")
            count += len(block)
            if count > max_seconds * rate:
                raise RefusedError(f"longer than {max_seconds:g} s; cut it")
            yield np.clip(block, *_PEAKS) if is_lossy else block, rate


def _audio_stream(container: "InputContainer") -> "av.AudioStream":
    """The first stream of sound. Raises `RefusedError` if there is none that is decoded here."""
    if not container.streams.audio:
        raise RefusedError("there is no sound in it; give a recording of speech")
    stream = container.streams.audio[0]
    codec = stream.codec_context.name
    if codec not in _CODECS:
        raise RefusedError(f"its codec {codec} is not read; convert it to wav")
    stream.codec_context.thread_count = 1
    return stream


def _blocks(
    container: "InputContainer", stream: "av.AudioStream"
) -> Iterator[tuple[np.ndarray, int]]:
    import av

    resampler = av.AudioResampler(format="fltp")
    for frame in container.decode(stream):
        frame = cast(av.AudioFrame, frame)
        if not 1 <= frame.layout.nb_channels <= MAX_CHANNELS:
            raise RefusedError(f"more than {MAX_CHANNELS} channels; convert it to mono")
        for planar in resampler.resample(frame):
            with np.errstate(invalid="ignore", over="ignore"):  # the caller checks the samples
                yield planar.to_ndarray().mean(axis=0), planar.sample_rate


def _open_nothing(*_: object) -> None:
    raise PermissionError("a recording opens no other file")


def confine(num_bytes: int, max_seconds: float) -> None:
    """Limits memory and time, and lets this process open nothing any more, where systems can."""
    with contextlib.suppress(ImportError):
        import resource

        memory = _MEMORY + 2 * num_bytes
        limits = {resource.RLIMIT_AS: memory, resource.RLIMIT_NOFILE: 0, resource.RLIMIT_CORE: 0}
        if max_seconds < math.inf:
            limits[resource.RLIMIT_CPU] = _CPU_SECONDS + math.ceil(max_seconds)
        for kind, limit in limits.items():
            with contextlib.suppress(ValueError, OSError):  # macOS has no limit on memory
                resource.setrlimit(kind, (limit, limit))


def main(demuxer: str, max_seconds: float) -> int:
    """Decodes standard input; gives the exit status."""
    import av.error

    # PyAV imports some of its modules when it needs them, which is too late for this process.
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    data = sys.stdin.buffer.read()
    confine(len(data), max_seconds)
    rate = 1
    try:
        for block, block_rate in decode(data, demuxer, max_seconds):
            sys.stdout.buffer.write(block.tobytes())
            rate = block_rate
        sys.stdout.buffer.flush()
    except (RefusedError, av.error.FFmpegError, UnicodeError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        advice = f"not readable as audio ({reason}); convert it to wav, flac, mp3, ogg or opus"
        print(str(error) if isinstance(error, RefusedError) else advice, file=sys.stderr)
        return REFUSED
    print(rate, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
