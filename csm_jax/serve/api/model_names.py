"""Names of models in requests: the server's own, those of OpenAI and ElevenLabs that it stands for,
and others.

There is one model. So a request for any other is served by it, with a notice, unless the server is
strict.
"""

import re

from csm_jax.inference.request import Notice
from csm_jax.serve.errors import ApiError
from csm_jax.serve.settings import Settings

# The released model, as its repository and the services that host it call it.
_RELEASED = ("csm-1b", "sesame/csm-1b")
_HOSTED = re.compile(
    r"tts-1(-hd)?|gpt-4o-mini-tts|gpt-4o(-mini)?-audio-preview|gpt-audio(-mini|-1\.5)?"
    r"|eleven_[a-z0-9_]{1,40}"
)
_DATE = re.compile(r"-\d{4}(-?\d{2}-?\d{2})?$")


def is_model(settings: Settings, name: str) -> bool:
    """Whether this is the server's model, in any case, or one of others' that it stands for."""
    name = name.strip().casefold()
    own = settings.model_name.casefold()
    return name in (own, *_RELEASED) or _HOSTED.fullmatch(_DATE.sub("", name)) is not None


def check_model(settings: Settings, name: str) -> list[Notice]:
    """A notice if a request is for another model; "" is the server's own.

    Raises:
      ApiError: it is for another one, and the server is strict.
    """
    if not name.strip() or is_model(settings, name):
        return []
    if settings.strict_models:
        raise no_model(settings, name)
    message = f"there is no model {name[:80]!r}: {settings.model_name} speaks instead"
    return [Notice("model_ignored", message)]


def no_model(settings: Settings, name: str) -> ApiError:
    """The error for a model that does not exist here."""
    message = f"there is no model {name[:80]!r}: ask for {settings.model_name}"
    return ApiError(404, message, "model", "model_not_found")
