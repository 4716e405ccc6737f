"""The first phase: speaks all lines of the prompts, several at once, as streams.

A stream gives the times of its chunks. The recording is decoded from its codes at the end, since
the length of the chunks, which depends on the speed of the moment, can change the last bit of a
sample: so an interrupted run has the same files as an uninterrupted one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from csm_jax.cli.manifest import Line, Recordings
from csm_jax.errors import CSMError
from csm_jax.evaluate.grid import Configuration
from csm_jax.evaluate.takes import CAP, GUARD_CUT, Take, TakeDirectory
from csm_jax.evaluate.timing import StreamClock, count_in_time
from csm_jax.inference.engine import Engine
from csm_jax.inference.ticket import Ticket
from csm_jax.io.audio import save_audio
from csm_jax.prompt.turns import Segment


def find_unspoken(lines: Sequence[Line], directory: TakeDirectory) -> list[Line]:
    """The lines that have no take yet. Raises `InputError` as `TakeDirectory.read` does."""
    spoken = {take.id for take in directory.read()}
    return [line for line in lines if line.name not in spoken]


def speak_lines(
    engine: Engine,
    lines: Sequence[Line],
    configuration: Configuration,
    directory: TakeDirectory,
    progress: Callable[[int], object] = lambda num_lines: None,
) -> list[str]:
    """Speaks the lines that have no take yet, as many at once as the engine has slots.

    Args:
      directory: is being written (`TakeDirectory.writing`).
      progress: called with the number of finished lines, first with those of earlier runs.

    Returns:
      A message for each line that has failed.
    """
    left = find_unspoken(lines, directory)
    progress(len(lines) - len(left))
    speaker = _Speaker(engine, configuration, directory)
    failed = []
    # With one worker for each slot no request waits in the engine's queue.
    with ThreadPoolExecutor(engine.max_batch) as workers:
        try:
            for line, take in zip(left, workers.map(speaker.speak, left), strict=True):
                if isinstance(take, CSMError):
                    failed.append(f"{line.where}: {take}")
                else:
                    directory.add(take)
                progress(1)
        except BaseException:
            # The workers would wait for the speech of the lines that have been begun.
            engine.close()
            raise
    return failed


class _Speaker:
    """Speaks single lines, in the threads of a pool."""

    def __init__(self, engine: Engine, configuration: Configuration, directory: TakeDirectory):
        self._engine = engine
        self._configuration = configuration
        self._directory = directory
        self._recordings = Recordings(engine.model)

    def speak(self, line: Line) -> Take | CSMError:
        """Writes the recording of a line; returns an error where that is its own."""
        try:
            context = [self._recordings.segment(turn) for turn in line.context]
            return self._speak(line, context)
        except CSMError as error:
            return error

    def _speak(self, line: Line, context: Sequence[Segment]) -> Take:
        model = self._engine.model
        request = dataclasses.replace(self._configuration.request(line), context=context)
        clock = StreamClock(model.sample_rate)
        ticket = self._engine.submit(request, stream=True, wait=True, keep=False)
        ticket.add_listener(clock)
        clock.wait()
        audio = ticket.result()
        save_audio(self._directory.recording(line.name), audio, model.sample_rate)
        return self._take(line, ticket, clock, len(audio) / model.sample_rate)

    def _take(self, line: Line, ticket: Ticket, clock: StreamClock, seconds: float) -> Take:
        request, chunks = ticket.request, clock.chunks
        kinds = tuple(notice.kind for notice in ticket.notices)
        return Take(
            id=line.name,
            text=request.text,
            speaker=request.speaker,
            seed=request.seed,
            prompt=_find_prompt(line),
            frames=len(ticket.codes()),
            seconds=seconds,
            notices=kinds,
            ended=not {CAP, GUARD_CUT} & set(kinds),
            first_audio_seconds=chunks[0].arrival if chunks else None,
            real_time_factor=clock.wait() / seconds if seconds else None,
            chunks=max(0, len(chunks) - 1),
            chunks_in_time=count_in_time(chunks),
            crc32=self._directory.checksum(line.name),
        )


def _find_prompt(line: Line) -> str | None:
    """The path of the last recording of the context in the speaker's voice."""
    for turn in reversed(line.context):
        if turn.audio is not None and turn.speaker == line.request.speaker:
            return str(turn.audio.resolve())
    return None
