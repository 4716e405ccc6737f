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
      text: transcript of the recording; "" or spaces if there is none.
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


# Time limit for fetching a recording.
FETCH_SECONDS = 20.0
Fetch = Callable[[str], Awaitable[bytes]]


async def read_context(
    service: Service,
    caller: Caller,
    uploaded: Sequence[UploadedTurn | Segment],
    name: str,
    fetch: Fetch | None = None,
) -> Context:
    """Decodes the recordings of a context, one by one, newest first.

    Turns that do not fit the window are left out; of their recordings only the base64 and the head
    of the file are checked.

    Args:
      uploaded: oldest first; a `Segment` is a turn that needs no decoding.
      name: names the recordings in errors.
      fetch: fetches recordings that are URLs, but no `data:` URIs.

    Raises:
      ApiError, InputError: there are too many turns, or a recording cannot be used.
    """
    limits = service.settings.limits
    check_turns(service, len(uploaded))
    for turn in uploaded:
        check_length(service, turn.text or "")
    turns: list[Segment] = []
    frame_size = service.model.codec.frame_size
    room = service.engine.max_seq_len * frame_size
    for turn in reversed(uploaded):
        if isinstance(turn, Segment):
            if room > 0:
                turns.append(turn)
                room -= frame_size * (0 if turn.codes is None else len(turn.codes))
            continue
        recording, is_url = turn.recording, fetch is not None and _is_url(turn.recording)
        if room > 0:
            if fetch is not None and _is_url(recording):
                recording = await fetch(recording)
            audio = await service.threads.work(caller, decode_upload, recording, limits, name)
            turns.append(Segment(turn.speaker, turn.text if turn.text.strip() else None, audio))
            room -= len(audio)
        elif not is_url:
            await service.threads.work(caller, check_upload, recording, limits, name)
    return Context(turns[::-1], _dropped(len(uploaded) - len(turns), len(uploaded)))


async def fetch_recording(service: Service, caller: Caller, name: str, url: str) -> bytes:
    """Fetches a recording that a request refers to by a URL.

    Args:
      name: of the field with the URL.

    Raises:
      ApiError, InputError: the server does not fetch, or not from there.
    """
    if not service.settings.fetch_urls:
        message = "recordings are not fetched here: send a data: URI, or start with --fetch_urls"
        raise ApiError(400, message, param=name, code="fetching_off")
    most = service.settings.limits.audio_bytes
    return await service.outbound_http.fetch(url, most, FETCH_SECONDS, caller.share)


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
