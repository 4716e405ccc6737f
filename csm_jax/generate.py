"""Speaks text from the command line.

    python -m csm_jax.generate --text="Hello from Sesame." --out=hello.wav
    python -m csm_jax.generate --text="Hello." --stream --out=- | ffplay -
    python -m csm_jax.generate --manifest=lines.jsonl --out_dir=speech

Context turns are given by repeating --context_audio, --context_text and --context_speaker in
order; a whole conversation by --script=turns.json; many texts by --manifest.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags

from csm_jax import cli, processes, sampling_flags
from csm_jax.audio import check_format, load_audio
from csm_jax.engine import Engine
from csm_jax.errors import CSMError, InputError
from csm_jax.files import make_directory
from csm_jax.generator import Generator, load
from csm_jax.loading import BUNDLED, NAMES, RANDOM
from csm_jax.manifest import check_lines, read_manifest, speak_manifest
from csm_jax.output import check_codes_out, check_out, open_speech, save_codes, save_speech
from csm_jax.progress import Report, lines_bar
from csm_jax.prompt import Segment, check_text
from csm_jax.request import Notice, Request
from csm_jax.script import Turn, read_script

PROGRAM = "csm_jax.generate"
MANIFEST_FLAGS = ("out_dir", "batch", "coordinator", "num_processes", "process_id")


def define_flags(values: flags.FlagValues) -> None:
    def define(kind: Callable, name: str, default: object, help: str, **kwargs: object) -> None:
        kind(name, default, help, flag_values=values, **kwargs)

    text, whole, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    flag = flags.DEFINE_boolean
    define(text, "text", None, "what to say, of any length")
    out = "where the speech goes: .wav .flac .mp3 .ogg .opus .pcm; - is standard output"
    define(text, "out", None, out)
    define(flag, "stream", False, "write the speech while it is made, frame by frame")
    define(text, "format", None, "of --out=- (wav, pcm) and of --manifest's files; default: wav")
    define(text, "checkpoint", "sesame/csm-1b", f"hub name, directory, {' or '.join(NAMES)}")
    define(whole, "speaker", 0, "whose turn it is, any number")
    cap = "the speech is cut there; default: 10000, or what the text can need if that is more"
    define(real, "max_audio_length_ms", None, cap)
    define(whole, "seed", 0, "the same seed gives the same speech", lower_bound=0)
    multi = flags.DEFINE_multi_string
    define(multi, "context_audio", [], "a turn heard before: its recording; repeatable")
    define(multi, "context_text", [], "its transcript; repeatable, in the same order")
    define(flags.DEFINE_multi_integer, "context_speaker", [], "its speaker; repeatable")
    define(text, "script", None, "JSON list of turns to speak instead of --text")
    sampling_flags.define_flags(values)
    define(text, "guard", "on", "on stops speech that runs away; off leaves it alone")
    define(text, "dtype", "auto", "auto, float32, bfloat16 or float16")
    define(text, "quantize", None, "none or int8; default: as the checkpoint is stored")
    define(text, "codes_out", None, "also write the codes there, int32 [frames, codebooks] .npy")
    define(text, "manifest", None, "JSON lines to speak instead of --text, a file for each")
    define(text, "out_dir", None, "where the files of --manifest go; those there are kept")
    define(whole, "batch", 8, "lines of --manifest that are spoken at once", lower_bound=1)
    processes.define_flags(values, "that share --manifest")
    define(text, "adapters", None, "directory of LoRA adapters, of csm_jax.finetune or PEFT")


def main(values: flags.FlagValues) -> None:
    if values.manifest is not None:
        _speak_manifest(values)
        return
    job = _read_job(values)
    model = _load(values)
    report = Report(model)
    speak = _stream if values.stream else _speak
    codes = speak(model, job, report)
    if job.codes_out is not None:
        save_codes(job.codes_out, np.concatenate(codes))
    report.finish(job.out, sum(map(len, codes)))


@dataclass(frozen=True)
class _Job:
    """Everything that can be checked before a model is loaded, checked."""

    turns: list[Turn]
    request: Request
    out: str
    format: str | None
    codes_out: Path | None


def _read_job(values: flags.FlagValues) -> _Job:
    for name in MANIFEST_FLAGS:
        if values[name].present:
            raise InputError(f"--{name} is for --manifest, which is missing")
    if values.out is None:
        raise InputError("--out is missing: name a file to write, such as --out=hello.wav")
    check_out(values.out, values.format)
    codes_out = None if values.codes_out is None else Path(values.codes_out)
    if codes_out is not None:
        check_codes_out(codes_out)
    turns, request = _read_turns(values), _read_request(values)
    return _Job(turns, request, values.out, values.format, codes_out)


def _read_turns(values: flags.FlagValues) -> list[Turn]:
    if (values.text is None) == (values.script is None):
        raise InputError("give either --text or --script")
    if values.script is not None:
        spoken = read_script(Path(values.script))
    else:
        spoken = [Turn(values.speaker, values.text)]
    turns = _read_context(values) + spoken
    for turn in turns:
        check_text(turn.text)
        if turn.audio is not None and not turn.audio.is_file():
            raise InputError(f"context audio {turn.audio} does not exist")
    return turns


def _read_context(values: flags.FlagValues) -> list[Turn]:
    audio, text, speakers = values.context_audio, values.context_text, values.context_speaker
    speakers = speakers or [0] * len(audio)
    if not len(audio) == len(text) == len(speakers):
        raise InputError(
            f"{len(audio)} --context_audio, {len(text)} --context_text and {len(speakers)} "
            "--context_speaker: every context turn needs one of each"
        )
    return [
        Turn(speaker, words, Path(file))
        for file, words, speaker in zip(audio, text, speakers, strict=True)
    ]


def _read_request(values: flags.FlagValues) -> Request:
    """What all turns have in common; its text is only there to be replaced."""
    return Request(
        text=values.text or "?",
        speaker=values.speaker,
        sampling=sampling_flags.read_flags(values),
        max_audio_length_ms=values.max_audio_length_ms,
        seed=values.seed,
        guard=values.guard,
    )


def _load(values: flags.FlagValues) -> Generator:
    name = values.checkpoint
    if name in RANDOM:
        cli.warn(f"{name}: the weights are random, the sound is noise and not speech")
    if name in BUNDLED:
        cli.warn(
            f"{name}: a very small model of digits and simple sentences; it guesses other words"
        )
    return load(name, values.dtype, values.quantize, adapters=values.adapters)


def _warn(notice: Notice) -> None:
    cli.warn(notice.message)


# One way to speak the turns of a job, whatever is done with each request.
Speak = Callable[[Request], np.ndarray]


def _speak_turns(model: Generator, job: _Job, speak: Speak) -> list[np.ndarray]:
    """The codes of each turn that has no recording; every turn hears all before it."""
    context: list[Segment] = []
    spoken = []
    for turn in job.turns:
        if turn.audio is not None:
            audio = load_audio(turn.audio, model.sample_rate)
            context.append(Segment(turn.speaker, turn.text, audio))
            continue
        request = dataclasses.replace(
            job.request,
            text=turn.text,
            speaker=turn.speaker,
            context=tuple(context),
            # Turns of a script are different draws.
            seed=job.request.seed + len(spoken),
        )
        codes = speak(request)
        context.append(Segment(turn.speaker, turn.text, codes=codes))
        spoken.append(codes)
    return spoken


def _speak(model: Generator, job: _Job, report: Report) -> list[np.ndarray]:
    def speak(request: Request) -> np.ndarray:
        with report.turn() as progress:
            return model.generate_codes(request, progress=progress, notify=_warn)

    codes = _speak_turns(model, job, speak)
    audio = np.concatenate([model.decode(turn) for turn in codes])
    save_speech(job.out, job.format, audio, model.sample_rate)
    return codes


def _stream(model: Generator, job: _Job, report: Report) -> list[np.ndarray]:
    with (
        open_speech(job.out, job.format, model.sample_rate) as write,
        Engine(model, max_batch=1) as engine,
    ):

        def speak(request: Request) -> np.ndarray:
            ticket = engine.submit(request)
            num_frames = 0
            with report.turn() as progress:
                for chunk in ticket:
                    write(chunk)
                    num_frames += len(chunk) // model.codec.frame_size
                    if progress is not None:
                        progress(num_frames)
            for notice in ticket.notices:
                _warn(notice)
            return ticket.codes()

        return _speak_turns(model, job, speak)


def _speak_manifest(values: flags.FlagValues) -> None:
    """Speaks the lines of a manifest, or this process's share of them."""
    out_dir, suffix = _check_manifest_flags(values)
    lines = read_manifest(Path(values.manifest), _read_request(values))
    index, count = processes.join(values)
    model = _load(values)
    check_lines(model, lines)
    share = lines[index::count]
    with lines_bar(len(share)) as (warn, progress):
        failed = speak_manifest(model, share, out_dir, suffix, values.batch, warn, progress)
    for message in failed:
        cli.warn(message)
    if failed:
        raise CSMError(f"{len(failed)} of {len(share)} lines failed, see above")


def _check_manifest_flags(values: flags.FlagValues) -> tuple[Path, str]:
    for name in ("text", "script", "out", "codes_out"):
        if values[name].present:
            raise InputError(f"--{name} and --manifest do not go together")
    context = values.context_audio or values.context_text or values.context_speaker
    if values.stream or context:
        raise InputError(
            "--manifest takes neither --stream nor --context_audio: lines have context"
        )
    if values.out_dir is None:
        raise InputError("--out_dir is missing: name the directory for the files of --manifest")
    out_dir, suffix = Path(values.out_dir), f".{values.format or 'wav'}"
    check_format(suffix)
    make_directory(out_dir)
    return out_dir, suffix


def run(argv: Sequence[str] | None = None) -> int:
    return cli.run(PROGRAM, __doc__, define_flags, main, argv)


if __name__ == "__main__":
    sys.exit(run())
