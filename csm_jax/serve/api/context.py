"""The recordings of a context: decoded until the model's window is full.

Those that fix a voice are decoded first, and then the newest others.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from csm_jax.inference.request import Notice
from csm_jax.prompt.turns import Segment
from csm_jax.prompt.window import find_pinned
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
      pinned, has_sound: as of a `Segment`.
    """

    speaker: int
    text: str
    recording: str | bytes
    pinned: bool = False
    has_sound: bool = True


@dataclass(frozen=True)
class Context:
    """The turns of a request's context that can fit the window, oldest first."""

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
    has_voice: Collection[int] = (),
) -> Context:
    """Decodes the recordings of a context, one by one: pinned ones and others, each newest first.

    Each of the two kinds may fill the window. Of recordings beyond it only the base64 and the head
    of the file are checked.

    Args:
      uploaded: oldest first; a `Segment` is a turn that needs no decoding.
      name: names the recordings in errors.
      fetch: fetches recordings that are URLs, but no `data:` URIs.
      has_voice: speakers whose voice is fixed by other turns.

    Raises:
      ApiError, InputError: there are too many turns, or a recording cannot be used.
    """
    check_turns(service, len(uploaded))
    for turn in uploaded:
        check_length(service, turn.text or "")
    pinned = find_pinned(uploaded, has_voice=has_voice)
    others = set(range(len(uploaded))) - pinned
    frame_size = service.model.codec.frame_size
    turns: dict[int, Segment] = {}
    for indices in (pinned, others):
        room = service.engine.max_seq_len * frame_size
        for index in sorted(indices, reverse=True):
            turn = await _read_turn(service, caller, uploaded[index], name, fetch, room > 0)
            if turn is not None:
                turns[index] = turn
                room -= _num_samples(turn, frame_size)
    kept = [turns[index] for index in sorted(turns)]
    return Context(kept, _dropped(len(uploaded) - len(kept), len(uploaded)))


async def _read_turn(
    service: Service,
    caller: Caller,
    turn: UploadedTurn | Segment,
    name: str,
    fetch: Fetch | None,
    has_room: bool,
) -> Segment | None:
    """A turn with its recording decoded; without room it is only checked."""
    if isinstance(turn, Segment):
        return turn if has_room else None
    recording, limits = turn.recording, service.settings.limits
    is_address = fetch is not None and _is_url(recording)
    if not has_room:
        if not is_address:
            await service.threads.work(caller, check_upload, recording, limits, name)
        return None
    if fetch is not None and _is_url(recording):
        recording = await fetch(recording)
    audio = await service.threads.work(caller, decode_upload, recording, limits, name)
    return Segment(turn.speaker, turn.text if turn.text.strip() else None, audio)


def _num_samples(turn: Segment, frame_size: int) -> int:
    if turn.codes is not None:
        return frame_size * len(turn.codes)
    return 0 if turn.audio is None else len(turn.audio)


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
        f"{count} of {total} turns of context were left out: the others fill the model's window"
    )
    return [Notice("context_dropped", message)]
