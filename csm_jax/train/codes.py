"""Codes of recordings: computed once, many at a time, and cached on disk."""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeGuard

import numpy as np

from csm_jax.errors import InputError
from csm_jax.io.audio import decode_audio, is_headerless, read_recording
from csm_jax.io.files import replace_file, reporting
from csm_jax.io.samples import SILENT_PEAK
from csm_jax.mimi.codec import Codec

# Seconds of audio that are read before they are sorted and encoded, and, padding included, that
# are encoded at once.
READ_SECONDS, BATCH_SECONDS = 1200.0, 120.0
# Files of codes, which are given instead of recordings.
CODES_SUFFIX = ".npy"


class Clip(NamedTuple):
    """A part of a recording, in seconds; an end of None is that of the recording."""

    path: Path
    start: float
    end: float | None

    def __str__(self) -> str:
        end = "its end" if self.end is None else f"{self.end:g} s"
        return f"{self.path}, {self.start:g} s to {end}"


Source = Path | Clip


class CodeCache:
    """Codes on disk, by the content of recordings and the weights of the codec.

    Args:
      directory: where they are; made when it is needed.
      num_codebooks: codes a frame.
    """

    def __init__(self, directory: Path, codec: Codec, num_codebooks: int):
        self._codec = codec
        self._num_codebooks = num_codebooks
        self._decoded: tuple[tuple[Path, bytes] | None, np.ndarray] = None, np.zeros(0)
        self._directory = directory / f"{codec.fingerprint[:16]}-{num_codebooks}"

    def codes(
        self, paths: Sequence[Source], progress: Callable[[int], object] = lambda num_files: None
    ) -> dict[Source, np.ndarray | InputError]:
        """Codes int32 [num_frames, Q] of every recording or part of one, or what is wrong with it.

        Args:
          progress: called with the number of files that are done since the last call.

        Raises:
          OutputError: the codes cannot be written.
        """
        found: dict[Source, np.ndarray | InputError] = {}
        missing: list[_Recording] = []
        num_samples = 0
        for path in dict.fromkeys(paths):
            try:
                read = self._read(path)
            except InputError as error:
                read = error
            if isinstance(read, _Recording):
                missing.append(read)
                num_samples += len(read.samples)
            else:
                found[path] = read
                progress(1)
            if num_samples > READ_SECONDS * self._codec.sample_rate:
                found |= self._encode(missing, progress)
                missing, num_samples = [], 0
        return found | self._encode(missing, progress)

    def _encode(
        self, recordings: Sequence["_Recording"], progress: Callable[[int], object]
    ) -> dict[Source, np.ndarray]:
        codes: dict[Source, np.ndarray] = {}
        for batch in _batches(recordings, self._codec.sample_rate):
            rows = self._codec.encode([each.samples for each in batch], self._num_codebooks)
            for recording, row in zip(batch, rows, strict=True):
                self._write(recording.file, row)
                codes[recording.source] = row
            progress(len(batch))
        return codes

    def _read(self, source: Source) -> "np.ndarray | _Recording":
        """The cached codes of a recording, or the recording, which is to be encoded."""
        path = source.path if isinstance(source, Clip) else source
        if path.suffix == CODES_SUFFIX and not isinstance(source, Clip):
            return self._given(path)
        # Read once: were it read again for its name, it could have changed since.
        data = read_recording(path)
        # The same bytes are other samples where the suffix says so.
        kind = "-headerless" if is_headerless(path) else ""
        part = f"-{source.start:g}-{source.end or 'end'}" if isinstance(source, Clip) else ""
        file = self._directory / f"{hashlib.sha256(data).hexdigest()}{kind}{part}.npy"
        cached = self._load(file)
        if cached is not None:
            return cached
        samples = self._decode(data, path)
        if isinstance(source, Clip):
            samples = _cut(samples, source, self._codec.sample_rate)
        return _Recording(source, file, _not_silent(samples, source))

    def _given(self, path: Path) -> np.ndarray:
        """The codes in a file of `file_content`; of more codebooks than wanted, the first."""
        count, size = self._num_codebooks, self._codec.config.codebook_size
        codes = _parse(read_recording(path))
        if codes is None or codes.shape[1] < count or not 0 <= codes.min() <= codes.max() < size:
            raise InputError(
                f"{path}: no codes, which are integers [frames, {count}] from 0 to {size - 1}; "
                "give the recording, or its codes by this checkpoint's codec"
            )
        return codes[:, :count].astype(np.int32)

    def _decode(self, data: bytes, path: Path) -> np.ndarray:
        """The samples of a recording; the last one is kept, since its parts come one by one."""
        last, samples = self._decoded
        if last != (path, data):
            samples = decode_audio(data, path, self._codec.sample_rate)
            self._decoded = (path, data), samples
        return samples

    def _load(self, file: Path) -> np.ndarray | None:
        try:
            content = file.read_bytes()
        except OSError:
            return None
        codes = _parse(content)
        return codes.astype(np.int32) if self._are_intact(codes, content) else None

    def _are_intact(self, codes: np.ndarray | None, content: bytes) -> TypeGuard[np.ndarray]:
        """Whether an array, and its file, could have been written here."""
        if codes is None or codes.shape[1] != self._num_codebooks:
            return False
        is_whole = file_content(codes) == content
        return bool(is_whole and 0 <= codes.min() <= codes.max() < self._codec.config.codebook_size)

    def _write(self, file: Path, codes: np.ndarray) -> None:
        way_out = "choose a directory that is writable and has space with --codes_cache"
        with reporting(f"codes cannot be written to {self._directory}", way_out):
            self._directory.mkdir(parents=True, exist_ok=True)
            replace_file(file, file_content(codes))


