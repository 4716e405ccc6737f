"""The API of voices: lists, adds, downloads and deletes them."""

from pathlib import Path

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, Field

from csm_jax.io.audio import decode_audio, encode_audio
from csm_jax.io.samples import SAMPLE_RATE
from csm_jax.serve.admission.caller import Caller, caller_of
from csm_jax.serve.api.fields import Fields, ignored
from csm_jax.serve.api.parsing import describe, read_fields
from csm_jax.serve.api.responses import add_notices, cancel_on_disconnect
from csm_jax.serve.api.schemas import (
    Recording,
    Speaker,
    check_length,
    read_recording,
)
from csm_jax.serve.errors import ApiError
from csm_jax.serve.service import NO_TRANSCRIPT, Service
from csm_jax.serve.voices.files import check_name
from csm_jax.serve.voices.registry import Voice, Voices


class VoiceEntry(BaseModel):
    id: str = Field(description="the same as the name")
    name: str
    speaker: int
    text: str = Field(description="transcript of the recording, for callers with a key")
    seconds: float
    deletable: bool


class VoiceList(BaseModel):
    voices: list[VoiceEntry]


class NewVoice(Fields):
    name: str = Field(max_length=64)
    speaker: Speaker = 0
    text: str = Field(
        "", description="transcript of the recording, without which the speech can be less clear"
    )
    audio: Recording = Field(description="the recording: a file, or base64 in JSON")


def router(service: Service) -> APIRouter:
    """The routes of the API of voices."""
    routes = APIRouter(prefix="/v1/audio/voices", tags=["Voices"])
    voices = service.voices

    @routes.get("")
    def list_voices(http: HTTPRequest) -> VoiceList:
        """Without a key, the shared voices, but not their transcripts."""
        caller = caller_of(http)
        entries = [_entry(voice) for voice in voices.visible_to(caller.owner)]
        if caller.has_no_key:
            entries = [entry.model_copy(update={"text": ""}) for entry in entries]
        return VoiceList(voices=entries)

    @routes.post("", status_code=201, openapi_extra=describe(NewVoice, forms=True))
    async def add(http: HTTPRequest, response: Response) -> VoiceEntry:
        fields = await read_fields(http, NewVoice, recordings=True, forms=True)
        check_name(fields.name)
        check_length(service, fields.text)
        voice = await cancel_on_disconnect(http, _add(service, caller_of(http), fields))
        add_notices(response, ignored(fields.unknown) + [NO_TRANSCRIPT] * (not voice.text))
        return _entry(voice)

    @routes.get("/{name}", response_class=Response)
    async def download(http: HTTPRequest, name: str) -> Response:
        caller = caller_of(http)
        voice = _find(service, name, caller.owner)
        data = await service.threads.work(caller, _as_wav, voices, voice)
        return Response(data, media_type="audio/wav")

    @routes.delete("/{name}", status_code=204)
    async def delete(http: HTTPRequest, name: str) -> None:
        owner = caller_of(http).owner
        _find(service, name, owner)
        await service.threads.wait(voices.delete, owner, name)

    return routes


async def _add(service: Service, caller: Caller, fields: NewVoice) -> Voice:
    with await service.admit(caller):
        audio = await read_recording(service, fields.audio, "audio", caller)
        arguments = caller.owner, fields.name, fields.speaker, fields.text, audio
        return await service.add_voice(caller, *arguments)


def _find(service: Service, name: str, owner: str) -> Voice:
    if not service.voices.has(name, owner):
        raise ApiError(404, f"there is no voice {name[:80]!r}", "voice", "voice_not_found")
    return service.voices.find(name, owner)


def _as_wav(voices: Voices, voice: Voice) -> bytes:
    audio = decode_audio(voices.recording(voice), Path(f"{voice.name}.flac"), SAMPLE_RATE)
    return encode_audio(audio, SAMPLE_RATE, ".wav")


def _entry(voice: Voice) -> VoiceEntry:
    return VoiceEntry(
        id=voice.name,
        name=voice.name,
        speaker=voice.speaker,
        text=voice.text,
        seconds=round(voice.seconds, 2),
        deletable=voice.is_own,
    )
