"""Prompts: a conversation as the frames that the backbone is prefilled with.

A turn is BOS, "[speaker]text", EOS, then its audio frames and one frame of zeros; the turn to be
spoken has text only (SesameAILabs/csm `generator.py`). Other models want a space after the bracket
(MisoLabsAI/MisoTTS `generator.py`), which is part of their config. A recording without a transcript
keeps its "[speaker]", which is how the model knows whose voice it is.
"""

import functools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.errors import InputError
from csm_jax.io.arguments import whole_number
from csm_jax.io.samples import check_audio, is_silent
from csm_jax.prompt.tokenizer import Tokenizer, check_unicode

# Unicode's spaces, controls, formats (zero width) and accents; and letters that are blank.
_SILENT = {"Zs", "Zl", "Zp", "Cc", "Cf", "Mn", "Mc", "Me"}
_BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"
# The codec: audio [num_samples] to codes [num_frames, Q].
Encode = Callable[[np.ndarray], np.ndarray]


class Prompt(NamedTuple):
    """The rows that a model is prefilled with, or some of them.

    Attributes:
      frames: int32 [T, Q + 1], each row Q audio codes and one text id.
      mask: bool [T, Q + 1], the columns of each row that count.
    """

    frames: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Segment:
    """One turn of the conversation so far.

    Attributes:
      speaker: any whole number, of Python or numpy; the same number is the same voice.
      text: the transcript of `audio`; None for a recording without one.
      audio: float [num_samples] at 24 kHz, mono; None for a turn of text alone.
      codes: int [num_frames, Q], used instead of `audio` where the codes are known already.
      pinned: whether the turn fixes its speaker's voice, and so stays when others are left out. Of
        a speaker without pinned turns, it is the first turn with sound (`window.find_pinned`).
    """

    speaker: int
    text: str | None
    audio: np.ndarray | None = None
    codes: np.ndarray | None = None
    pinned: bool = False

    def __post_init__(self):
        object.__setattr__(self, "speaker", whole_number(self.speaker, "speaker"))

    @property
    def has_sound(self) -> bool:
        """Whether it has audio, or codes of at least one frame."""
        return self.audio is not None if self.codes is None else len(self.codes) > 0


def check_text(text: str) -> None:
    """Raises `InputError` for text without speech: spaces, marks and invisible characters."""
    if not isinstance(text, str):
        raise InputError(f"the text is of type {type(text).__name__}, but must be a str")
    if all(_is_silent(character) for character in text):
        raise InputError("the text is empty: there is nothing to say")


def tagged_text(text: str, speaker: int, config: CSMConfig) -> str:
    """The text of a turn as the model was trained with it; the words of `text` are its end."""
    return f"[{speaker}] {text.lstrip()}" if config.space_after_speaker else f"[{speaker}]{text}"


class Turn:
    """A turn of the context: checked at once, but tokenized and encoded when it is needed.

    Attributes:
      speaker: number of the voice.
      num_frames: of its audio.
      is_silent: whether it has audio without a sound in it.
    """

    def __init__(self, turn: Segment, config: CSMConfig, tokenizer: Tokenizer):
        """Raises `InputError`: a text is empty; audio or codes are not what they should be."""
        if turn.text is None and turn.audio is None and turn.codes is None:
            raise InputError("a turn has neither a text nor audio: give one of them")
        if turn.text is not None:
            check_text(turn.text)
        self._words = turn.text or ""
        check_unicode(tagged_text(self._words, turn.speaker, config))
        self._config = config
        self._tokenizer = tokenizer
        self._codes: np.ndarray | None = None
        self._audio: np.ndarray | None = None
        self._sound: Prompt | None = None
        self.speaker = turn.speaker
        self.num_frames = 0
        self.is_silent = False
        if turn.codes is not None:
            self._codes = np.asarray(turn.codes)
            _check_codes(self._codes, config)
            self.num_frames = len(self._codes)
        elif turn.audio is not None:
            self._audio = check_audio(turn.audio)
            self.is_silent = is_silent(self._audio)
            # The codec pads to whole frames.
            self.num_frames = -(-len(self._audio) // config.codec.frame_size)

    @property
    def length(self) -> int:
        """Positions that its rows take. The first call tokenizes the text."""
        has_audio = self._codes is not None or self._audio is not None
        # A frame of zeros ends the audio.
        return len(self._text.frames) + (self.num_frames + 1 if has_audio else 0)

    def rows(self, encode: Encode | None = None) -> list[Prompt]:
        """The rows of its text, and of its audio if it has any; `encode` is called at most once.

        Raises:
          ValueError: the turn has audio, and there is no `encode`.
        """
        if self._audio is not None:
            if encode is None:
                raise ValueError("a turn with audio needs the codec")
            self._codes = np.asarray(encode(self._audio))
            self._audio = None
        if self._codes is None:
            return [self._text]
        if self._sound is None:
            self._sound = _audio_rows(self._codes, self._config)
        return [self._text, self._sound]

    @functools.cached_property
    def _text(self) -> Prompt:
        return _tagged_rows(self._words, self.speaker, self._config, self._tokenizer)


def _is_silent(character: str) -> bool:
    return unicodedata.category(character) in _SILENT or character in _BLANK_LETTERS


def turn_rows(
    turn: Segment, config: CSMConfig, tokenizer: Tokenizer, encode: Encode | None = None
) -> list[Prompt]:
    """The rows of a turn of the context: its text, and its audio if it has any.

    Args:
      encode: the codec; needed for a turn with audio.

    Raises:
      InputError: a text is empty; audio or codes are not what they should be.
    """
    return Turn(turn, config, tokenizer).rows(encode)


def text_rows(text: str | None, speaker: int, config: CSMConfig, tokenizer: Tokenizer) -> Prompt:
    """The rows of a text, which are all rows of a turn that is to be spoken.

    Args:
      text: None is the tag of the speaker without words.

    Raises:
      InputError: the text is empty.
    """
    if text is not None:
        check_text(text)
    return _tagged_rows(text or "", speaker, config, tokenizer)


def _tagged_rows(text: str, speaker: int, config: CSMConfig, tokenizer: Tokenizer) -> Prompt:
    ids = tokenizer.encode(tagged_text(text, speaker, config))
    frames = np.zeros((len(ids), config.num_codebooks + 1), np.int32)
    frames[:, -1] = ids
    mask = np.zeros(frames.shape, bool)
    mask[:, -1] = True
    return Prompt(frames, mask)


def _audio_rows(codes: np.ndarray, config: CSMConfig) -> Prompt:
    """Code frames and the frame of zeros that ends them."""
    _check_codes(codes, config)
    frames = np.zeros((len(codes) + 1, config.num_codebooks + 1), np.int32)
    frames[:-1, :-1] = codes
    mask = np.ones(frames.shape, bool)
    mask[:, -1] = False
    return Prompt(frames, mask)


def _check_codes(codes: np.ndarray, config: CSMConfig) -> None:
    if codes.ndim != 2 or codes.shape[1] != config.num_codebooks:
        raise InputError(
            f"codes have shape {list(codes.shape)}, expected [num_frames, {config.num_codebooks}]"
        )
    if not np.issubdtype(codes.dtype, np.integer):
        raise InputError(f"codes have dtype {codes.dtype}, expected whole numbers")
    limit = config.audio_vocab_size
    if codes.size and not 0 <= codes.min() <= codes.max() < limit:
        raise InputError(f"codes range {codes.min()}..{codes.max()}, expected 0..{limit - 1}")


def join_rows(parts: Sequence[Prompt]) -> Prompt:
    """One prompt of several, in their order."""
    return Prompt(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
