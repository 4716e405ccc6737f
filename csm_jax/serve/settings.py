"""What a server is told once, when it starts."""

from dataclasses import dataclass, field
from pathlib import Path

from csm_jax.sampling import Sampling
from csm_jax.speech import DEFAULT_SAMPLING


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. All of it is checked while the request is read.

    Attributes:
      body_bytes: of a request.
      text_characters: of what is to be said.
      audio_bytes: of one recording, as it comes.
      audio_seconds: of one recording, decoded.
      turns: of a context or a scene.
      speech_ms: of one answer.
    """

    body_bytes: int = 32_000_000
    text_characters: int = 10_000
    audio_bytes: int = 10_000_000
    audio_seconds: float = 60.0
    turns: int = 64
    speech_ms: float = 600_000.0


@dataclass(frozen=True)
class Settings:
    """Attributes:
    model_name: what the APIs call the model.
    sampling: what a request gets that says nothing of it.
    max_batch, max_seq_len, max_queue: of the `Engine`.
    voices: directory of presets; new ones are written there.
    data: directory of what outlives the process: batches and their files.
    api_keys: who has one may speak; none lets everybody.
    requests_per_minute: of one key, or of one address where there are no keys; 0 is any number.
    fetch_urls: whether recordings are fetched from addresses in requests.
    allow_private: whether such addresses, and those of webhooks, may be private ones.
    cors_origins: whose pages may call; none lets no other page.
    webhook_secret: what results are signed with that are posted to a webhook; none posts none.
    """

    model_name: str = "csm-1b"
    sampling: Sampling = DEFAULT_SAMPLING
    max_batch: int = 8
    max_seq_len: int = 2048
    max_queue: int = 64
    voices: Path | None = None
    data: Path | None = None
    api_keys: tuple[str, ...] = ()
    requests_per_minute: int = 0
    fetch_urls: bool = False
    allow_private: bool = False
    cors_origins: tuple[str, ...] = ()
    webhook_secret: str = ""
    limits: Limits = field(default_factory=Limits)
