"""Recordings that come as context: read newest first, until the window is full."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from csm_jax.prompt import Segment
from csm_jax.request import Notice
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.api.schemas import check_length, check_turns
from csm_jax.serve.audio.decoding import check, decode
from csm_jax.serve.errors import ApiError
from csm_jax.serve.service import Service


@dataclass(frozen=True)
class GivenTurn:
    """A turn as a request has it.

    Attributes:
      recording: a file, base64, or an address for `fetch`.
    """

    speaker: int
    text: str
    recording: str | bytes


@dataclass(frozen=True)
class Context:
    """The newest turns of a request's context, as many as can fit the window."""

    turns: Sequence[Segment] = ()
    notices: Sequence[Notice] = ()


Fetch = Callable[[str], Awaitable[bytes]]


async def read_context(
    service: Service,
    caller: Caller,
    given: Sequence[GivenTurn],
    name: str,
    fetch: Fetch | None = None,
) -> Context:
    """Decodes the recordings of a context, one after the other, newest first.

    Those that come after the window is full are left out: of them only base64 and the head of the
    file are looked at.

    Args:
      name: what errors call the recordings.
      fetch: gets the recordings whose text is no `data:` URI.

    Raises:
      ApiError, InputError: there are too many turns, or a recording cannot be used.
    """
    limits = service.settings.limits
    check_turns(service, len(given))
    for turn in given:
        check_length(service, turn.text)
    turns: list[Segment] = []
    room = service.engine.max_seq_len * service.model.codec.frame_size
    for turn in reversed(given):
        is_address = fetch is not None and not str(turn.recording).startswith("data:")
        if room > 0:
            recording = await fetch(turn.recording) if is_address else turn.recording
            audio = await service.work(caller, decode, recording, limits, name)
            turns.append(Segment(turn.speaker, turn.text, audio))
            room -= len(audio)
        elif not is_address:
            await service.work(caller, check, turn.recording, limits, name)
    return Context(turns[::-1], _dropped(len(given) - len(turns), len(given)))


async def read_turn(
    service: Service, caller: Caller, turn: GivenTurn, name: str, transcript_name: str
) -> Context:
    """`read_context` of one turn, whose transcript the request may have left out.

    Args:
      name, transcript_name: what errors call the recording and its transcript.

    Raises:
      ApiError, InputError: there is no transcript, or the recording cannot be used.
    """
    if not turn.text.strip():
        message = f"{name} needs {transcript_name}, what is said in it"
        raise ApiError(400, message, param=transcript_name)
    return await read_context(service, caller, [turn], name)


def _dropped(count: int, total: int) -> list[Notice]:
    if not count:
        return []
    message = (
        f"the oldest {count} of {total} turns of context were left out: the newer ones last as "
        "long as the model hears"
    )
    return [Notice("context_dropped", message)]
