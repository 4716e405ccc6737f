"""The cache of codes: computed once, and again when the recording or the codec changes."""

import errno
import hashlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fixtures import CONFIG

from csm_jax.checkpoints.random_weights import random_params
from csm_jax.errors import InputError, OutputError
from csm_jax.mimi.codec import Codec
from csm_jax.train import codes
from csm_jax.train.codes import CodeCache

FRAME = CONFIG.codec.frame_size
Q = CONFIG.num_codebooks
# Lengths in samples: whole frames and others, unsorted.
LENGTHS = {"a": 5 * FRAME, "b": 1, "c": 2 * FRAME + 1, "d": 11 * FRAME - 1, "e": 2 * FRAME}


class Counting(Codec):
    """A codec that records the lengths of encoded recordings, one list for each call."""

    def __init__(self, seed: int = 0):
        super().__init__(CONFIG.codec, random_params(CONFIG, seed=seed)["codec"])
        self.calls: list[list[int]] = []

    def encode(self, audio, num_codebooks=None):
        rows = [audio] if isinstance(audio, np.ndarray) else audio
        self.calls.append([len(row) for row in rows])
        return super().encode(audio, num_codebooks)


@pytest.fixture(scope="module")
def alone():
    """A codec whose calls are not counted."""
    return Codec(CONFIG.codec, random_params(CONFIG)["codec"])


@pytest.fixture
def recordings(tmp_path):
    """Paths of recordings of noise."""
    random = np.random.default_rng(2)
    paths = [tmp_path / f"{name}.wav" for name in LENGTHS]
    for path, length in zip(paths, LENGTHS.values(), strict=True):
        # Every sample is loud enough, since one recording has only one.
        noise = 0.1 * random.choice([-1, 1], length) + 0.05 * random.standard_normal(length)
        soundfile.write(path, noise, 24_000)
    return paths


def encoded(alone: Codec, path: Path, num_codebooks: int = Q) -> np.ndarray:
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == alone.sample_rate
    return alone.encode(samples, num_codebooks)


