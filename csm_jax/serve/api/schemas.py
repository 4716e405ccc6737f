"""Fields that requests of several APIs share, and the engine's request that they become."""

import random
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from csm_jax.cli.dataclass_flags import field_descriptions, field_types
from csm_jax.inference.request import MAX_TAKES, Request
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.normalizing import normalize_text
from csm_jax.prompt.turns import Segment
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.api.fields import Fields
from csm_jax.serve.audio.decoding import decode_upload
from csm_jax.serve.errors import ApiError
from csm_jax.serve.service import Service
from csm_jax.serve.voices.files import MAX_SPEAKER
from csm_jax.serve.voices.registry import Voice

# Ranges that int32 and parsers of JSON agree on.
Speaker = Annotated[int, Field(ge=0, le=MAX_SPEAKER)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Text = Annotated[str, Field(min_length=1)]
# A file in a form, or base64 in JSON.
Recording = Annotated[str | bytes, Field(json_schema_extra={"format": "binary"})]

# Of a speaker's number, so that it is an int32.
_MAX_DIGITS = 10
_DESCRIPTIONS = field_descriptions(Sampling)


def _sampling_field(name: str, **limits: Any) -> Any:
    """A field of `Sampling` with its description; None is the server's default."""
    return Field(default=None, description=_DESCRIPTIONS.get(name), **limits)


class Options(Fields):
    """Sampling, seed and length. Fields that are left out are as in `Settings.sampling`."""

    temperature: float | None = Field(default=None, ge=0, le=5, description="0 takes the likeliest")
    top_k: int | None = _sampling_field("top_k", ge=1, le=100_000)
    top_p: float | None = _sampling_field("top_p", gt=0, le=1)
    min_p: float | None = _sampling_field("min_p", ge=0, lt=1)
    repetition_penalty: float | None = _sampling_field("repetition_penalty", gt=0.01, le=100)
    seed: Seed | None = Field(
        default=None, description="the same seed gives the same speech; default: random"
    )
    max_audio_length_ms: float | None = Field(default=None, ge=80, le=86_400_000)
    best_of: int | None = Field(
        default=None, ge=1, le=MAX_TAKES, description="takes to generate, of which the best is kept"
    )

    @classmethod
    def of(cls, sampling: Sampling) -> "Options":
        """The options that equal `sampling`."""
        options = cls(**{name: getattr(sampling, name) for name in _SAMPLING})
        return options.model_copy(update={"temperature": 0.0}) if sampling.greedy else options

    def sampling(self, default: Sampling) -> Sampling:
        """The sampling of these options, with values of `default` for those that are left out."""
        given = self.model_dump(include=_SAMPLING, exclude_none=True)
        if self.temperature == 0:
            given = {"greedy": True}
        elif self.temperature is not None:
            given["greedy"] = False
        return Sampling(**(vars(default) | given))


_SAMPLING = Options.model_fields.keys() & field_types(Sampling).keys()


def make_request(
    service: Service,
    text: str,
    speaker: int,
    options: Options,
    context: Sequence[Segment] = (),
    voice: Voice | None = None,
) -> Request:
    """Makes the request to the engine from the fields of any API.

    Args:
      voice: its recording is the first turn of `speaker`.

    Raises:
      ApiError, InputError: a value is beyond a limit.
    """
    for each in (text, *(turn.text or "" for turn in context)):
        check_length(service, each)
    check_turns(service, len(context))
    best_of = options.best_of or 1
    check_takes(service, best_of)
    shared = [voice.turn(speaker)] if voice else []
    return Request(
        normalize_text(text) if service.settings.normalize else text,
        speaker,
        [*shared, *context],
        options.sampling(service.settings.sampling),
        options.max_audio_length_ms,
        random.getrandbits(32) if options.seed is None else options.seed,
        shared_turns=len(shared),
        pauses=service.settings.normalize,
        best_of=best_of,
    )


def make_named_request(
    service: Service,
    caller: Caller,
    text: str,
    name: str,
    known_names: Sequence[str],
    options: Options,
) -> Request:
    """Makes a request in the voice of `find_speaker`."""
    voice, speaker = find_speaker(service, caller, name, known_names)
    return make_request(service, text, speaker, options, voice=voice)


class NamedSpeaker(NamedTuple):
    """What the name of a voice stands for: a voice, or only the number of a speaker."""

    voice: Voice | None
    number: int


def find_speaker(
    service: Service, caller: Caller, name: str, known_names: Sequence[str]
) -> NamedSpeaker:
    """Finds a voice by its name, by one of an API's `known_names`, or by a speaker number.

    "" and "default" are the default voice, unless there is a voice called "default". On a server
    without voices, a known name is the speaker whose number is its position.

    Raises:
      InputError: there is no such voice.
    """
    name, owner = name.strip(), caller.owner
    if is_default(name) and not service.voices.has(name, owner):
        name = service.settings.default_voice or known_names[0]
    if is_number(name) and not service.voices.has(name, owner):
        return NamedSpeaker(None, int(name))
    voice = service.voices.find_api_voice(name, owner, known_names)
    return NamedSpeaker(voice, voice.speaker if voice else known_names.index(name.casefold()))


def is_default(name: str) -> bool:
    """Whether the name of a voice asks for the default one."""
    return name.strip().casefold() in ("", "default")


def is_number(name: str) -> bool:
    """Whether the name of a voice is the number of a speaker."""
    return name.strip().isdecimal() and len(name.strip()) < _MAX_DIGITS


def check_turns(service: Service, count: int) -> None:
    """Raises `ApiError` for a context of too many turns."""
    limit = service.settings.limits.turns
    if count > limit:
        message = f"{count} turns of context, but at most {limit} are read"
        raise ApiError(400, message, param="context", code="too_long")


def check_takes(service: Service, count: int) -> None:
    """Raises `ApiError` for more takes than the server allows."""
    limit = service.settings.max_best_of
    if count > limit:
        message = f"best_of is {count}, but at most {limit} are generated"
        raise ApiError(400, message, param="best_of", code="too_many")


def check_length(service: Service, text: str) -> None:
    """Raises `ApiError` for a text or transcript that is too long."""
    limit = service.settings.limits.text_characters
    if len(text) > limit:
        message = f"the text has {len(text)} characters, but at most {limit} are spoken"
        raise ApiError(400, message, param="text", code="too_long")


async def read_recording(
    service: Service, recording: str | bytes, name: str, caller: Caller
) -> np.ndarray:
    """Decodes a `Recording` to float32 [num_samples] at 24 kHz. Raises `InputError`."""
    return await service.threads.work(
        caller, decode_upload, recording, service.settings.limits, name
    )
