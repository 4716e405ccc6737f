"""Several turns, spoken one after another, each with the earlier ones as context."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from csm_jax.prompt import Segment
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.api.schemas import Options, make_request
from csm_jax.serve.errors import ApiError
from csm_jax.serve.service import Service


@dataclass(frozen=True)
class SceneLine:
    """What a speaker says."""

    text: str
    speaker: int


async def speak_scene(
    service: Service,
    caller: Caller,
    lines: list[SceneLine],
    context: Sequence[Segment],
    options: Options,
    progress: Callable[[str], None] = lambda message: None,
) -> np.ndarray:
    """All lines as one recording, float32 [num_samples].

    Args:
      progress: called with a message after each line.

    Raises:
      ApiError, CSMError: a line cannot be spoken.
    """
    if len(lines) > service.settings.limits.turns:
        most = service.settings.limits.turns
        raise ApiError(400, f"{len(lines)} lines, but at most {most} are spoken", param="scene")
    # The first is the request, which has been counted when it came.
    service.rate_limits.count_more(caller, len(lines) - 1)
    earlier, audio = list(context), []
    for number, line in enumerate(lines, 1):
        seed = None if options.seed is None else (options.seed + number - 1) % 2**32
        asked = options.model_copy(update={"seed": seed})
        turns = earlier[-service.settings.limits.turns :]
        request = make_request(service, line.text, line.speaker, asked, turns)
        # Recordings are encoded once, for the first line that has them as context.
        request = await service.encode_context(request, caller)
        speech = await service.speak(request, caller, stream=False)
        try:
            audio.append(await speech.audio())
        finally:
            speech.cancel()
        _check_length(service, audio)
        earlier = [*request.context, Segment(line.speaker, line.text, codes=speech.codes())]
        progress(f"line {number} of {len(lines)} spoken")
    return np.concatenate([np.zeros(0, np.float32), *audio])


def _check_length(service: Service, audio: list[np.ndarray]) -> None:
    """Raises `ApiError` if it is longer than one response may be."""
    limit = service.settings.limits.speech_ms
    if 1000 * sum(map(len, audio)) / service.model.sample_rate > limit:
        raise ApiError(400, f"the scene takes more than {limit:g} ms; speak it in parts")
