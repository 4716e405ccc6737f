"""Speaks text from the command line.

    python -m csm_jax.generate --text="Hello from Sesame." --out=hello.wav

Context turns are given by repeating --context_audio, --context_text and --context_speaker in
order; a whole conversation by --script=turns.json.
"""

import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from csm_jax import cli
from csm_jax.audio import check_output, load_audio, save_audio
from csm_jax.errors import InputError, OutputError
from csm_jax.files import replace_file
from csm_jax.generator import RANDOM, Generator, load
from csm_jax.prompt import Segment, check_text
from csm_jax.sampling import Sampling
from csm_jax.script import Turn, read_script

PROGRAM = "csm_jax.generate"


def define_flags(values: flags.FlagValues) -> None:
    def define(kind: Callable, name: str, default: object, help: str, **kwargs: object) -> None:
        kind(name, default, help, flag_values=values, **kwargs)

    text, whole, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    define(text, "text", None, "what to say")
    define(text, "out", None, "where the speech goes: .wav .flac .mp3 .ogg .opus .pcm")
    define(text, "checkpoint", "sesame/csm-1b", f"hub name, directory, {' or '.join(RANDOM)}")
    define(whole, "speaker", 0, "whose turn it is, any number")
    define(real, "max_audio_length_ms", 10_000, "the speech is cut there if it has not ended")
    define(whole, "seed", 0, "the same seed gives the same speech", lower_bound=0)
    multi = flags.DEFINE_multi_string
    define(multi, "context_audio", [], "a turn heard before: its recording; repeatable")
    define(multi, "context_text", [], "its transcript; repeatable, in the same order")
    define(flags.DEFINE_multi_integer, "context_speaker", [], "its speaker; repeatable")
    define(text, "script", None, "JSON list of turns to speak instead of --text")
    define(real, "temperature", 0.9, "over 0; lower is safer")
    define(whole, "top_k", 50, "sample among the k likeliest")
    define(real, "top_p", 1.0, "sample among the likeliest that make up p; 1 is off")
    define(real, "min_p", 0.0, "drop what is less likely than this share of the likeliest")
    define(real, "repetition_penalty", 1.0, "for codebook 0; 1 is off")
    define(flags.DEFINE_boolean, "greedy", False, "always the likeliest")
    define(real, "depth_temperature", None, "for codebooks 1 and up; default: --temperature")
    define(whole, "depth_top_k", None, "for codebooks 1 and up; default: --top_k")
    define(text, "dtype", "auto", "auto, float32, bfloat16 or float16")
    define(text, "codes_out", None, "also write the codes there, int32 [frames, codebooks] .npy")


def main(values: flags.FlagValues) -> None:
    job = _read_job(values)
    model = _load(values.checkpoint, values.dtype)
    report = _Report(model, values.max_audio_length_ms)
    codes = _speak(model, job, values, report)
    audio = [model.decode(turn) for turn in codes]
    save_audio(job.out, np.concatenate(audio), model.sample_rate)
    if job.codes_out is not None:
        _save_codes(job.codes_out, np.concatenate(codes))
    report.finish(job.out, sum(map(len, codes)))


@dataclass(frozen=True)
class _Job:
    """Everything that can be checked before a model is loaded, checked."""

    turns: list[Turn]
    sampling: Sampling
    out: Path
    codes_out: Path | None


def _read_job(values: flags.FlagValues) -> _Job:
    if values.out is None:
        raise InputError("--out is missing: name a file to write, such as --out=hello.wav")
    out = Path(values.out)
    check_output(out)
    codes_out = None if values.codes_out is None else Path(values.codes_out)
    if codes_out is not None:
        _check_codes_out(codes_out)
    return _Job(_read_turns(values), _read_sampling(values), out, codes_out)


def _check_codes_out(path: Path) -> None:
    if path.suffix != ".npy":
        raise OutputError(f"codes are written as .npy, not to {path}")
    if path.is_dir():
        raise OutputError(f"{path} is a directory: name a file in it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: {path.parent} is no writable directory")


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


