"""Settings and limits of a server, fixed when it starts."""

from dataclasses import dataclass, field
from pathlib import Path

from csm_jax.request import DEFAULT_SAMPLING
from csm_jax.sampling import Sampling


@dataclass(frozen=True)
class Limits:
    """What one request or connection may cost, checked before the cost arises.

    Attributes:
      json_bytes: of a request body where no recordings can be.
      body_bytes: of a request body where recordings can be.
      pending_body_bytes: of all request bodies that are held at once.
      pending_response_bytes: of all responses that are held until their clients have taken them;
        half of it for one caller.
      json_values: commas and brackets of a JSON body: how many values it can have.
      text_characters: of what is to be said, and of a transcript.
      audio_bytes: of one recording, as it comes.
      audio_seconds: of one recording, decoded. All recordings of a context together may last as
        long as the model's window.
      turns: of a context or a scene. For fal's API it can be lower than the default, not higher.
      speech_ms: of one response.
      connections: open at once.
      connections_per_address: open at once from one address (the /64 for IPv6). When there are
        more, the one that has been idle longest is closed.
      head_seconds: until the head of a request is complete.
      body_seconds, body_bytes_per_second: a body must be complete after so many seconds, and one
        more for every so many bytes that have come.
      idle_seconds: between two requests of a connection.
      write_seconds, response_bytes_per_second: while something waits for the client of a response,
        it must take so many bytes a second, over so many seconds. The slowest streams of speech
        that are played as they come have about 4 kB a second.
      unread_seconds: of speech of all responses together that waits to be read; the slowest reader
        is dropped when there is more.
      read_pace, read_pace_seconds: a reader for whom something has waited all the time must take
        so many seconds of speech a second, over so many seconds.
      sockets_per_caller: WebSockets that one caller has open at once, and as many streams of the
        states of its jobs.
      socket_idle_seconds: without a message from the client of a WebSocket that is not speaking.
      stored_bytes: of the whole database, with deleted lines until they are removed; in memory,
        where there is no data directory, at most 1 GB. It is checked when something is added.
      stored_bytes_per_owner: of the contents of an owner's files, batches with their results,
        voices, jobs with their results, and webhooks that wait; at most a quarter of the total.
        Without API keys there is one owner, which can fill the total.
      files_per_owner, batches_per_owner: that are stored.
      voices, voices_per_owner: that are added, by all owners and by one.
      download_bytes, download_bytes_per_owner: of files that fal's responses point to.
    """

    json_bytes: int = 256_000
    body_bytes: int = 32_000_000
    pending_body_bytes: int = 256_000_000
    pending_response_bytes: int = 512_000_000
    json_values: int = 100_000
    text_characters: int = 10_000
    audio_bytes: int = 10_000_000
    audio_seconds: float = 60.0
    turns: int = 64
    speech_ms: float = 600_000.0
    connections: int = 8192
    connections_per_address: int = 512
    head_seconds: float = 10.0
    body_seconds: float = 20.0
    body_bytes_per_second: int = 50_000
    idle_seconds: float = 15.0
    write_seconds: float = 30.0
    response_bytes_per_second: int = 2000
    unread_seconds: float = 6000.0
    read_pace: float = 0.1
    read_pace_seconds: float = 60.0
    sockets_per_caller: int = 64
    socket_idle_seconds: float = 300.0
    stored_bytes: int = 4_000_000_000
    stored_bytes_per_owner: int = 1_000_000_000
    files_per_owner: int = 2000
    batches_per_owner: int = 1000
    voices: int = 256
    voices_per_owner: int = 64
    download_bytes: int = 256_000_000
    download_bytes_per_owner: int = 64_000_000


@dataclass(frozen=True)
class Settings:
    """How a server runs.

    Attributes:
      model_name: what the APIs call the model.
      sampling: for requests that do not say.
      max_batch, max_seq_len, max_queue: of the `Engine`.
      voices: directory of shared voices, read-only.
      data: directory of what outlives the process: batches, files, added voices, jobs.
      api_keys: lines `KEY [tenant=NAME] [weight=NUMBER]`; without any, requests need none.
      requests_per_minute: requests and utterances of one caller; 0 is any number.
      speech_seconds_per_minute: seconds of speech of one caller; 0 is any number.
      fetch_urls: whether recordings are fetched from addresses in requests.
      allow_private: whether such addresses, and those of webhooks, may be private ones.
      allowed_hosts: names that this server may be called by in a Host header, besides its own
        address, IP addresses and localhost; "*" is any.
      cors_origins: whose pages may call, besides the server's own; "*" is any.
      trusted_proxies: addresses or networks whose X-Forwarded-For is believed.
      webhook_secret: what results are signed with that are posted to a webhook; without it none
        are posted.
      drain_seconds: from SIGTERM until the process is gone.
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
    speech_seconds_per_minute: int = 0
    fetch_urls: bool = False
    allow_private: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    webhook_secret: str = ""
    drain_seconds: float = 60.0
    limits: Limits = field(default_factory=Limits)
