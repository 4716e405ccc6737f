"""The facade: load a model by name, give it text, get sound."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from csm_jax import checkpoint, lora
from csm_jax.checkpoint import Place, on_default_device
from csm_jax.config import CSMConfig
from csm_jax.decode_batch import DecodeBatch, bucket
from csm_jax.decode_step import CHUNK_FRAMES
from csm_jax.engine import Engine
from csm_jax.errors import CheckpointError
from csm_jax.loading import open_source
from csm_jax.mimi.codec import Codec
from csm_jax.model import precision_of
from csm_jax.pacing import Pace, blocks
from csm_jax.precision import Precision, resolve
from csm_jax.request import Notice, Request, as_request
from csm_jax.request_state import RequestState
from csm_jax.sharding import place_on
from csm_jax.tokenizer import Tokenizer

Params = dict[str, Any]

# 2 s each of digital silence and of noise at about -80 and -60 dBFS.
SILENCE_FRAMES = 25
SILENCE_LEVELS = (0.0, 1e-4, 1e-3)

logger = logging.getLogger("csm_jax")


class Generator:
    """A loaded model.

    Attributes:
      config: the model's sizes.
      codec: Mimi, `encode(audio)` and `decode(codes)`.
      tokenizer: text to ids.
      params: of the backbone and the depth decoder.
      mesh: what `params` lie on, if it is more than a device.
    """

    def __init__(
        self, config: CSMConfig, params: Params, tokenizer: Tokenizer, mesh: Mesh | None = None
    ):
        self.config = config
        self.mesh = mesh
        self.tokenizer = tokenizer
        self.codec = Codec(config.codec, params["codec"])
        self.params = params["csm"]

    @property
    def precision(self) -> Precision:
        """The types that the model is held and computed in."""
        return precision_of(self.params)

    @property
    def sample_rate(self) -> int:
        """Hz of everything that comes out and of all context audio (24000)."""
        return self.config.codec.sample_rate

    def generate(
        self,
        *arguments: Any,
        progress: Callable[[int], None] | None = None,
        notify: Callable[[Notice], None] | None = None,
        **named: Any,
    ) -> np.ndarray:
        """Speaks a text as the next turn of a conversation.

            model.generate("Hello.", speaker=0, context=[...], sampling=..., seed=0)

        Args:
          *arguments, **named: those of `Request`, or one `Request`.
          progress: called now and then with the number of 80 ms frames so far.
          notify: told what the listener should know, such as that the speech was cut; by default
            it is logged as a warning.

        Returns:
          float32 [num_samples] at `sample_rate`; empty if the model ends at once.

        Raises:
          InputError: text or context that is empty, malformed or does not fit.
        """
        return self.decode(
            self.generate_codes(*arguments, progress=progress, notify=notify, **named)
        )

    def generate_codes(
        self,
        *arguments: Any,
        progress: Callable[[int], None] | None = None,
        notify: Callable[[Notice], None] | None = None,
        **named: Any,
    ) -> np.ndarray:
        """Like `generate`, but returns the codes: int32 [num_frames, Q], without the last frame
        of zeros that says the end."""
        speech = self.speech(as_request(*arguments, **named), notify)
        chunks = [np.zeros((0, self.config.num_codebooks), np.int32)]
        for chunk in self._frames(speech, lambda: CHUNK_FRAMES if progress is None else 5):
            chunks.append(chunk)
            if progress is not None:
                progress(sum(map(len, chunks)))
        return np.concatenate(chunks)

    def stream(
        self,
        *arguments: Any,
        notify: Callable[[Notice], None] | None = None,
        **named: Any,
    ) -> Iterator[np.ndarray]:
        """Like `generate`, but yields the speech as it is made: float32 [n] at `sample_rate`.

        The first chunk is one frame (80 ms); later ones are longer once there is enough to play
        in the meantime. Together they are what `generate` returns.
        """
        speech = self.speech(as_request(*arguments, **named), notify)
        return self._stream(speech)

    def generate_batch(
        self,
        requests: Sequence[Request | str],
        max_batch: int = 8,
        notify: Callable[[int, Notice], None] | None = None,
    ) -> list[np.ndarray]:
        """Speaks many texts side by side.

        Args:
          max_batch: how many of them at once.
          notify: as for `generate`, with the index of the request.

        Returns:
          As `generate`, in the order of `requests`.
        """
        tell = notify or (lambda _, notice: _log(notice))
        wanted = [as_request(request) for request in requests]
        # As many rows however many requests there are: one shape is compiled, and rounds one way.
        with Engine(self, max_batch) as engine:
            tickets = [engine.submit(request, stream=False, wait=True) for request in wanted]
            audio = [ticket.result() for ticket in tickets]
        for index, ticket in enumerate(tickets):
            for notice in ticket.notices:
                tell(index, notice)
        return audio

    def speech(
        self,
        request: Request,
        notify: Callable[[Notice], None] | None = None,
        max_seq_len: int | None = None,
    ) -> RequestState:
        """The course of a request, for those who generate in their own way."""
        return RequestState(
            request,
            self.config,
            self.tokenizer,
            self._encode,
            lambda: self.silent_codes,
            notify or _log,
            max_seq_len,
        )

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes [num_frames, Q] of `generate_codes` to audio, float32 [num_samples]."""
        return self.codec.decode(self.audible(codes))

    def audible(self, codes: np.ndarray) -> np.ndarray:
        """Codes as the codec takes them.

        The model's vocabulary has a few ids that are no codes; a model with sense never says
        them, and the codec reads them as its last code.
        """
        return np.minimum(codes, self.config.codec.codebook_size - 1)

    @functools.cached_property
    def silent_codes(self) -> frozenset[int]:
        """The codebook-0 codes of silence, found by encoding it: digital, and with faint noise."""
        noise = np.random.default_rng(0).standard_normal(SILENCE_FRAMES * self.codec.frame_size)
        silences = [np.float32(level * noise) for level in SILENCE_LEVELS]
        return frozenset(int(code) for row in self.codec.encode(silences, 1) for code in row[:, 0])

    def _frames(
        self, speech: RequestState, chunk_frames: Callable[[], int]
    ) -> Iterator[np.ndarray]:
        """Yields the frames of a speech, [n, Q], as they are generated and released."""
        while (utterance := speech.next_utterance()) is not None:
            length = bucket(len(utterance.prompt[0]) + utterance.max_frames)
            limit = self.config.backbone.max_seq_len
            batch = DecodeBatch(self.config, self.params, 1, min(length, limit), self.mesh)
            batch.join(0, utterance)
            is_over = False
            while not is_over:
                codes, _ = batch.run(chunk_frames())
                released, rewind, is_over = speech.accept(codes[0])
                if rewind is not None:
                    batch.rewind(0, rewind)
                yield released

    def _stream(self, speech: RequestState) -> Iterator[np.ndarray]:
        pace = Pace(self.config.frame_ms / 1000)
        state = self.codec.decode_stream_state()
        for frames in self._frames(speech, pace.next_chunk):
            for block in blocks(self.audible(frames)):
                audio, state = self.codec.decode_frames(block[None], state)
                pace.played(len(block))
                yield np.asarray(audio)[0]

    def _encode(self, audio: np.ndarray) -> np.ndarray:
        return self.codec.encode(audio, self.config.num_codebooks)


