"""Evaluates a model: it speaks a file of prompts, judges listen, and a report compares.

    python -m csm_jax.evaluate --checkpoint=demo --prompts=meta.lst --out=run
    python -m csm_jax.evaluate --checkpoint=demo --prompts=meta.lst --out=run --guard=off,on
    python -m csm_jax.evaluate --out=run --phases=report --baseline=earlier/default

The prompts are lines ID|PROMPT TEXT|PROMPT AUDIO|TEXT, as in seed-tts-eval, or .jsonl as for
csm_jax.generate --manifest. Options of requests take several values; each combination is a column
of the report. The same command continues an interrupted run.
"""

import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from csm_jax.cli import flags as cli
from csm_jax.cli import model_flags
from csm_jax.cli.manifest import check_lines
from csm_jax.cli.progress import lines_bar
from csm_jax.errors import CSMError, InputError
from csm_jax.evaluate import grid, judges
from csm_jax.evaluate.grid import Configuration
from csm_jax.evaluate.judge import (
    Judge,
    judge_takes,
    quality_judge,
    similarity_judge,
    word_judge,
)
from csm_jax.evaluate.metrics import read_results
from csm_jax.evaluate.normalization import load_normalizer
from csm_jax.evaluate.prompts import read_prompts
from csm_jax.evaluate.report import compare_results, write_report
from csm_jax.evaluate.speak import find_unspoken, speak_lines
from csm_jax.evaluate.takes import TakeDirectory
from csm_jax.inference.engine import Engine
from csm_jax.io.files import make_directory

PROGRAM = "csm_jax.evaluate"
SPEAK, JUDGE, REPORT = PHASES = ("speak", "judge", "report")
# Flags that all configurations of a directory have in common.
_MODEL_FLAGS = ("checkpoint", "adapters", "dtype", "quantize", "kernels", "batch")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    define = cli.definer(values)
    text, listed = flags.DEFINE_string, flags.DEFINE_list
    define(text, "prompts", None, "file of prompts: id|prompt text|prompt audio|text, or .jsonl")
    define(text, "out", None, "directory of the run: recordings, figures and the report")
    define(listed, "phases", list(PHASES), "those to run: speak, judge, report")
    model_flags.define_flags(values)
    lines = "requests at once, on which the times of the report depend"
    define(flags.DEFINE_integer, "batch", 8, lines, lower_bound=1)
    grid.define_flags(values)
    define(text, "recognizer", "whisper", "whisper, whisper:DIRECTORY, module:function or none")
    define(text, "language", "en", "of the texts")
    encoder = "resemblyzer, resemblyzer:FILE, module:function or none"
    define(text, "speaker_encoder", "resemblyzer", encoder)
    define(text, "quality_model", "dnsmos", "dnsmos, module:function or none")
    baseline = "directory of the configuration to compare with; default: the first one"
    define(text, "baseline", None, baseline)


def main(values: flags.FlagValues) -> None:
    """Runs the phases. Raises `CSMError`."""
    _check_phases(values)
    out = Path(values.out)
    configurations = grid.read_configurations(values)
    directories = [TakeDirectory(out / each.name) for each in configurations]
    # Before the speech: a judge that is missing should not show after an hour of it.
    loaded = _load_judges(values) if JUDGE in values.phases else []
    failed = []
    if SPEAK in values.phases:
        failed = _speak(values, configurations, directories)
    for judge in loaded:
        for directory in directories:
            _judge(directory, judge, directories)
    if REPORT in values.phases:
        _report(values, out, configurations, directories)
    if failed:
        raise CSMError(f"{len(failed)} lines failed, see above")


def _check_phases(values: flags.FlagValues) -> None:
    for phase in values.phases:
        if phase not in PHASES:
            raise InputError(f"--phases has {phase}, but there are {', '.join(PHASES)}")
    if values.out is None:
        raise InputError("--out is missing: name a directory for the run")
    if SPEAK in values.phases and values.prompts is None:
        raise InputError("--prompts is missing: name a file of lines id|prompt text|audio|text")


def _load_judges(values: flags.FlagValues) -> list[Judge]:
    found = []
    if recognizer := judges.load_recognizer(values.recognizer, values.language):
        name = f"{values.recognizer} {values.language}"
        found.append(word_judge(name, recognizer, load_normalizer(values.language)))
    if encoder := judges.load_speaker_encoder(values.speaker_encoder):
        found.append(similarity_judge(values.speaker_encoder, encoder))
    if quality := judges.load_quality_model(values.quality_model):
        found.append(quality_judge(values.quality_model, quality))
    return found


def _speak(
    values: flags.FlagValues,
    configurations: Sequence[Configuration],
    directories: Sequence[TakeDirectory],
) -> list[str]:
    """Speaks all configurations; returns a message for each line that has failed."""
    prompts = Path(values.prompts)
    lines = read_prompts(prompts)
    settings = [_settings(values, prompts, each) for each in configurations]
    for directory, own in zip(directories, settings, strict=True):
        directory.check(own)
    if not any(find_unspoken(lines, directory) for directory in directories):
        return []
    make_directory(Path(values.out))
    model = model_flags.load_model(values)
    check_lines(model, lines)
    failed = []
    with Engine(model, values.batch) as engine:
        # No take should wait for the compiler, or its times would be those of the compiler.
        engine.warm_up()
        for each, directory, own in zip(configurations, directories, settings, strict=True):
            with directory.writing(own), lines_bar(len(lines)) as (warn, progress):
                messages = speak_lines(engine, lines, each, directory, progress)
                for message in messages:
                    warn(message)
                failed += messages
    return failed


def _settings(
    values: flags.FlagValues, prompts: Path, configuration: Configuration
) -> dict[str, Any]:
    """All that the takes of a configuration depend on."""
    shared = {name: values[name].value for name in _MODEL_FLAGS}
    checksum = zlib.crc32(prompts.read_bytes())
    return {**shared, "prompts": checksum, **configuration.options}


def _judge(directory: TakeDirectory, judge: Judge, siblings: Sequence[TakeDirectory]) -> None:
    takes = directory.read()
    with lines_bar(len(takes)) as (_, progress):
        judge_takes(directory, takes, judge, siblings, progress)


def _report(
    values: flags.FlagValues,
    out: Path,
    configurations: Sequence[Configuration],
    directories: Sequence[TakeDirectory],
) -> None:
    results = [
        read_results(configuration.name, directory)
        for configuration, directory in zip(configurations, directories, strict=True)
    ]
    if values.baseline is None:
        baseline, others = results[0], results[1:]
    else:
        baseline = read_results(values.baseline, TakeDirectory(Path(values.baseline)))
        others = results
    comparisons = [compare_results(baseline, each) for each in others]
    settings = directories[0].settings()
    about = {name: settings[name] for name in _MODEL_FLAGS if settings.get(name) is not None}
    for flag in ("recognizer", "language", "speaker_encoder", "quality_model"):
        about[flag] = values[flag].value
    cli.show(write_report(out, about, results, comparisons, directories))


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return cli.run(PROGRAM, __doc__, define_flags, main, argv)


if __name__ == "__main__":
    sys.exit(run())
