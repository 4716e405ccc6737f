"""Trains a model on conversations.

    python -m csm_jax.finetune --checkpoint=sesame/csm-1b --data=train.jsonl --out=run
    python -m csm_jax.finetune ... --lora_rank=16
    python -m csm_jax.finetune ... --preset=unsloth --push_to_hub=OWNER/NAME
    python -m csm_jax.finetune ... --train=depth_decoder,heads
    python -m csm_jax.finetune --checkpoint=run/model --data=test.jsonl --eval_only

A line of the data is a conversation: [{"speaker": 0, "text": "...", "audio": "a.wav"}, ...]. The
same command again resumes a run that was stopped.
"""

import dataclasses
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from csm_jax.cli import flags as cli
from csm_jax.cli import processes, training_flags
from csm_jax.errors import InputError
from csm_jax.inference.generator import Generator
from csm_jax.inference.request import Request
from csm_jax.loading.hub import cache_directory
from csm_jax.model.layers import Params
from csm_jax.model.lora import LoRAConfig
from csm_jax.model.precision import Precision, resolve
from csm_jax.train import fsdp
from csm_jax.train.batches import Batch, ordered_batches, shuffled_batches, split_holdout
from csm_jax.train.codes import CodeCache
from csm_jax.train.data import read_conversations, report
from csm_jax.train.examples import Example, data_limits, make_examples
from csm_jax.train.guided_attention import guided_frames
from csm_jax.train.log import plot_losses
from csm_jax.train.loop import Run, evaluate
from csm_jax.train.parts import PARTS, find_parts, split
from csm_jax.train.pretrained import PretrainedModel, load_pretrained, new_adapters
from csm_jax.train.publish import check_login, publish
from csm_jax.train.result import SampleWriter, Speak, run_directory, write_result
from csm_jax.train.step import TrainStepConfig, init_state

PROGRAM = "csm_jax.finetune"


def main(values: flags.FlagValues) -> None:
    training_flags.apply_preset(values)
    training_flags.check(values)
    processes.join(values)
    if values.eval_only:
        _print_losses(values)
    else:
        _train(values)


def _print_losses(values: flags.FlagValues) -> None:
    config, pretrained = _prepare(values, PARTS, None)
    examples = _read_examples(values, pretrained, Path(values.data))
    losses = evaluate(pretrained.params, None, _batches_to_evaluate(examples, config), config)
    if jax.process_index() == 0:
        cli.show(json.dumps(losses))


def _train(values: flags.FlagValues) -> None:
    if values.push_to_hub is not None:
        check_login()
    if values.lora_rank:
        config, pretrained = _prepare(values, (), training_flags.read_lora(values))
    else:
        config, pretrained = _prepare(values, find_parts(values.train), None)
    fsdp.check_batch_size(values.batch_size, config.accumulate, config.mesh)
    train, held_out = _read_data(values, pretrained)
    if config.guided:
        _check_spoken(train, values.data)
    with run_directory(Path(values.out), training_flags.read_settings(values)):
        _train_in(Path(values.out), values, config, pretrained, train, held_out)


def _check_spoken(examples: Sequence[Example], data: str) -> None:
    """Raises `InputError` if there is nothing to guide attention to."""
    spoken = [(each.spoken, each.loss_mask) for each in examples if each.spoken is not None]
    if not any(guided_frames(*each).any() for each in spoken):
        raise InputError(
            f"no turn of {data} has word times, which --guided_heads needs: add words to the turns "
            "(csm_jax.align finds them), or use --guided_diagonal=0.2"
        )