def _log(notice: Notice) -> None:
    logger.warning(notice.message)


def load(
    name: str | Path,
    dtype: str = "auto",
    quantize: str | None = None,
    mesh: Mesh | None = None,
    adapters: str | Path | None = None,
) -> Generator:
    """Loads a model.

    Args:
      name: a Hugging Face repository such as "sesame/csm-1b", which is downloaded and converted
        on the first call; a directory in any of the layouts; "demo", a very small model that
        comes with the package and speaks digits and simple sentences; "random:tiny" or
        "random:csm_1b", random weights that make noise.
      dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 where the hardware computes in
        it, float16 on older GPUs, float32 on a CPU. The codec is float32 always.
      quantize: "int8" or "none"; None is as the checkpoint is stored.
      mesh: the devices to use, of `sharding.make_mesh`; None is the first one.
      adapters: a directory of LoRA adapters (`lora.py`), which become part of the weights.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    precision = resolve(dtype, quantize or "none")
    source = open_source(name)
    if source.is_int8:
        precision = _as_int8(str(name), dtype, quantize)
    tensors = source.tensors
    if adapters is not None:
        tensors = lora.merged(tensors, source.config, Path(adapters), source.is_int8)
    params = checkpoint.place_params(tensors, source.config, precision, _place(source.config, mesh))
    return Generator(source.config, params, source.tokenizer, mesh)


def _place(config: CSMConfig, mesh: Mesh | None) -> Place:
    return place_on(mesh, config) if mesh else on_default_device


def _as_int8(name: str, dtype: str, quantize: str | None) -> Precision:
    if quantize == "none":
        raise CheckpointError(
            f"{name} is stored as int8: for full precision convert the original again"
        )
    return resolve(dtype, "int8")