def stored(directory: Path) -> list[Path]:
    """All files in the directory."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_codes_equal_those_of_the_recording_alone(alone, recordings, tmp_path):
    """This holds beside longer recordings, and for codes read from the disk."""
    codec = Counting()
    for _ in range(2):
        found = CodeCache(tmp_path / "cache", codec, Q).codes(recordings)
        assert set(found) == set(recordings)
        for path, length in zip(recordings, LENGTHS.values(), strict=True):
            assert found[path].dtype == np.int32
            assert found[path].shape == (-(-length // FRAME), Q)
            np.testing.assert_array_equal(found[path], encoded(alone, path))
    assert [len(call) for call in codec.calls] == [len(LENGTHS)], "all at once, and once"
    assert len(np.unique(found[recordings[0]])) > 5, "codes that do not vary would show nothing"


def test_files_are_named_by_weights_codebooks_and_content(alone, recordings, tmp_path):
    """The files contain int16 codes, and there are no other files."""
    CodeCache(tmp_path / "cache", alone, Q).codes(recordings)
    (directory,) = (tmp_path / "cache").iterdir()
    names = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in recordings}
    assert {file.name for file in stored(directory)} == {f"{name}.npy" for name in names}
    for name, path in names.items():
        kept = np.load(directory / f"{name}.npy")
        assert kept.dtype == np.int16
        np.testing.assert_array_equal(kept, encoded(alone, path))


def test_a_renamed_recording_is_not_encoded_again(recordings, tmp_path):
    codec = Counting()
    cache = CodeCache(tmp_path / "cache", codec, Q)
    before = cache.codes(recordings)[recordings[0]]
    renamed = recordings[0].rename(tmp_path / "renamed.wav")
    np.testing.assert_array_equal(cache.codes([renamed])[renamed], before)
    assert len(codec.calls) == 1


def test_a_changed_recording_is_encoded_again(alone, recordings, tmp_path):
    codec = Counting()
    cache = CodeCache(tmp_path / "cache", codec, Q)
    before = cache.codes(recordings)
    changed = recordings[2]
    samples, _ = soundfile.read(changed)
    soundfile.write(changed, -samples, 24_000)
    after = cache.codes(recordings)
    assert codec.calls[1:] == [[LENGTHS["c"]]]
    np.testing.assert_array_equal(after[changed], encoded(alone, changed))
    assert not np.array_equal(after[changed], before[changed])


def test_other_weights_and_other_codebooks_have_separate_codes(alone, recordings, tmp_path):
    directory, path = tmp_path / "cache", recordings[0]
    first, same, other = Counting(), Counting(), Counting(seed=1)
    ours = CodeCache(directory, first, Q).codes([path])[path]
    theirs = CodeCache(directory, other, Q).codes([path])[path]
    fewer = CodeCache(directory, same, 3).codes([path])[path]
    assert [len(codec.calls) for codec in (first, other, same)] == [1, 1, 1]
    assert not np.array_equal(ours, theirs)
    np.testing.assert_array_equal(theirs, encoded(other, path))
    np.testing.assert_array_equal(fewer, ours[:, :3])
    np.testing.assert_array_equal(CodeCache(directory, same, Q).codes([path])[path], ours)
    assert len(same.calls) == 1, "the same weights, loaded again"


def test_one_changed_weight_gives_another_codec_key(alone):
    params = random_params(CONFIG)["codec"]
    codebook = params["downsample"]["weight"]
    params["downsample"]["weight"] = codebook.at[(0,) * codebook.ndim].add(1e-6)
    assert Codec(CONFIG.codec, params).fingerprint != alone.fingerprint
    assert Counting().fingerprint == alone.fingerprint


DAMAGE = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "a byte short": lambda content: content[:-1],
    "something else": lambda content: b"these are no codes",
    "an archive": lambda content: b"PK\x03\x04" + content,
    "its type": lambda content: content.replace(b"i2", b"u2"),
    "its length": lambda content: content[:8] + b"(" + content[9:],
    "fewer frames": lambda content: content.replace(b"(5, 7)", b"(4, 7)"),
    "a code too many": lambda content: content[:-2] + b"\xff\x7f",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_written_again(recordings, name, tmp_path):
    codec = Counting()
    cache = CodeCache(tmp_path / "cache", codec, Q)
    before = cache.codes(recordings[:1])[recordings[0]]
    (file,) = stored(tmp_path / "cache")
    content = file.read_bytes()
    file.write_bytes(DAMAGE[name](content))
    np.testing.assert_array_equal(cache.codes(recordings[:1])[recordings[0]], before)
    assert len(codec.calls) == 2
    assert file.read_bytes() == content


def test_a_file_with_too_few_codebooks_is_written_again(recordings, tmp_path):
    codec = Counting()
    cache = CodeCache(tmp_path / "cache", codec, Q)
    before = cache.codes(recordings[:1])[recordings[0]]
    (file,) = stored(tmp_path / "cache")
    np.save(file, before[:, :3].astype(np.int16))
    np.testing.assert_array_equal(cache.codes(recordings[:1])[recordings[0]], before)


def test_a_bad_recording_does_not_stop_the_others(alone, recordings, tmp_path):
    bad = [tmp_path / name for name in ("gone.wav", "note.txt", "silent.wav")]
    bad[1].write_text("this is not a recording")
    soundfile.write(bad[2], np.zeros(FRAME), 24_000)
    paths = [*bad, *recordings]
    told = []
    cache = CodeCache(tmp_path / "cache", alone, Q)
    for _ in range(2):
        found = cache.codes([*paths, *paths[::-1]], told.append)
        assert set(found) == set(paths)
        for path in bad:
            assert isinstance(found[path], InputError)
            assert str(path) in str(found[path])
        for path in recordings:
            np.testing.assert_array_equal(found[path], encoded(alone, path))
        assert sum(told) == len(paths), "each of them once, also when it is named twice"
        told.clear()
    assert len(stored(tmp_path / "cache")) == len(recordings)


@pytest.mark.parametrize("read_seconds", [0.5, 100.0])
def test_batches_are_bounded_and_have_similar_lengths(alone, read_seconds, tmp_path, monkeypatch):
    """The bound includes padding; a longer recording is a batch of its own."""
    monkeypatch.setattr(codes, "BATCH_SECONDS", 1.0)
    monkeypatch.setattr(codes, "READ_SECONDS", read_seconds)
    random = np.random.default_rng(4)
    lengths = [*random.integers(1000, 6000, 12).tolist(), 30_000]
    paths = [tmp_path / f"{i}.wav" for i in range(len(lengths))]
    for path, length in zip(paths, lengths, strict=True):
        soundfile.write(path, 0.1 * random.standard_normal(length), 24_000)
    codec = Counting()
    told = []
    found = CodeCache(tmp_path / "cache", codec, Q).codes(paths, told.append)
    assert set(found) == set(paths)
    assert sum(told) == len(paths)
    for path in paths:
        np.testing.assert_array_equal(found[path], encoded(alone, path))
    assert sorted(length for call in codec.calls for length in call) == sorted(lengths)
    assert all(len(call) == 1 or len(call) * max(call) <= 24_000 for call in codec.calls)
    assert any(len(call) > 1 for call in codec.calls)
    if read_seconds == 100:
        in_order = [length for call in codec.calls for length in call]
        assert in_order == sorted(lengths), "those of similar lengths together"
        for call, following in zip(codec.calls, codec.calls[1:], strict=False):
            assert (len(call) + 1) * following[0] > 24_000, "one more would have been too many"


def test_codes_from_before_an_interruption_are_kept(alone, recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(codes, "BATCH_SECONDS", 0.1)  # one by one

    class Interrupted(Counting):
        def encode(self, audio, num_codebooks=None):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().encode(audio, num_codebooks)

    with pytest.raises(KeyboardInterrupt):
        CodeCache(tmp_path / "cache", Interrupted(), Q).codes(recordings)
    files = stored(tmp_path / "cache")
    assert [file.suffix for file in files] == [".npy", ".npy"]
    codec = Counting()
    found = CodeCache(tmp_path / "cache", codec, Q).codes(recordings)
    assert sorted(map(len, codec.calls)) == [1, 1, 1]
    for path in recordings:
        np.testing.assert_array_equal(found[path], encoded(alone, path))


def test_a_failed_write_leaves_no_file(alone, recordings, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("csm_jax.io.files.os.replace", fail)
    with pytest.raises(OutputError, match=r"\(No space left on device\): .*--codes_cache"):
        CodeCache(tmp_path / "cache", alone, Q).codes(recordings)
    assert stored(tmp_path / "cache") == []


def test_a_directory_that_cannot_be_created_is_an_error(alone, recordings, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OutputError, match="Not a directory"):
        CodeCache(tmp_path / "cache", alone, Q).codes(recordings)


@pytest.mark.parametrize("name", ["a\0.wav", "\ud800.wav"])
def test_the_result_of_an_impossible_path_is_an_error(alone, recordings, name, tmp_path):
    found = CodeCache(tmp_path / "cache", alone, Q).codes([tmp_path / name, *recordings])
    assert isinstance(found.pop(tmp_path / name), InputError)
    assert set(found) == set(recordings)


def test_a_raw_file_with_the_bytes_of_a_wav_file_has_other_codes(alone, recordings, tmp_path):
    """In a raw file the header is samples too."""
    cache = CodeCache(tmp_path / "cache", alone, Q)
    raw = tmp_path / "a.raw"
    raw.write_bytes(recordings[0].read_bytes())
    for _ in range(2):
        found = cache.codes([recordings[0], raw])
        assert (len(found[recordings[0]]), len(found[raw])) == (5, 6)


def test_codes_of_a_recording_that_changes_meanwhile_are_not_kept(alone, recordings, tmp_path):
    """They would be stored under the new content."""
    path, other = recordings[:2]

    class Slow(Counting):
        def encode(self, audio, num_codebooks=None):
            path.write_bytes(other.read_bytes())
            return super().encode(audio, num_codebooks)

    before = encoded(alone, path)
    cache = tmp_path / "cache"
    np.testing.assert_array_equal(CodeCache(cache, Slow(), Q).codes([path])[path], before)
    np.testing.assert_array_equal(
        CodeCache(cache, alone, Q).codes([path])[path], encoded(alone, other)
    )


def test_codes_are_given_instead_of_a_recording(recordings, tmp_path):
    """Of more codebooks than the model has, the first count; nothing is encoded or cached."""
    codec = Counting()
    given = np.random.default_rng(0).integers(0, CONFIG.codec.codebook_size, (7, Q + 1))
    np.save(tmp_path / "given.npy", given.astype(np.int16))
    found = CodeCache(tmp_path / "cache", codec, Q).codes([tmp_path / "given.npy"])
    np.testing.assert_array_equal(found[tmp_path / "given.npy"], given[:, :Q])
    assert codec.calls == []
    assert stored(tmp_path / "cache") == []
    written = codes.file_content(given)
    assert written == (tmp_path / "given.npy").read_bytes()


@pytest.mark.parametrize(
    "given",
    [
        np.zeros((7, Q - 1), np.int16),
        np.full((7, Q), CONFIG.codec.codebook_size, np.int16),
        np.full((7, Q), -1, np.int16),
        np.zeros((0, Q), np.int16),
        np.zeros((7, Q), np.float32),
        np.zeros(7, np.int16),
        None,
    ],
    ids=["few", "large", "negative", "empty", "float", "flat", "no array"],
)
def test_files_that_are_no_codes_are_one_line(alone, tmp_path, given):
    path = tmp_path / "given.npy"
    np.save(path, given, allow_pickle=given is None)
    found = CodeCache(tmp_path / "cache", alone, Q).codes([path])[path]
    assert isinstance(found, InputError)
    assert f"{path}: no codes, which are integers [frames, {Q}]" in str(found)
    assert "\n" not in str(found)
