"""Prompts: a conversation as the frames that the backbone is prefilled with.

A turn is BOS, "[speaker]text", EOS, then its audio frames and one frame of zeros; the turn to be
spoken has text only (SesameAILabs/csm `generator.py`). Other models want a space after the bracket
(MisoLabsAI/MisoTTS `generator.py`), which is part of their config. A recording without a transcript
keeps its "[speaker]", which is how the model knows whose voice it is.
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.errors import InputError
from csm_jax.io.arguments import whole_number
from csm_jax.io.audio import check_audio, is_silent
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
    """

    speaker: int
    text: str | None
    audio: np.ndarray | None = None
    codes: np.ndarray | None = None

    def __post_init__(self):
        object.__setattr__(self, "speaker", whole_number(self.speaker, "speaker"))


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
    """A turn of the context: checked, of known length, and encoded when its rows are needed.

    Attributes:
      length: positions that its rows take.
      is_silent: whether it has audio without a sound in it.
    """

    def __init__(self, turn: Segment, config: CSMConfig, tokenizer: Tokenizer):
        """Raises `InputError`: a text is empty; audio or codes are not what they should be."""
        self._config = config
        _check_contents(turn)
        if turn.text is not None:
            check_text(turn.text)
        self._text = _tagged_rows(turn.text or "", turn.speaker, config, tokenizer)
        self._audio: np.ndarray | None = None
        self._sound: Prompt | None = None
        self.length = len(self._text.frames)
        self.is_silent = False
        if turn.codes is not None:
            self._sound = _audio_rows(np.asarray(turn.codes), config)
            self.length += len(self._sound.frames)
        elif turn.audio is not None:
            self._audio = check_audio(turn.audio)
            self.is_silent = is_silent(self._audio)
            # The codec pads to whole frames; a frame of zeros ends the turn.
            self.length += -(-len(self._audio) // config.codec.frame_size) + 1

    def rows(self, encode: Encode | None = None) -> list[Prompt]:
        """The rows of its text, and of its audio if it has any; `encode` is called at most once.

        Raises:
          ValueError: the turn has audio, and there is no `encode`.
        """
        if self._audio is not None:
            if encode is None:
                raise ValueError("a turn with audio needs the codec")
            self._sound = _audio_rows(np.asarray(encode(self._audio)), self._config)
            self._audio = None
        return [self._text] if self._sound is None else [self._text, self._sound]


def check_turn(turn: Segment, config: CSMConfig) -> None:
    """Checks what a `Turn` checks, without making its rows. Raises `InputError`."""
    _check_contents(turn)
    if turn.text is not None:
        check_text(turn.text)
    check_unicode(tagged_text(turn.text or "", turn.speaker, config))
    if turn.codes is not None:
        _check_codes(np.asarray(turn.codes), config)
    elif turn.audio is not None:
        check_audio(turn.audio)


def _check_contents(turn: Segment) -> None:
    if turn.text is None and turn.audio is None and turn.codes is None:
        raise InputError("a turn has neither a text nor audio: give one of them")


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


def text_rows(text: str, speaker: int, config: CSMConfig, tokenizer: Tokenizer) -> Prompt:
    """The rows of a text, which are all rows of a turn that is to be spoken.

    Raises:
      InputError: the text is empty.
    """
    check_text(text)
    return _tagged_rows(text, speaker, config, tokenizer)


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