class _Recording(NamedTuple):
    """Samples to encode, and the file for their codes."""

    source: Source
    file: Path
    samples: np.ndarray


def file_content(codes: np.ndarray) -> bytes:
    """A file of codes [num_frames, Q], which training data may name instead of a recording."""
    buffer = io.BytesIO()
    np.save(buffer, codes.astype(np.int16))
    return buffer.getvalue()


def _parse(content: bytes) -> np.ndarray | None:
    """The array of a file of codes, integers [num_frames, Q]; None if it is none."""
    try:
        codes = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception:
        return None  # not there, or damaged, for which numpy has a dozen kinds of exceptions
    is_codes = isinstance(codes, np.ndarray) and codes.ndim == 2 and codes.dtype.kind in "iu"
    return codes if is_codes and codes.size else None


def _cut(audio: np.ndarray, clip: Clip, sample_rate: int) -> np.ndarray:
    """The samples of a part. Raises `InputError` if the recording has none there."""
    end = None if clip.end is None else round(clip.end * sample_rate)
    samples = audio[round(clip.start * sample_rate) : end]
    if not len(samples):
        raise InputError(f"{clip}: the recording lasts {len(audio) / sample_rate:g} s")
    return samples


def _not_silent(audio: np.ndarray, path: Source) -> np.ndarray:
    """The same audio. Raises `InputError` if there is no speech in it."""
    peak = float(np.abs(audio).max())
    if peak < SILENT_PEAK:
        raise InputError(f"{path}: silent, its peak of {peak:.1e} is under {SILENT_PEAK:.0e}")
    return audio


def _batches(recordings: Sequence[_Recording], sample_rate: int) -> Iterator[list[_Recording]]:
    """Recordings of similar lengths, few enough to be encoded together."""
    batch: list[_Recording] = []
    for recording in sorted(recordings, key=lambda each: len(each.samples)):
        longest = len(recording.samples) / sample_rate
        if batch and (len(batch) + 1) * longest > BATCH_SECONDS:
            yield batch
            batch = []
        batch.append(recording)
    if batch:
        yield batch