def _read_sampling(values: flags.FlagValues) -> Sampling:
    return Sampling(
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        min_p=values.min_p,
        repetition_penalty=values.repetition_penalty,
        greedy=values.greedy,
        depth_temperature=values.depth_temperature,
        depth_top_k=values.depth_top_k,
    )


def _load(name: str, dtype: str) -> Generator:
    if name in RANDOM:
        cli.warn(f"{name}: the weights are random, the sound is noise and not speech")
    return load(name, dtype)


def _speak(
    model: Generator, job: _Job, values: flags.FlagValues, report: "_Report"
) -> list[np.ndarray]:
    """The codes of each turn that has no recording; every turn hears all before it."""
    context: list[Segment] = []
    spoken = []
    for turn in job.turns:
        if turn.audio is not None:
            audio = load_audio(turn.audio, model.sample_rate)
            context.append(Segment(turn.speaker, turn.text, audio))
            continue
        with report.turn() as progress:
            codes = model.generate_codes(
                turn.text,
                turn.speaker,
                context,
                job.sampling,
                values.max_audio_length_ms,
                # Turns of a script are different draws.
                values.seed + len(spoken),
                progress,
            )
        report.check(turn.text, len(codes))
        context.append(Segment(turn.speaker, turn.text, codes=codes))
        spoken.append(codes)
    return spoken


def _save_codes(path: Path, codes: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, codes)
    try:
        replace_file(path, buffer.getvalue())
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror}") from error


class _Report:
    """Progress and a summary for people at a terminal; in a pipe, only what went wrong."""

    def __init__(self, model: Generator, max_audio_length_ms: float):
        self._max_ms = max_audio_length_ms
        self._max_frames = model.max_frames(max_audio_length_ms)
        self._frame_s = model.config.frame_ms / 1000
        self._started = time.perf_counter()

    def turn(self) -> "_Bar":
        return _Bar(self._max_frames, self._frame_s)

    def check(self, text: str, num_frames: int) -> None:
        if num_frames == self._max_frames:
            cli.warn(
                f"the speech was cut at {self._max_ms / 1000:g} s and may lack its end: "
                "raise --max_audio_length_ms"
            )
        if num_frames == 0:
            cli.warn(f"the model said nothing for {text!r}: try another --seed")

    def finish(self, out: Path, num_frames: int) -> None:
        if sys.stderr.isatty():
            elapsed = time.perf_counter() - self._started
            audio = num_frames * self._frame_s
            cli.warn(
                f"{out}: {num_frames} frames, {audio:.1f} s of audio, {_speed(elapsed, audio)}"
            )


class _Bar:
    """A bar of frames over a turn; nothing where stderr is no terminal."""

    def __init__(self, max_frames: int, frame_s: float):
        self._frame_s = frame_s
        self._started = time.perf_counter()
        self._bar = tqdm(total=max_frames, unit="frame", disable=None, leave=False)

    def __enter__(self) -> Callable[[int], None] | None:
        return None if self._bar.disable else self._update

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _update(self, num_frames: int) -> None:
        audio = num_frames * self._frame_s
        elapsed = time.perf_counter() - self._started
        self._bar.set_postfix_str(f"{audio:.1f} s of audio, {_speed(elapsed, audio)}", False)
        self._bar.update(num_frames - self._bar.n)


def _speed(elapsed: float, audio: float) -> str:
    """Real-time factor and its inverse, by name: people quote either."""
    if not audio:
        return f"{elapsed:.1f} s"
    return f"real-time factor {elapsed / audio:.2f} ({audio / elapsed:.2f} x real time)"


def run(argv: Sequence[str] | None = None) -> int:
    return cli.run(PROGRAM, __doc__, define_flags, main, argv)


if __name__ == "__main__":
    sys.exit(run())
