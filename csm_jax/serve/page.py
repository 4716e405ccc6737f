"""A page to try it on: two speakers, their voices, lines of dialogue, and what becomes of them."""

import asyncio
import contextlib
import os
import re
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

# Nothing of this machine is told to anybody; read when gradio is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from csm_jax.audio import to_pcm
from csm_jax.errors import CSMError, InputError, first_line
from csm_jax.prompt import Segment
from csm_jax.sampling import Sampling
from csm_jax.serve.caller import INTERNAL
from csm_jax.serve.errors import ApiError, as_bad_field
from csm_jax.serve.fields import Options, make_request, read_recording
from csm_jax.serve.formats import Encoder
from csm_jax.serve.middleware.keys import PAGE, find_key, parse_keys
from csm_jax.serve.scene import Line
from csm_jax.serve.service import Service

SPEAKERS = ("A", "B")
# Of which browsers may ask for the mp3 again; a minute is 0.24 MB.
MAX_SPEECHES = 32
NO_VOICE, OWN_VOICE = "(none: the model's choice)", "(my recording)"
TERMS = """Do not use this model to impersonate anybody without their explicit consent, to deceive \
or to misinform, or for anything illegal or harmful. Do not pass its speech off as a recording."""
EXAMPLE = "A: one two three\nB: four five six\nA: seven eight nine"
_LINE = re.compile(r"\s*(?:([ABab])\s*:)?\s*(.*)")


def mount(app: FastAPI, service: Service) -> None:
    """Adds the page to an application. With API keys, one of them is its password."""
    keys = parse_keys(service.settings.api_keys)
    broadcast = Broadcast(service.model.sample_rate)

    @app.get(f"{PAGE}/live/{{name}}", include_in_schema=False)
    def live(name: str) -> StreamingResponse:
        return StreamingResponse(broadcast.listen(name), media_type="audio/mpeg")

    gr.mount_gradio_app(
        app,
        build(service, broadcast),
        PAGE,
        auth=(lambda _, password: find_key(password, keys) is not None) if keys else None,
        auth_message="Any name; the password is an API key." if keys else None,
        max_file_size=service.settings.limits.audio_bytes,
        footer_links=[],
    )


class Broadcast:
    """Speech on its way to players that are told where to listen.

    Gradio's own streams need the program ffmpeg; a browser plays an mp3 while it comes. It may ask
    for it twice, and hears it from its beginning each time.
    """

    def __init__(self, sample_rate: int):
        self._sample_rate = sample_rate
        self._speeches: OrderedDict[str, _Speech] = OrderedDict()

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[str, Callable[[np.ndarray], None]]]:
        """Gives a name that nobody guesses, and a function that sends float32 [n] samples."""
        name, speech = secrets.token_urlsafe(16), _Speech()
        self._speeches[name] = speech
        if len(self._speeches) > MAX_SPEECHES:
            self._speeches.popitem(last=False)
        encoder = Encoder("mp3", self._sample_rate)
        try:
            yield name, lambda samples: speech.add(encoder.add(samples))
            speech.add(encoder.finish())
        finally:
            speech.end()

    async def listen(self, name: str) -> AsyncIterator[bytes]:
        """The bytes of an mp3 from its beginning; nothing of one that is not known any more."""
        if speech := self._speeches.get(name):
            async for data in speech.read():
                yield data


class _Speech:
    """Bytes that many read while they come."""

    def __init__(self):
        self._pieces: list[bytes] = []
        self._is_over = False
        self._changed = asyncio.Event()

    def add(self, data: bytes) -> None:
        self._pieces.append(data)
        self._wake()

    def end(self) -> None:
        self._is_over = True
        self._wake()

    async def read(self) -> AsyncIterator[bytes]:
        num_read = 0
        while True:
            # Before the look at what there is, or a change in between would go unnoticed.
            changed = self._changed
            while num_read < len(self._pieces):
                num_read += 1
                yield self._pieces[num_read - 1]
            if self._is_over:
                return
            await changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def build(service: Service, broadcast: Broadcast) -> gr.Blocks:
    """The page and what its buttons do."""
    default = service.settings.sampling
    with gr.Blocks(title="csm-jax", delete_cache=(60, 600)) as page:
        gr.Markdown(f"# csm-jax\n{TERMS}")
        with gr.Row():
            voices = [_voice_inputs(i, _names(service)) for i in range(len(SPEAKERS))]
        lines = gr.Textbox(
            EXAMPLE, lines=6, label="Dialogue", info="A line for each turn: A: ... or B: ..."
        )
        with gr.Accordion("Advanced", open=False), gr.Row():
            options = _option_inputs(default)
        with gr.Row():
            start, stop = gr.Button("Speak", variant="primary"), gr.Button("Stop")
        status = gr.Markdown()
        player = gr.HTML(label="While it is made")
        whole = gr.Audio(label="All of it", format="wav", interactive=False)
        inputs = [lines, *options, *(part for voice in voices for part in voice)]
        speak = _speaker(service, broadcast)
        speaking = start.click(
            speak,
            inputs,
            [player, whole, status],
            api_visibility="private",
            concurrency_limit=service.settings.max_batch,
        )
        stop.click(None, cancels=[speaking])

        def list_voices() -> list[dict]:
            """Those that there are when somebody comes."""
            return [gr.update(choices=_choices(_names(service)))] * len(voices)

        page.load(list_voices, None, [voice for voice, *_ in voices], api_visibility="private")
    return page.queue(max_size=service.settings.max_queue)


