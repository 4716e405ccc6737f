"""The facade: load a model by name, give it text, get speech."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from csm_jax.checkpoints import native_format
from csm_jax.checkpoints.native_format import Place, on_default_device
from csm_jax.config import CSMConfig
from csm_jax.errors import CheckpointError
from csm_jax.inference.config import InferenceConfig
from csm_jax.inference.decode_loop import run_alone
from csm_jax.inference.decode_step import CHUNK_FRAMES
from csm_jax.inference.engine import Engine
from csm_jax.inference.frame_blocks import FrameBlocks
from csm_jax.inference.listener import Listener
from csm_jax.inference.pacing import Pace
from csm_jax.inference.request import (
    Notice,
    Notify,
    OnWord,
    Progress,
    Request,
    as_request,
    log_notice,
)
from csm_jax.inference.request_parameters import (
    checks_call,
    generate_parameters,
    takes_request,
)
from csm_jax.inference.request_state import RequestState, Step
from csm_jax.inference.speech import Speech
from csm_jax.inference.ticket import Ticket
from csm_jax.inference.voice import Voice
from csm_jax.inference.voice_prompts import make_voice, mix_voices
from csm_jax.loading import open_source
from csm_jax.loading.alignment import read_alignment
from csm_jax.model.kernels.choice import XLA, choose
from csm_jax.model.precision import Precision, resolve
from csm_jax.model.sharding import place_on
from csm_jax.prompt import limits as prompt_limits
from csm_jax.prompt.turns import Segment

# Frames between two reports of progress.
_PROGRESS_FRAMES = 5


@dataclass(frozen=True, eq=False, repr=False)
class Generator(Listener):
    """A loaded model that speaks.

        model = csm_jax.load("sesame/csm-1b")
        audio = model.generate("Hello.", speaker=0, context=[...], sampling=..., seed=0)

    `generate`, `generate_codes`, `stream` and `speak` take the fields of a `Request`, or one
    `Request`. A call that does not fit them raises `InputError`.
    """

    @takes_request(generate_parameters)
    def generate(
        self,
        request: Request,
        progress: Progress | None,
        notify: Notify | None,
        on_word: OnWord | None,
    ) -> np.ndarray:
        """Speaks a text as the next turn of a conversation.

        Args:
          text: what to speak, or a `Request`.
          speaker, context, sampling, max_audio_length_ms, seed, guard, shared_turns, pauses,
            best_of, interventions, context_seconds, voice, rank: as in `Request`; beside one, they
            replace its own.
          progress: called now and then with the number of 80 ms frames so far; not with `best_of`.
          notify: called with each notice, such as that the speech was cut; by default notices are
            logged as warnings.
          on_word: called with each word and its times, in order, as soon as they are certain. They
            come from the frames alone; those of `speak` are sharpened by the sound.

        Returns:
          float32 [num_samples] at `sample_rate`; empty if the model ends at once.

        Raises:
          InputError: text or context that is empty, malformed or does not fit.
        """
        options = {"progress": progress, "notify": notify, "on_word": on_word}
        return self.decode(self.generate_codes(request, **options))

    @takes_request(generate_parameters)
    def generate_codes(
        self,
        request: Request,
        progress: Progress | None,
        notify: Notify | None,
        on_word: OnWord | None,
    ) -> np.ndarray:
        """Like `generate`, but returns the codes: int32 [num_frames, Q], without the last frame
        of zeros, which is the end of speech."""
        if request.best_of > 1:
            return self._best_take(request, notify or log_notice, on_word).codes()
        state = RequestState(self, request, notify or log_notice)
        return self._codes(state, progress, on_word)

    @takes_request(generate_parameters)
    def speak(
        self,
        request: Request,
        progress: Progress | None,
        notify: Notify | None,
        on_word: OnWord | None,
    ) -> Speech:
        """Like `generate`, but returns audio, codes, words with their times, notices and takes.

        Notices are not logged; `notify` is given them as they arise.
        """
        if request.best_of > 1:
            return self._best_take(request, notify, on_word).speech()
        notices: list[Notice] = []

        def keep(notice: Notice) -> None:
            notices.append(notice)
            if notify is not None:
                notify(notice)

        state = RequestState(self, request, keep)
        codes = self._codes(state, progress, on_word)
        audio = self.decode(codes)
        words = state.alignment.words(audio)
        return Speech(audio, self.sample_rate, codes, tuple(words), tuple(notices))

    @takes_request(generate_parameters)
    def stream(
        self,
        request: Request,
        progress: Progress | None,
        notify: Notify | None,
        on_word: OnWord | None,
    ) -> Iterator[np.ndarray]:
        """Like `generate`, but yields the speech as it is generated: float32 [n] at `sample_rate`.

        The first chunk is one frame (80 ms); later ones are longer once there is enough to play
        in the meantime. Together they are what `generate` returns. Bad input raises an error at
        the call, not when the first chunk is asked for. With `best_of` there is one chunk, after
        all takes.
        """
        if request.best_of > 1:
            RequestState(self, request, lambda notice: None)
            return self._stream_best(request, notify or log_notice, on_word)
        state = RequestState(self, request, notify or log_notice)
        return self._stream(state, progress, on_word)

    @checks_call
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

        Raises:
          InputError: as `generate`, or `max_batch` is less than 1.
        """
        tell = notify or (lambda _, notice: log_notice(notice))
        wanted = [as_request(request) for request in requests]
        # As many slots however many requests there are: one shape is compiled, and rounds one way.
        with Engine(self, max_batch) as engine:
            tickets = [engine.submit(request, stream=False, wait=True) for request in wanted]
            audio = [ticket.result() for ticket in tickets]
        for index, ticket in enumerate(tickets):
            for notice in ticket.notices:
                tell(index, notice)
        return audio

    @checks_call
    def make_voice(self, turns: Sequence[Segment]) -> Voice:
        """The voice of recordings, which requests can begin with and `Voice.save` keeps.

            voice = model.make_voice([csm_jax.Segment(0, "We walked to the lake.", recording)])
            audio = model.generate("And then it rained.", voice=voice)

        The speech is that of `context=turns, shared_turns=len(turns)`, to the bit, without the
        encoding and the prefill of these turns.

        Args:
          turns: with audio or codes.

        Raises:
          InputError: a turn is malformed, or all together do not fit the model's window.
        """
        return make_voice(self, turns)

    @checks_call
    def mix_voices(self, voices: Sequence[Voice], weights: Sequence[float]) -> Voice:
        """A voice between others, by the embeddings of their prompts.

        Each frame of a prompt is embedded as a vector; the new prompt has the weighted sums of the
        vectors at the same places, which the backbone processes like those of any prompt. So the
        turns must have the same speakers and transcripts, or none, and are cut to the shortest. A
        weight of 1 beside zeros is that voice.

        Args:
          weights: from 0, one for each voice; their sum counts as 1.

        Raises:
          InputError: the voices do not fit together.
          CheckpointError: one is of another model.
        """
        return mix_voices(self, voices, weights)

    def _best_take(self, request: Request, notify: Notify | None, on_word: OnWord | None) -> Ticket:
        """The best take of a request; it is over."""
        length = self.config.backbone.max_seq_len
        with Engine(self, request.best_of, length, max_queue=request.best_of) as engine:
            ticket = engine.submit(request, stream=False, wait=True, on_word=on_word)
            ticket.codes()
        for notice in ticket.notices:
            if notify is not None:
                notify(notice)
        return ticket

    def _stream_best(
        self, request: Request, notify: Notify, on_word: OnWord | None
    ) -> Iterator[np.ndarray]:
        yield self._best_take(request, notify, on_word).result()

    def _codes(
        self, state: RequestState, progress: Progress | None, on_word: OnWord | None
    ) -> np.ndarray:
        chunk_frames = CHUNK_FRAMES if progress is None else _PROGRESS_FRAMES
        steps = run_alone(self, state, lambda: chunk_frames)
        chunks = [np.zeros((0, self.config.num_codebooks), np.int32)]
        chunks += [step.released for step in _reporting(steps, progress, on_word)]
        return np.concatenate(chunks)

    def _stream(
        self, state: RequestState, progress: Progress | None, on_word: OnWord | None
    ) -> Iterator[np.ndarray]:
        pace = Pace(self.config.frame_ms / 1000)
        blocks = FrameBlocks(self.config.num_codebooks)
        codec_state = self.codec.decode_stream_state()
        for step in _reporting(run_alone(self, state, pace.next_chunk), progress, on_word):
            blocks.add(step.released)
            while size := blocks.next_size(flush=step.is_over):
                audio, codec_state = self.codec.decode_frames(blocks.take(size)[None], codec_state)
                pace.played(size)
                yield np.asarray(audio)[0]


