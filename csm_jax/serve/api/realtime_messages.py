"""The messages of a conversation's client, and the utterances that they become."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import Field, TypeAdapter

from csm_jax.serve.api.fields import Fields
from csm_jax.serve.api.schemas import Options, Speaker, Text
from csm_jax.serve.voices.registry import Voice, Voices


class Change(Options):
    """A change of settings; fields that are left out stay as they are."""

    keeps_null: ClassVar[frozenset[str]] = frozenset({"voice"})

    voice: str | None = Field(None, max_length=64)
    speaker: Speaker | None = None
    words: bool | None = Field(None, description="whether to tell when each word is spoken")


class SetSession(Change):
    type: Literal["session"]


class Say(Change):
    type: Literal["say"]
    text: Text


class AddText(Fields):
    type: Literal["text"]
    text: str


class Flush(Fields):
    type: Literal["flush"]


class AddTurn(Fields):
    type: Literal["turn"]
    speaker: Speaker
    text: str | None = None
    audio: str | None = Field(None, description="base64")


class Cancel(Fields):
    type: Literal["cancel"]
    id: Annotated[int, Field(ge=1)] | None = Field(
        None, description="of the utterance that was played; default: the last that began"
    )
    audio_end_ms: Annotated[float, Field(ge=0, le=86_400_000)] | None = Field(
        None, description="how much of it was played; default: what was sent"
    )


MESSAGE = TypeAdapter(
    Annotated[SetSession | AddText | Flush | Say | AddTurn | Cancel, Field(discriminator="type")]
)


@dataclass(frozen=True)
class UtteranceSettings:
    """The voice and the sampling of utterances, and whether their words are told."""

    options: Options = field(default_factory=Options)
    voice: Voice | None = None
    speaker: int = 0
    words: bool = False

    def changed(self, change: Change, voices: Voices, owner: str) -> "UtteranceSettings":
        """These settings with the fields that are set in `change`. Raises `InputError`."""
        voice, speaker = self.voice, self.speaker
        if change.voice is not None:
            voice = voices.find(change.voice, owner)
            speaker = voice.speaker
        elif "voice" in change.model_fields_set:
            voice = None
        given = change.model_dump(include=set(Options.model_fields), exclude_none=True)
        options = self.options.model_copy(update=given)
        speaker = speaker if change.speaker is None else change.speaker
        words = self.words if change.words is None else change.words
        return UtteranceSettings(options, voice, speaker, words)


@dataclass(frozen=True)
class Utterance:
    """A text that waits to be spoken, with its settings."""

    id: int
    text: str
    settings: UtteranceSettings