def _train_in(
    out: Path,
    values: flags.FlagValues,
    config: TrainStepConfig,
    pretrained: PretrainedModel,
    train: list[Example],
    held_out: list[Example],
) -> None:
    params, frozen = split(pretrained.params, pretrained.trained)
    if config.lora:
        params = new_adapters(pretrained, config.lora, values.seed, config.mesh)
    speak = _speak(pretrained, config.precision, _request(train, held_out))
    run = Run(
        out=out,
        step_config=config,
        run_config=training_flags.read_run(values),
        state=init_state(params, config),
        frozen=frozen or None,
        batches=shuffled_batches(train, values.batch_size, values.seed),
        held_out=_batches_to_evaluate(held_out, config),
        seed=values.seed,
        sample=SampleWriter(out, pretrained, config.lora, config.precision, speak),
    )
    del params  # the run donates them
    is_over = run.train()
    if not is_over:
        cli.warn(f"stopped after step {int(run.state.step)}: the same command goes on from there")
        return
    trained = fsdp.gather(run.averaged)
    if jax.process_index() == 0:
        plot_losses(out)
        limits = data_limits(train) if values.from_scratch else None
        result = write_result(out, pretrained, trained, config.lora, config.precision, limits)
        cli.warn(f"{result} is the result of {config.optimizer.steps} steps{_compilation(run)}")
        if values.push_to_hub is not None:
            settings = training_flags.read_settings(values)
            cli.warn(f"{publish(out, result, values.push_to_hub, settings)} has it too")


def _compilation(run: Run) -> str:
    """How long the step took to compile; nothing if no step was left to do."""
    if not run.compiled:
        return ""
    lengths = ", ".join(map(str, sorted(run.compiled)))
    return f"; compiled for rows of {lengths} in {sum(run.compiled.values()):.1f} s"


def _read_data(
    values: flags.FlagValues, pretrained: PretrainedModel
) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and examples to evaluate on."""
    examples = _read_examples(values, pretrained, Path(values.data))
    if values.eval_data is not None:
        return examples, _read_examples(values, pretrained, Path(values.eval_data))
    return split_holdout(examples, values.holdout, values.seed)


def _read_examples(
    values: flags.FlagValues, pretrained: PretrainedModel, path: Path
) -> list[Example]:
    """The conversations of a file; all its problems are printed before."""
    conversations, problems = read_conversations(path, cli.warn)
    directory = Path(values.codes_cache or cache_directory() / "codes")
    cache = CodeCache(directory, pretrained.codec, pretrained.config.num_codebooks)
    recordings = list(dict.fromkeys(turn.source for each in conversations for turn in each.turns))
    with tqdm(total=len(recordings), unit="recording", disable=None, leave=False) as bar:
        codes = cache.codes(recordings, bar.update)
    selection = training_flags.read_selection(values, pretrained.config)
    made, more = make_examples(
        conversations, codes, pretrained.config, pretrained.tokenizer, selection
    )
    report(path, [*problems, *more], len(made), values.on_bad_data, cli.warn)
    return made


def _batches_to_evaluate(examples: Sequence[Example], config: TrainStepConfig) -> list[Batch]:
    # All frames go through the depth decoder: there may be memory for no more than a row a device.
    return ordered_batches(examples, config.mesh.size if config.mesh else 1)


def _request(train: Sequence[Example], held_out: Sequence[Example]) -> Request:
    """The request of samples: the last turn of a held-out conversation, after its other turns."""
    *context, turn = (held_out or train)[0].segments
    return Request(turn.text or "", turn.speaker, tuple(context))


def _speak(pretrained: PretrainedModel, precision: Precision, request: Request) -> Speak:
    def speak(params: Params) -> np.ndarray:
        model = Generator.from_params(pretrained.config, params, pretrained.tokenizer, precision)
        return model.generate(request, notify=lambda notice: None)

    return speak


def _prepare(
    values: flags.FlagValues, trained: Collection[str], lora: LoRAConfig | None
) -> tuple[TrainStepConfig, PretrainedModel]:
    """The config of the step, and the checkpoint of which some parts are trained."""
    is_alone = jax.device_count() == 1 and values.fsdp == 1
    mesh = None if is_alone else fsdp.make_fsdp_mesh(values.fsdp)
    precision = resolve(values.dtype)
    if precision.weights == jnp.float16:  # what "auto" is on older GPUs: see --dtype
        precision = resolve("float32")
    pretrained = load_pretrained(
        values.checkpoint,
        precision,
        mesh,
        trained=trained,
        adapters=values.adapters or None,
        scratch_seed=values.seed if values.from_scratch else None,
    )
    config = training_flags.read_step(values, pretrained.config, precision, lora)
    return dataclasses.replace(config, mesh=mesh), pretrained


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return cli.run(PROGRAM, __doc__, training_flags.define_flags, main, argv)


if __name__ == "__main__":
    sys.exit(run())
