"""Flags of voices as files: which voice speaks, and where the voice of recordings is kept."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from csm_jax.cli import flags as cli
from csm_jax.errors import InputError
from csm_jax.inference.generator import Generator
from csm_jax.inference.voice import Voice
from csm_jax.prompt.turns import Segment

SUFFIX = ".safetensors"


@dataclasses.dataclass(frozen=True)
class VoiceFiles:
    """The voices that are read and the one that is written.

    Attributes:
      voices: with their weights; more than one are mixed.
      out: where the voice that speaks is written; None writes none.
    """

    voices: Sequence[tuple[Voice, float]] = ()
    out: Path | None = None

    def prepare(self, model: Generator, recordings: Sequence[Segment]) -> Voice | None:
        """The voice to speak with; writes it, or else that of recordings, if it is to be kept.

        Raises:
          CheckpointError, InputError, OutputError: as `Generator.make_voice`, `mix_voices` and
            `Voice.save`; or the voice is of another model.
        """
        voice = self._find(model)
        if self.out is not None:
            (voice or model.make_voice(recordings)).save(self.out)
        return voice

    def _find(self, model: Generator) -> Voice | None:
        for voice, _ in self.voices:
            voice.check(model.identity)
        if len(self.voices) > 1:
            voices, weights = zip(*self.voices, strict=True)
            return model.mix_voices(voices, weights)
        return self.voices[0][0] if self.voices else None


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `read_voices`."""
    define = cli.definer(values)
    voices = f"voice of --save_voice to speak with; FILE{SUFFIX}:0.7,FILE{SUFFIX}:0.3 are mixed"
    define(flags.DEFINE_list, "voice", [], voices)
    saved = f"write the voice of --context_audio, or of --voice, to this {SUFFIX} file"
    define(flags.DEFINE_string, "save_voice", None, saved)


def read_voices(values: flags.FlagValues) -> VoiceFiles:
    """The voices that the flags name. Raises `InputError` for files that are none."""
    out = None if values.save_voice is None else Path(values.save_voice)
    if out is not None and out.suffix != SUFFIX:
        raise InputError(f"--save_voice is {out}, but must end with {SUFFIX}")
    if out is not None and not (values.voice or values.context_audio):
        raise InputError("--save_voice needs recordings: give --context_audio, or --voice")
    return VoiceFiles([_read(given) for given in values.voice], out)


def _read(given: str) -> tuple[Voice, float]:
    path, colon, weight = given.rpartition(":")
    if not colon or weight.endswith(SUFFIX):
        return Voice.load(given), 1.0
    try:
        number = float(weight)
    except ValueError as error:
        raise InputError(f"--voice has {given}, but must be FILE or FILE:WEIGHT") from error
    return Voice.load(path), number
