"""Speaks text from the command line.

    python -m csm_jax.generate --text="Hello from Sesame." --out=hello.wav
    python -m csm_jax.generate --text="Hello." --stream --out=- | ffplay -
    python -m csm_jax.generate --manifest=lines.jsonl --out_dir=speech
    python -m csm_jax.generate --context_audio=a.wav --context_text="..." --save_voice=a.safetensors
    python -m csm_jax.generate --text="Hello." --voice=a.safetensors --out=hello.wav

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

from csm_jax.align.finding import with_alignment
from csm_jax.cli import dataclass_flags, model_flags, processes, voice_flags, watermark_flags
from csm_jax.cli import flags as cli
from csm_jax.cli.manifest import (
    LineFiles,
    check_lines,
    read_manifest,
    speak_manifest,
    with_voice,
)
from csm_jax.cli.output import check_codes_out, check_out, open_speech, save_codes, save_speech
from csm_jax.cli.progress import Report, lines_bar
from csm_jax.cli.voice_flags import VoiceFiles
from csm_jax.cli.words import WORDS_HELP, WordsFile, check_ending
from csm_jax.errors import CSMError, InputError
from csm_jax.inference.alignment.formats import check_words_out
from csm_jax.inference.conversation import Conversation
from csm_jax.inference.engine import Engine
from csm_jax.inference.generator import Generator
from csm_jax.inference.request import Notice, Request
from csm_jax.io.audio import check_format, load_audio
from csm_jax.io.files import make_directory
from csm_jax.io.script import Turn, read_script
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.normalizing import normalize_text
from csm_jax.prompt.turns import Segment, check_text
from csm_jax.watermark import Watermark

PROGRAM = "csm_jax.generate"
REQUEST_FLAGS = (
    "text",
    "speaker",
    "max_audio_length_ms",
    "seed",
    "guard",
    "best_of",
    "context_seconds",
)
MANIFEST_FLAGS = ("out_dir", "batch", "coordinator", "num_processes", "process_id")


def define_flags(values: flags.FlagValues) -> None:
    define = cli.definer(values)
    text, flag = flags.DEFINE_string, flags.DEFINE_boolean
    texts, numbers = flags.DEFINE_multi_string, flags.DEFINE_multi_integer
    dataclass_flags.define_flags(values, Request, REQUEST_FLAGS, {"seed": 0})
    define(text, "out", None, "file of the speech: .wav .flac .mp3 .ogg .opus .pcm; - is stdout")
    define(flag, "stream", False, "write the speech while it is generated, frame by frame")
    define(text, "format", None, "of --out=- (wav, pcm) and of --manifest's files; default: wav")
    model_flags.define_flags(values)
    watermark_flags.define_flags(values)
    define(texts, "context_audio", [], "recording of an earlier turn; repeatable, oldest first")
    define(texts, "context_text", [], "its transcript; repeatable, in the same order")
    without = "accept recordings of earlier turns without transcripts; the speech can be less clear"
    define(flag, "context_without_text", False, without)
    define(numbers, "context_speaker", [], "its speaker; repeatable, in the same order")
    voice_flags.define_flags(values)
    define(text, "script", None, "JSON list of turns to speak instead of --text")
    dataclass_flags.define_flags(values, Sampling)
    define(text, "codes_out", None, "also write the codes there, int32 [frames, codebooks] .npy")
    define(text, "words_out", None, WORDS_HELP)
    normal = "speak texts as they are read aloud in English: no markup, numbers as words"
    define(flag, "normalize", False, normal)
    define(text, "manifest", None, "JSON lines to speak instead of --text, a file for each")
    define(text, "out_dir", None, "directory for the files of --manifest; existing ones are kept")
    lines = "lines of --manifest that are generated at once"
    define(flags.DEFINE_integer, "batch", 8, lines, lower_bound=1)
    processes.define_flags(values, "that share --manifest")


def main(values: flags.FlagValues) -> None:
    if values.manifest is not None:
        _speak_manifest(values)
        return
    if values.save_voice is not None and values.text is None and values.script is None:
        _save_voice(values)
        return
    job = _read_job(values)
    watermark = watermark_flags.read_watermark(values)
    model = model_flags.load_model(values)
    voice = job.voices.prepare(model, _recordings(job.turns, model.sample_rate))
    job = dataclasses.replace(job, defaults=dataclasses.replace(job.defaults, voice=voice))
    watermark_flags.warn_if_unmarked(values, watermark)
    if job.words_out is not None:
        model = with_alignment(model, values.checkpoint, cli.warn, values.adapters)
    report = Report(model)
    speak = _stream if values.stream else _speak
    conversation, spoken_words = speak(model, job, report, watermark)
    # Recorded turns have audio instead.
    codes = np.concatenate([turn.codes for turn in conversation.turns if turn.codes is not None])
    if job.codes_out is not None:
        save_codes(job.codes_out, codes)
    spoken_words.write()
    report.finish(job.out, len(codes))


def _save_voice(values: flags.FlagValues) -> None:
    """Writes a voice without speaking."""
    voices, turns = voice_flags.read_voices(values), _read_context(values)
    _check_turns(turns, values.context_without_text)
    model = model_flags.load_model(values)
    voices.prepare(model, _recordings(turns, model.sample_rate))


@dataclass(frozen=True)
class _Job:
    """The turns to speak and the files to write, checked as far as possible without a model.

    Attributes:
      turns: the turns to speak, and recorded ones.
      defaults: the values that all turns share.
    """

    turns: list[Turn]
    defaults: Request
    out: str
    format: str | None
    codes_out: Path | None
    words_out: Path | None
    voices: VoiceFiles


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
    words_out = None if values.words_out is None else Path(values.words_out)
    if words_out is not None:
        check_words_out(words_out)
    turns, defaults = _read_turns(values), _read_defaults(values)
    voices = voice_flags.read_voices(values)
    return _Job(turns, defaults, values.out, values.format, codes_out, words_out, voices)


def _read_turns(values: flags.FlagValues) -> list[Turn]:
    if (values.text is None) == (values.script is None):
        raise InputError("give either --text or --script")
    if values.script is not None:
        script = read_script(Path(values.script))
    else:
        script = [Turn(values.speaker, values.text)]
    if values.normalize:
        script = [_normalized(turn) for turn in script]
    turns = _read_context(values) + script
    _check_turns(turns, values.context_without_text)
    return turns


def _check_turns(turns: Sequence[Turn], without_text: bool) -> None:
    for turn in turns:
        if turn.text or turn.audio is None or not without_text:
            check_text(turn.text)
        if turn.audio is not None and not turn.audio.is_file():
            raise InputError(f"context audio {turn.audio} does not exist")


def _normalized(turn: Turn) -> Turn:
    """A turn to speak as it is read aloud; the transcript of a recording stays."""
    if turn.audio is not None:
        return turn
    return dataclasses.replace(turn, text=normalize_text(turn.text))


def _read_context(values: flags.FlagValues) -> list[Turn]:
    audio, text, speakers = values.context_audio, values.context_text, values.context_speaker
    speakers = speakers or [0] * len(audio)
    if values.context_without_text:
        text = text or [""] * len(audio)
    if not len(audio) == len(text) == len(speakers):
        raise InputError(
            f"{len(audio)} --context_audio, {len(text)} --context_text and {len(speakers)} "
            "--context_speaker: every context turn needs one of each; or give no text and "
            "--context_without_text"
        )
    return [
        Turn(speaker, words, Path(file))
        for file, words, speaker in zip(audio, text, speakers, strict=True)
    ]


def _read_defaults(values: flags.FlagValues) -> Request:
    """The values of the flags for every turn or line; without --text, a placeholder is the text."""
    given = dataclass_flags.read_flags(values, Request, REQUEST_FLAGS)
    given["text"] = given["text"] or "?"
    sampling = Sampling(**dataclass_flags.read_flags(values, Sampling))
    return Request(**given, sampling=sampling, pauses=values.normalize)


def _warn(notice: Notice) -> None:
    cli.warn(notice.message)


def _conversation(model: Generator | Engine, job: _Job) -> Conversation:
    defaults = job.defaults
    return Conversation(
        model,
        seed=defaults.seed,
        sampling=defaults.sampling,
        max_audio_length_ms=defaults.max_audio_length_ms,
        guard=defaults.guard,
        pauses=defaults.pauses,
        best_of=defaults.best_of,
        context_seconds=defaults.context_seconds,
        voice=defaults.voice,
    )


def _recordings(turns: Sequence[Turn], sample_rate: int) -> list[Segment]:
    """The turns that are recorded."""
    return [
        Segment(turn.speaker, turn.text or None, load_audio(turn.audio, sample_rate))
        for turn in turns
        if turn.audio is not None
    ]


def _speak_turns(
    conversation: Conversation, job: _Job, sample_rate: int, speak: Callable[[Turn], None]
) -> WordsFile:
    """Adds the recorded turns to the conversation, and speaks the others by `speak`; returns
    their words."""
    spoken_words = WordsFile(job.words_out)
    for turn in job.turns:
        if turn.audio is None:
            speak(turn)
            if conversation.last_speech is not None:
                spoken_words.add(conversation.last_speech)
        else:
            conversation.turns += _recordings([turn], sample_rate)
    return spoken_words


def _speak(
    model: Generator, job: _Job, report: Report, watermark: Watermark | None
) -> tuple[Conversation, WordsFile]:
    """Speaks all turns, then writes them together."""
    conversation = _conversation(model, job)
    audio: list[np.ndarray] = []

    def speak(turn: Turn) -> None:
        with report.turn() as progress:
            audio.append(
                conversation.speak(turn.text, turn.speaker, progress=progress, notify=_warn)
            )

    spoken_words = _speak_turns(conversation, job, model.sample_rate, speak)
    whole = np.concatenate(audio)
    if watermark is not None:
        whole = watermark.embed(whole, model.sample_rate)
    save_speech(job.out, job.format, whole, model.sample_rate)
    return conversation, spoken_words


def _stream(
    model: Generator, job: _Job, report: Report, watermark: Watermark | None
) -> tuple[Conversation, WordsFile]:
    """Writes each turn while it is spoken."""
    with (
        open_speech(job.out, job.format, model.sample_rate) as write,
        Engine(model, max_batch=1) as engine,
    ):
        conversation = _conversation(engine, job)
        marker = None if watermark is None else watermark.marker(model.sample_rate)

        def speak(turn: Turn) -> None:
            num_frames = 0
            with report.turn() as progress:
                for chunk in conversation.stream(turn.text, turn.speaker, notify=_warn):
                    write(chunk if marker is None else marker.add(chunk))
                    num_frames += len(chunk) // model.codec.frame_size
                    if progress is not None:
                        progress(num_frames)

        spoken_words = _speak_turns(conversation, job, model.sample_rate, speak)
        if marker is not None:
            write(marker.finish())
    return conversation, spoken_words


def _speak_manifest(values: flags.FlagValues) -> None:
    """Speaks the lines of a manifest, or this process's share of them."""
    files = _check_manifest_flags(values)
    lines = read_manifest(Path(values.manifest), _read_defaults(values), values.normalize)
    voices = voice_flags.read_voices(values)
    watermark = watermark_flags.read_watermark(values)
    files = dataclasses.replace(files, watermark=watermark)
    index, count = processes.join(values)
    model = model_flags.load_model(values)
    watermark_flags.warn_if_unmarked(values, watermark)
    lines = with_voice(lines, voices.prepare(model, []))
    check_lines(model, lines)
    if files.words_suffix is not None:
        model = with_alignment(model, values.checkpoint, cli.warn, values.adapters)
    share = lines[index::count]
    with lines_bar(len(share)) as (warn, progress):
        failed = speak_manifest(model, share, files, values.batch, warn, progress)
    for message in failed:
        cli.warn(message)
    if failed:
        raise CSMError(f"{len(failed)} of {len(share)} lines failed, see above")


def _check_manifest_flags(values: flags.FlagValues) -> LineFiles:
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
    files = LineFiles(Path(values.out_dir), f".{values.format or 'wav'}", values.words_out)
    check_format(files.suffix)
    if files.words_suffix is not None:
        check_ending(files.words_suffix)
    make_directory(files.directory)
    return files


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return cli.run(PROGRAM, __doc__, define_flags, main, argv)


if __name__ == "__main__":
    sys.exit(run())
