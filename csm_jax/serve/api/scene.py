"""A scene: lines that are spoken one after another as turns of a conversation."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from csm_jax.inference.conversation import Conversation
from csm_jax.prompt.turns import Segment
from csm_jax.prompt.window import find_newest
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
    seed = random.getrandbits(32) if options.seed is None else options.seed
    conversation, audio = Conversation(service.engine, context, seed=seed), []
    for number, line in enumerate(lines, 1):
        line_options = options.model_copy(update={"seed": conversation.next_seed})
        earlier = conversation.turns
        turns = [earlier[i] for i in find_newest(earlier, service.settings.limits.turns)]
        request = make_request(service, line.text, line.speaker, line_options, turns)
        request = await service.encode_context(request, caller)
        # With the codes of recordings, which are encoded once: for the first line.
        conversation.turns = list(request.context)
        speech = await service.speak(request, caller, stream=False)
        try:
            audio.append(await speech.audio())
        finally:
            speech.cancel()
        _check_length(service, audio)
        conversation.add_spoken(request.spoken_text, line.speaker, speech.codes())
        progress(f"line {number} of {len(lines)} spoken")
    return np.concatenate([np.zeros(0, np.float32), *audio])


def _check_length(service: Service, audio: list[np.ndarray]) -> None:
    """Raises `ApiError` if it is longer than one response may be."""
    limit = service.settings.limits.speech_ms
    if 1000 * sum(map(len, audio)) / service.model.sample_rate > limit:
        raise ApiError(400, f"the scene takes more than {limit:g} ms; speak it in parts")
