"""Codes of recordings: computed once, many at a time, and kept on disk."""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from csm_jax.audio import load_audio
from csm_jax.errors import InputError
from csm_jax.files import replace_file
from csm_jax.mimi.codec import Codec

# Seconds of audio that are read before they are sorted and encoded, and, padding included, that
# are encoded at once.
READ_SECONDS, BATCH_SECONDS = 1200.0, 120.0
# Quieter than this all through (-60 dBFS) is no speech.
SILENT_PEAK = 1e-3


class CodeCache:
    """Codes by the content of recordings and the weights of the codec.

    Args:
      directory: where they are kept; made if need be.
      num_codebooks: codes a frame.
    """

    def __init__(self, directory: Path, codec: Codec, num_codebooks: int):
        self._codec = codec
        self._num_codebooks = num_codebooks
        self._directory = directory / f"{codec.fingerprint[:16]}-{num_codebooks}"

    def codes(
        self, paths: Sequence[Path], progress: Callable[[int], object] = lambda num_files: None
    ) -> dict[Path, np.ndarray | InputError]:
        """Codes int32 [num_frames, Q] of every recording, or what is wrong with it.

        Args:
          progress: told of files as they are done.
        """
        found: dict[Path, np.ndarray | InputError] = {}
        missing: dict[Path, np.ndarray] = {}
        for path in dict.fromkeys(paths):
            kept = self._read(path)
            if kept is not None:
                found[path] = kept
                progress(1)
                continue
            try:
                missing[path] = _load(path, self._codec.sample_rate)
            except InputError as error:
                found[path] = error
                progress(1)
            if sum(map(len, missing.values())) > READ_SECONDS * self._codec.sample_rate:
                found |= self._encode(missing, progress)
                missing = {}
        return found | self._encode(missing, progress)

    def _encode(
        self, recordings: dict[Path, np.ndarray], progress: Callable[[int], object]
    ) -> dict[Path, np.ndarray]:
        codes = {}
        for batch in _batches(recordings, self._codec.sample_rate):
            rows = [recordings[path] for path in batch]
            for path, row in zip(batch, self._codec.encode(rows, self._num_codebooks), strict=True):
                self._write(path, row)
                codes[path] = row
            progress(len(batch))
        return codes

    def _file(self, path: Path) -> Path | None:
        """Where the codes of a recording are kept; None if it cannot be read."""
        try:
            return self._directory / f"{hashlib.sha256(path.read_bytes()).hexdigest()}.npy"
        except OSError:
            return None

    def _read(self, path: Path) -> np.ndarray | None:
        file = self._file(path)
        try:
            codes = np.load(file, allow_pickle=False) if file else None
        except (OSError, ValueError, EOFError):
            return None  # not there, or damaged
        is_right = codes is not None and codes.ndim == 2 and codes.shape[1] == self._num_codebooks
        return codes.astype(np.int32) if is_right else None

    def _write(self, path: Path, codes: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, codes.astype(np.int16))
        self._directory.mkdir(parents=True, exist_ok=True)
        replace_file(self._file(path), buffer.getvalue())


def _load(path: Path, sample_rate: int) -> np.ndarray:
    audio = load_audio(path, sample_rate)
    peak = float(np.abs(audio).max())
    if peak < SILENT_PEAK:
        raise InputError(f"{path}: silent, its peak of {peak:.1e} is under {SILENT_PEAK:.0e}")
    return audio


def _batches(recordings: dict[Path, np.ndarray], sample_rate: int) -> Iterator[list[Path]]:
    """Paths of recordings of similar lengths, few enough to be encoded together."""
    batch: list[Path] = []
    for path in sorted(recordings, key=lambda path: len(recordings[path])):
        longest = len(recordings[path]) / sample_rate
        if batch and (len(batch) + 1) * longest > BATCH_SECONDS:
            yield batch
            batch = []
        batch.append(path)
    if batch:
        yield batch