def _reporting(
    steps: Iterator[Step], progress: Progress | None, on_word: OnWord | None
) -> Iterator[Step]:
    """Yields the steps, and reports the number of their frames and their words."""
    num_frames = 0
    for step in steps:
        num_frames += len(step.released)
        if progress is not None:
            progress(num_frames)
        if on_word is not None:
            for word in step.words:
                on_word(word)
        yield step


def load(
    name: str | Path,
    dtype: DTypeLike = "auto",
    quantize: str | None = None,
    mesh: Mesh | None = None,
    adapters: str | Path | None = None,
    revision: str | None = None,
    kernels: str = XLA,
) -> Generator:
    """Loads a model.

    Args:
      name: a Hugging Face repository such as "sesame/csm-1b", which is downloaded and converted
        on the first call; a directory in any of the layouts; "demo", a very small model that
        comes with the package and speaks digits and simple sentences; "random:tiny",
        "random:csm_1b" or "random:miso_8b", random weights that make noise.
      dtype: float32, bfloat16 or float16, as a name or a type (`jnp.bfloat16`); or "auto":
        bfloat16 where the hardware computes in it, float16 on older GPUs, float32 on a CPU. The
        codec is float32 always.
      quantize: "int8" or "none"; None is as the checkpoint is stored.
      mesh: the devices to use, of `sharding.make_mesh`; None is the first one.
      adapters: a directory of LoRA adapters in PEFT's format, or their hub name; they become part
        of the weights.
      revision: branch, tag or commit of the repository; the same as "owner/name@revision".
      kernels: "xla", or "pallas" for fused kernels where frames are generated, which an NVIDIA GPU
        from compute capability 8.0 on has in bfloat16 and int8. They have never been run on one.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
      InputError: another `dtype`, `quantize` or `kernels`; a revision of what is no repository.
    """
    precision = resolve(dtype, quantize or "none")
    kernels = choose(kernels, precision, mesh)
    source = open_source(name, adapters, revision)
    if source.is_int8:
        precision = _as_int8(str(name), dtype, quantize)
    params = native_format.place_params(
        source.tensors, source.config, precision, _place(source.config, mesh)
    )
    return Generator.from_params(
        source.config,
        params,
        source.tokenizer,
        precision,
        mesh,
        read_alignment(source.directory, source.config),
        InferenceConfig.of(prompt_limits.read(source.directory)),
        str(name) if adapters is None else f"{name} with {adapters}",
        kernels,
    )


def _place(config: CSMConfig, mesh: Mesh | None) -> Place:
    return place_on(mesh, config) if mesh else on_default_device


def _as_int8(name: str, dtype: DTypeLike, quantize: str | None) -> Precision:
    if quantize == "none":
        raise CheckpointError(
            f"{name} is stored as int8: for full precision convert the original again"
        )
    return resolve(dtype, "int8")