def _option_inputs(default: Sampling) -> list[gr.components.Component]:
    return [
        gr.Slider(
            *(0, 2, 0 if default.greedy else default.temperature),
            label="Temperature",
            info="0: the likeliest",
        ),
        gr.Slider(1, 500, default.top_k, step=1, label="Top k"),
        gr.Slider(0.01, 1, default.top_p, label="Top p"),
        gr.Slider(0, 0.99, default.min_p, label="Min p"),
        gr.Slider(0.5, 3, default.repetition_penalty, label="Repetition penalty"),
        # A field for numbers shows 0 when it is empty.
        gr.Textbox(label="Seed", placeholder="another every time"),
    ]


def without_fetching(recording: gr.Audio) -> gr.Audio:
    """Gradio would fetch a recording from any address that a request names, and of any size.

    A subclass would be cleaner, but gradio writes a file beside the code of each.
    """
    move = recording.async_move_resource_to_block_cache

    async def move_file(path: str | Path | None) -> str | None:
        if "://" in str(path):
            raise gr.Error("a recording is a file, and no address")
        return await move(path)

    recording.async_move_resource_to_block_cache = move_file
    return recording


def _voice_inputs(number: int, names: list[str]) -> list[gr.components.Component]:
    """A voice of the list, or a recording and what is said in it."""
    with gr.Column():
        chosen = names[number % len(names)] if names else NO_VOICE
        voice = gr.Dropdown(_choices(names), value=chosen, label=SPEAKERS[number])
        with gr.Group(visible=False) as own:
            sources = ["upload", "microphone"]
            recording = gr.Audio(sources=sources, type="filepath", label="My recording")
            transcript = gr.Textbox(label="What is said in my recording")
        voice.change(
            lambda name: gr.update(visible=name == OWN_VOICE),
            voice,
            own,
            api_visibility="private",
        )
    return [voice, without_fetching(recording), transcript]


def _names(service: Service) -> list[str]:
    return [voice.name for voice in service.voices.all(INTERNAL.owner)]


def _choices(names: list[str]) -> list[str]:
    return [*names, OWN_VOICE, NO_VOICE]


def _speaker(service: Service, broadcast: Broadcast) -> Callable[..., AsyncIterator]:
    """What the button does: a player, how far it is, and at last all of the speech."""

    async def speak(text: str, temperature, top_k, top_p, min_p, penalty, seed, *voices):
        rate, pieces = service.model.sample_rate, [np.zeros(0, np.float32)]
        try:
            options = Options(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=penalty,
                seed=(seed or "").strip() or None,
            )
            lines = parse_lines(text)
            turns = await _voice_turns(service, voices)
            with broadcast.open() as (name, send):
                player = f"<audio controls autoplay src='{PAGE}/live/{name}'></audio>"
                for number, line in enumerate(lines, 1):
                    yield player, None, f"Line {number} of {len(lines)}"
                    async for chunk in _speak_line(service, line, turns, options):
                        pieces.append(chunk)
                        send(chunk)
                        # Here gradio notices that nobody is there any more.
                        yield gr.skip(), gr.skip(), gr.skip()
        except ValidationError as error:
            raise gr.Error(str(as_bad_field(error)), print_exception=False) from error
        except (CSMError, ApiError) as error:
            raise gr.Error(first_line(error), print_exception=False) from error
        audio = np.concatenate(pieces)
        whole = np.frombuffer(to_pcm(audio), "<i2")
        yield gr.skip(), (rate, whole), f"{len(audio) / rate:.1f} s of speech"

    return speak


async def _speak_line(
    service: Service, line: Line, turns: list[Segment], options: Options
) -> AsyncIterator[np.ndarray]:
    """Speaks a line, and adds it to the turns."""
    request = make_request(service, line.text, line.speaker, options, turns)
    live = await service.speak(request, INTERNAL, stream=True)
    try:
        async for chunk in live.chunks():
            yield chunk
    finally:
        live.cancel()
    turns.append(Segment(line.speaker, line.text, codes=live.codes()))


async def _voice_turns(service: Service, inputs: Sequence) -> list[Segment]:
    """The turns that give the speakers their voices; three inputs for each."""
    count = len(inputs) // len(SPEAKERS)
    turns = [
        await _voice_turn(service, i, *inputs[count * i : count * (i + 1)])
        for i in range(len(SPEAKERS))
    ]
    return [turn for turn in turns if turn is not None]


async def _voice_turn(
    service: Service, speaker: int, name: str, recording: str | None, transcript: str
) -> Segment | None:
    """The turn that gives a speaker a voice."""
    if name == NO_VOICE:
        return None
    if name != OWN_VOICE:
        return service.voices.find(name, INTERNAL.owner).turn(speaker)
    if not recording or not transcript.strip():
        raise InputError(
            f"{SPEAKERS[speaker]} has no recording, or it is not said what is said in it"
        )
    try:
        data = await service.in_thread(Path(recording).read_bytes)
    except OSError as error:
        raise InputError("the recording is gone: upload it again") from error
    audio = await read_recording(service, data, "audio")
    return Segment(speaker, transcript, codes=await service.encode(audio))


def parse_lines(text: str) -> list[Line]:
    """The turns of a dialogue; a line without a name is the other's turn.

    Raises:
      InputError: there are none.
    """
    lines: list[Line] = []
    for each in text.splitlines():
        name, said = _LINE.fullmatch(each).groups()
        if not said.strip():
            continue
        other = 1 - lines[-1].speaker if lines else 0
        lines.append(Line(said.strip(), SPEAKERS.index(name.upper()) if name else other))
    if not lines:
        raise InputError("there is no line to say")
    return lines
