"""Messages of a chat as turns of a conversation, and the text that is to be spoken next."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, FailFast, Field

from csm_jax.prompt.turns import Segment
from csm_jax.serve.api.context import UploadedTurn
from csm_jax.serve.api.fields import Fields
from csm_jax.serve.api.spoken_turns import SpokenTurn
from csm_jax.serve.errors import ApiError

MAX_MESSAGES = 4096
MAX_PARTS = 64
# Messages of these roles are instructions, which the model does not follow.
_INSTRUCTIONS = ("system", "developer")


class InputAudio(Fields):
    data: str = Field(description="a recording: base64, or a data: URI")
    format: str | None = Field(None, max_length=16, description="found in the recording itself")


class TextPart(Fields):
    type: Literal["text"]
    text: str


class AudioPart(Fields):
    type: Literal["input_audio"]
    input_audio: InputAudio


class SpokenAudio(Fields):
    id: str = Field(max_length=64, description="of an earlier response")


Part = Annotated[TextPart | AudioPart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Part],
        FailFast(),
        BeforeValidator(_as_parts, json_schema_input_type=str | list[Part]),
    ] = Field([], max_length=MAX_PARTS)
    audio: SpokenAudio | None = None


class Speakers(NamedTuple):
    """The numbers of the two speakers."""

    user: int
    assistant: int


@dataclass(frozen=True)
class Script:
    """What the messages of a request ask for.

    Attributes:
      text: to be spoken.
      turns: before it, oldest first.
      has_instructions: whether there are messages that are not part of the conversation.
    """

    text: str
    turns: Sequence[UploadedTurn | Segment]
    has_instructions: bool


def read_script(
    messages: Sequence[Message], speakers: Speakers, find: Callable[[str], SpokenTurn | None]
) -> Script:
    """Reads the messages: the last text of the last one is spoken, the others are context.

    A text that a client sent to have it spoken stays in its list of messages, before the message
    with the speech. It is not a turn of its own there.

    Args:
      find: finds earlier speech by its id.

    Raises:
      ApiError: there is no text to speak, or no speech of an id.
    """
    conversation = [each for each in messages if each.role not in _INSTRUCTIONS]
    if not conversation or conversation[-1].audio is not None:
        raise _no_text()
    spoken = [_find(find, each.audio.id) if each.audio else None for each in conversation]
    turns: list[UploadedTurn | Segment] = []
    for message, speech, next_speech in zip(conversation, spoken, [*spoken[1:], None], strict=True):
        speaker = speakers.user if message.role == "user" else speakers.assistant
        if speech is not None:
            turns.append(Segment(speaker, speech.text, codes=speech.codes))
            continue
        parts, text = _split_text(message)
        was_spoken = next_speech is not None and next_speech.written == text
        is_script = was_spoken or message is conversation[-1]
        turns += _as_turns(parts if is_script else message.content, speaker)
    _, text = _split_text(conversation[-1])
    if text is None:
        raise _no_text()
    return Script(text, turns, len(conversation) < len(messages))


def _no_text() -> ApiError:
    message = "the last message has no text at its end: end it with the text to speak"
    return ApiError(400, message, param="messages")


def _find(find: Callable[[str], SpokenTurn | None], turn_id: str) -> SpokenTurn:
    turn = find(turn_id)
    if turn is None:
        message = f"there is no audio {turn_id!r} any more: send its recording as input_audio"
        raise ApiError(400, message, param="messages", code="audio_not_found")
    return turn


def _split_text(message: Message) -> tuple[Sequence[TextPart | AudioPart], str | None]:
    """A message without the text at its end, and that text; None if its end is no text."""
    last = message.content[-1] if message.content else None
    if isinstance(last, TextPart):
        return message.content[:-1], last.text
    return message.content, None


def _as_turns(parts: Sequence[TextPart | AudioPart], speaker: int) -> list[UploadedTurn | Segment]:
    """The turns of a message: texts alone, or recordings with their transcripts."""
    texts = [part.text for part in parts if isinstance(part, TextPart) and part.text.strip()]
    recordings = [part.input_audio.data for part in parts if isinstance(part, AudioPart)]
    if not recordings:
        return [Segment(speaker, " ".join(texts))] if texts else []
    if len(recordings) == 1:
        texts = [" ".join(texts)]
    texts = texts or [""] * len(recordings)
    if len(texts) != len(recordings):
        message = f"a message has {len(recordings)} recordings and {len(texts)} texts"
        raise ApiError(400, f"{message}: send a transcript for each, or none", param="messages")
    return [UploadedTurn(speaker, *pair) for pair in zip(texts, recordings, strict=True)]
