"""Words of the command line: when each is spoken, in a file beside the speech."""

from pathlib import Path

from csm_jax.errors import InputError
from csm_jax.inference.alignment.formats import format_for, write_words
from csm_jax.inference.alignment.words import Word
from csm_jax.inference.speech import Speech

WORDS_HELP = (
    "also write when each word is spoken there: .json .srt .vtt .TextGrid; with --manifest only "
    "the ending, such as .srt, of a file for each line"
)


class WordsFile:
    """The words of turns that are written one after another into one file of speech."""

    def __init__(self, path: Path | None):
        """Starts without turns; None writes nothing."""
        self._path = path
        self._words: list[Word] = []
        self._seconds = 0.0

    def add(self, speech: Speech) -> None:
        """Adds the next turn."""
        self._words += [word.moved(self._seconds) for word in speech.words]
        self._seconds += len(speech.audio) / speech.sample_rate

    def write(self) -> None:
        """Writes the words of all turns. Raises `OutputError`."""
        if self._path is not None:
            write_words(self._path, self._words, self._seconds)


def check_ending(ending: str) -> None:
    """Raises `InputError` unless files of words can end so, such as in ".srt"."""
    if Path(f"words{ending}").suffix != ending:
        raise InputError(f"--words_out is {ending}, but with --manifest only an ending: .srt")
    format_for(Path(f"words{ending}"))
