"""Settings and limits of a server, which are fixed when it starts."""

from dataclasses import dataclass, field
from pathlib import Path

from csm_jax.inference.engine_config import EngineConfig
from csm_jax.inference.request import DEFAULT_SAMPLING
from csm_jax.model.sampling import Sampling

# The path of the page on which users try the server. It needs no API key.
PAGE_PATH = "/page"


@dataclass(frozen=True)
class Limits:
    """Limits of requests, connections and storage, which are checked before the cost arises.

    Attributes:
      json_bytes: of a request body without recordings.
      body_bytes: of a request body that can contain recordings.
      pending_body_bytes: of all request bodies in memory; half of it for one caller.
      pending_response_bytes: of all responses in memory that their clients have not read; half of
        it for one caller.
      json_values: commas, colons and brackets of a JSON body, as a bound for its values.
      text_characters: of a text to speak, and of a transcript.
      audio_bytes: of one encoded recording.
      audio_seconds: of one decoded recording. All recordings of a context together are limited to
        twice the model's window.
      turns: of a context or a scene. For fal's API it can be lower than the default, not higher.
      speech_ms: of one response.
      connections: open at once.
      connections_per_address: open at once from one address (the /64 for IPv6). Beyond it the one
        that has been idle longest is closed.
      head_seconds: until the head of a request is complete.
      body_seconds, body_bytes_per_second: time limit of a body, which grows by a second for every
        so many bytes that have arrived.
      idle_seconds: between two requests of a connection.
      write_seconds, response_bytes_per_second: while unsent bytes wait, the client must read so
        many bytes a second, over so many seconds. The slowest streams of speech that are played
        live have about 4 kB a second.
      unread_seconds: of unread speech in memory of all responses together; beyond it the slowest
        client is dropped.
      read_pace, read_pace_seconds: while unread speech waits, the client must read so many seconds
        of speech a second, over so many seconds.
      sockets_per_caller: open WebSockets of one caller, and as many streams of job states.
      socket_idle_seconds: without a message from the client of a WebSocket, and without speech.
      stored_bytes: of the whole database, with deleted lines until they are removed; at most 1 GB
        without a data directory. It is checked when something is added.
      stored_bytes_per_owner: of the contents of an owner's files, batches with their results,
        voices, jobs with their results, and pending webhooks; at most a quarter of the total.
        Without API keys there is one owner, which can fill the total.
      files_per_owner, batches_per_owner: stored files and batches.
      voices, voices_per_owner: added voices of all owners, and of one.
      download_bytes, download_bytes_per_owner: of files to which fal's responses refer.
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
    """The configuration of a server.

    Attributes:
      model_name: the name of the model in the APIs.
      strict_models: whether requests for models of other names are refused; otherwise they are
        served, with a notice.
      default_voice: the voice of requests to OpenAI's and DeepInfra's APIs that name none. By
        default it is the first voice for OpenAI's, and none for DeepInfra's.
      sampling: the default for fields that a request leaves out.
      max_batch: requests that are generated at once.
      max_seq_len: positions of each of them, for context and speech.
      max_queue: requests that may wait.
      voices: directory of shared voices: NAME.flac and NAME.txt, its transcript.
      data: directory of the database: batches, files, added voices, jobs. By default everything is
        in memory.
      api_keys: lines `KEY [tenant=NAME] [weight=NUMBER]`; without any, requests need none.
      requests_per_minute: requests and utterances of one caller; 0 is no limit.
      speech_seconds_per_minute: seconds of speech of one caller; 0 is no limit.
      normalize: whether texts are spoken as they are read aloud in English, without markup and with
        numbers as words.
      max_best_of: takes that a request may ask for (`best_of`); each of them needs a slot.
      fetch_urls: whether recordings are fetched from URLs in requests.
      allow_private: whether these URLs, and those of webhooks, may have private addresses.
      allowed_hosts: names of this server that are accepted in a Host header, besides IP addresses
        and localhost; "*" is any.
      cors_origins: origins of pages that may send requests, besides the server's own; "*" is any.
      trusted_proxies: addresses or networks whose X-Forwarded-For is trusted.
      webhook_secret: the key that signs webhooks; without it they are refused.
      drain_seconds: from SIGTERM until the end of the process.
      limits: of requests, connections and owners.
    """

    model_name: str = "csm-1b"
    strict_models: bool = False
    default_voice: str | None = None
    sampling: Sampling = DEFAULT_SAMPLING
    max_batch: int = EngineConfig.max_batch
    max_seq_len: int = EngineConfig.max_seq_len
    max_queue: int = EngineConfig.max_queue
    voices: Path | None = None
    data: Path | None = None
    api_keys: tuple[str, ...] = ()
    requests_per_minute: int = 0
    speech_seconds_per_minute: int = 0
    normalize: bool = False
    max_best_of: int = 1
    fetch_urls: bool = False
    allow_private: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    webhook_secret: str = ""
    drain_seconds: float = 60.0
    limits: Limits = field(default_factory=Limits)
