"""The recordings of a context: decoded newest first, until the model's window is full."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from csm_jax.inference.request import Notice
from csm_jax.prompt.turns import Segment
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.api.schemas import check_length, check_turns
from csm_jax.serve.audio.decoding import check_upload, decode_upload
from csm_jax.serve.errors import ApiError
from csm_jax.serve.service import Service


@dataclass(frozen=True)
class UploadedTurn:
    """A turn of context as it arrives in a request.

    Attributes:
      recording: a file, base64, or a URL for `fetch`.
    """

    speaker: int
    text: str
    recording: str | bytes


@dataclass(frozen=True)
class Context:
    """The newest turns of a request's context, as many as fit the window."""

    turns: Sequence[Segment] = ()
    notices: Sequence[Notice] = ()


Fetch = Callable[[str], Awaitable[bytes]]


async def read_context(
    service: Service,
    caller: Caller,
    uploaded: Sequence[UploadedTurn],
    name: str,
    fetch: Fetch | None = None,
) -> Context:
    """Decodes the recordings of a context, one by one, newest first.

    Turns that do not fit the window are left out; of their recordings only the base64 and the head
    of the file are checked.

    Args:
      name: names the recordings in errors.
      fetch: fetches recordings that are URLs, but no `data:` URIs.

    Raises:
      ApiError, InputError: there are too many turns, or a recording cannot be used.
    """
    limits = service.settings.limits
    check_turns(service, len(uploaded))
    for turn in uploaded:
        check_length(service, turn.text)
    turns: list[Segment] = []
    room = service.engine.max_seq_len * service.model.codec.frame_size
    for turn in reversed(uploaded):
        recording, is_url = turn.recording, fetch is not None and _is_url(turn.recording)
        if room > 0:
            if fetch is not None and _is_url(recording):
                recording = await fetch(recording)
            audio = await service.threads.work(caller, decode_upload, recording, limits, name)
            turns.append(Segment(turn.speaker, turn.text, audio))
            room -= len(audio)
        elif not is_url:
            await service.threads.work(caller, check_upload, recording, limits, name)
    return Context(turns[::-1], _dropped(len(uploaded) - len(turns), len(uploaded)))


async def read_turn(
    service: Service, caller: Caller, turn: UploadedTurn, name: str, transcript_name: str
) -> Context:
    """Decodes a context of one turn, whose transcript may be missing in the request.

    Args:
      name, transcript_name: name the recording and its transcript in errors.

    Raises:
      ApiError, InputError: there is no transcript, or the recording cannot be used.
    """
    if not turn.text.strip():
        message = f"{name} needs {transcript_name}, its transcript"
        raise ApiError(400, message, param=transcript_name)
    return await read_context(service, caller, [turn], name)


def _is_url(recording: str | bytes) -> TypeGuard[str]:
    return isinstance(recording, str) and not recording.startswith("data:")


def _dropped(count: int, total: int) -> list[Notice]:
    if not count:
        return []
    message = (
        f"the oldest {count} of {total} turns of context were left out: the newer ones "
        "fill the model's window"
    )
    return [Notice("context_dropped", message)]
