"""Texts and transcripts as words that can be compared."""

import re
from collections.abc import Callable

from csm_jax.errors import CSMError, InputError

# Languages that are written without spaces: their words are characters, as in seed-tts-eval.
_WITHOUT_SPACES = ("zh", "ja", "th", "lo", "my", "yue")

_LEADING_ZERO = re.compile(r"(?<![\d.,])0\d+")
_WORD = re.compile(r"\d|[^\W\d_]+(?:'[^\W\d_]+)*|[$£€¥¢%]")

Normalize = Callable[[str], list[str]]


def load_normalizer(language: str) -> Normalize:
    """A function that splits a text into words which do not depend on how it is written.

    Capitals and punctuation are removed. English is normalized as Whisper's authors do: spellings,
    contractions and numbers become the same words. Then a number is a word for each of its digits,
    since recognizers write "3 1 4" or "314" for the same sounds.

    Args:
      language: a code such as "en".

    Raises:
      CSMError: transformers is not installed.
      InputError: that is no code.
    """
    if not language.isalpha():
        raise InputError(f"--language is {language}, but must be a code such as en")
    try:
        from transformers.models.whisper.english_normalizer import (
            BasicTextNormalizer,
            EnglishTextNormalizer,
        )
    except ImportError as error:
        raise CSMError(f"{error.name} is missing: pip install 'csm-jax[evaluate]'") from error
    if language == "en":
        english = EnglishTextNormalizer({})
        return lambda text: _find_words(english(_keep_zeros(text)))
    basic = BasicTextNormalizer(split_letters=language in _WITHOUT_SPACES)
    return lambda text: _find_words(basic(text))


def _keep_zeros(text: str) -> str:
    """A text with spaces in numbers like 0117, of which the English normalizer makes 117."""
    return _LEADING_ZERO.sub(lambda found: " ".join(found[0]), text)


def _find_words(text: str) -> list[str]:
    """Words, digits and the signs of money and percentages; "7.997" are four digits."""
    words = _WORD.findall(text)
    # The English normalizer converts all number words but this one.
    return ["1" if word == "one" else word for word in words]
