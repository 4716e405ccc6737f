"""Trains a model on conversations.

    python -m csm_jax.finetune --checkpoint=sesame/csm-1b --data=train.jsonl --out=run
    python -m csm_jax.finetune ... --lora_rank=16
    python -m csm_jax.finetune --checkpoint=run/model --data=test.jsonl --eval_only

A line of the data is a conversation: [{"speaker": 0, "text": "...", "audio": "a.wav"}, ...]. The
same command again resumes a run that was stopped.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from csm_jax.cli import flags as cli
from csm_jax.cli import model_flags, processes
from csm_jax.errors import InputError
from csm_jax.inference.generator import Generator
from csm_jax.inference.request import Request
from csm_jax.loading.hub import cache_directory
from csm_jax.model.layers import Params
from csm_jax.model.lora import DEFAULT_TARGETS, LoRAConfig
from csm_jax.model.precision import Precision, resolve
from csm_jax.train import fsdp
from csm_jax.train.batches import Batch, ordered_batches, shuffled_batches, split_holdout
from csm_jax.train.codes import CodeCache
from csm_jax.train.data import ON_BAD, read_conversations, report
from csm_jax.train.examples import TURNS, Example, Selection, data_limits, make_examples
from csm_jax.train.guided_attention import GuidedAttention, guided_frames
from csm_jax.train.log import plot_losses
from csm_jax.train.loop import Run, RunConfig, evaluate
from csm_jax.train.optimizer import KINDS, OptimizerConfig
from csm_jax.train.pretrained import PretrainedModel, load_pretrained, new_adapters
from csm_jax.train.result import SampleWriter, Speak, run_directory, write_result
from csm_jax.train.step import TrainStepConfig, init_state

PROGRAM = "csm_jax.finetune"
# Flags that may change when a run is resumed: they do not affect what is trained.
FREE_FLAGS = {"out", "eval_only", "log_every", "save_every", "keep", "eval_every", "sample_every"}
FREE_FLAGS |= {"patience", "codes_cache", "fsdp", "coordinator", "num_processes", "process_id"}
ALIASES = {"optimiser"}
_HEAD = re.compile(r"(\d+)\.(\d+)")
ADAPTER_RATE, WHOLE_RATE = 2e-4, 3e-5


def define_flags(values: flags.FlagValues) -> None:
    define = cli.definer(values)
    text, whole, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    flag, listed = flags.DEFINE_boolean, flags.DEFINE_list
    model_flags.define_checkpoint(values)
    model_flags.define_adapters(values)
    define(flag, "from_scratch", False, "random weights instead; sizes, tokenizer and codec stay")
    define(text, "data", None, "JSON lines of conversations; audio is relative to the file")
    define(text, "out", None, "directory of the run: checkpoints, metrics, the result")
    define(text, "eval_data", None, "conversations to evaluate on, instead of --holdout")
    define(real, "holdout", 0.05, "share of the conversations to evaluate on")
    define(flag, "eval_only", False, "print the losses on --data as JSON, without training")
    define(text, "on_bad_data", "fail", "fail or skip, for data that cannot be used")
    define(listed, "speakers", [], "train on the turns of these speakers; default: all")
    define(text, "turns", "all", "train on all turns of a conversation, or on the last")
    define(whole, "max_len", 2048, "positions of a conversation, at most", lower_bound=32)
    define(text, "codes_cache", None, "directory for codes of recordings; default: the cache")
    define(whole, "lora_rank", 0, "of adapters; 0 trains all weights", lower_bound=0)
    define(real, "lora_alpha", None, "adapters are scaled by alpha / rank; default: twice the rank")
    define(listed, "lora_targets", list(DEFAULT_TARGETS), "projections that have adapters")
    define(whole, "steps", 1000, "optimizer steps", lower_bound=1)
    define(whole, "batch_size", 8, "conversations in a batch", lower_bound=1)
    define(whole, "accumulate", 1, "micro-batches that a batch is computed in", lower_bound=1)
    define(text, "optimizer", "adamw", "adamw; or muon, which is faster --from_scratch")
    flags.DEFINE_alias("optimiser", "optimizer", flag_values=values)
    rate = f"peak learning rate; default: {ADAPTER_RATE} for adapters, else {WHOLE_RATE}"
    define(real, "learning_rate", None, rate)
    define(whole, "warmup", None, "steps up to the peak; default: a 20th, at most 100")
    define(real, "weight_decay", 0.01, "of matrices", lower_bound=0.0)
    define(real, "clip", 1.0, "largest norm of a gradient")
    define(real, "depth_share", 1 / 16, "share of the frames that train the depth decoder")
    define(real, "depth_weight", 1.0, "of the depth decoder's loss", lower_bound=0.0)
    define(listed, "guided_heads", [], "LAYER.HEAD: attention drawn to the words that are spoken")
    define(real, "guided_weight", 1.0, "of guided attention at the first step", lower_bound=0.0)
    define(whole, "guided_steps", None, "until its weight is 0; default: half of them all")
    define(real, "guided_diagonal", 0.0, "share of a text without word times; 0: not guided")
    define(real, "ema", 0.0, "decay of the weights' moving average; 0 keeps none")
    define(text, "dtype", "auto", "to compute in: auto, float32 or bfloat16")
    define(flag, "remat", True, "recompute activations in the backward pass, to save memory")
    define(whole, "seed", 0, "the same seed and data give the same weights", lower_bound=0)
    define(whole, "log_every", 10, "steps between lines of metrics.jsonl", lower_bound=1)
    define(whole, "save_every", 200, "steps between checkpoints", lower_bound=1)
    define(whole, "keep", 3, "checkpoints that are kept", lower_bound=1)
    define(whole, "eval_every", 200, "steps between evaluations; 0 is never", lower_bound=0)
    define(whole, "sample_every", 0, "steps between audio samples; 0 is never", lower_bound=0)
    define(whole, "patience", 10, "steps in a row without a finite gradient", lower_bound=1)
    define(whole, "fsdp", 1, "devices that share the parameters between them", lower_bound=1)
    processes.define_flags(values, "that train together")


def main(values: flags.FlagValues) -> None:
    _check(values)
    processes.join(values)
    if values.eval_only:
        _print_losses(values)
    else:
        _train(values)


def _check(values: flags.FlagValues) -> None:
    """Raises `InputError` for flags that are wrong, before anything is loaded."""
    if values.data is None:
        raise InputError("--data is missing: name a file of conversations, a JSON list a line")
    if values.out is None and not values.eval_only:
        raise InputError("--out is missing: name the directory of the run")
    choices_of = {"on_bad_data": ON_BAD, "turns": TURNS, "optimizer": KINDS}
    for name, choices in choices_of.items():
        if (given := values[name].value) not in choices:
            raise InputError(f"--{name} is {given}, but must be {' or '.join(choices)}")
    if values.dtype not in ("auto", "float32", "bfloat16"):
        # Gradients fall out of its range, and nothing here scales them.
        raise InputError(f"--dtype is {values.dtype}, but must be auto, float32 or bfloat16")
    if not 0 < values.depth_share <= 1:
        raise InputError(f"--depth_share is {values.depth_share}, but must be over 0, up to 1")
    for name in ("holdout", "ema"):
        if not 0 <= (given := getattr(values, name)) < 1:
            raise InputError(f"--{name} is {given}, but must be 0 or more, and under 1")
    _check_base(values)
    _check_guided(values)
    for speaker in values.speakers:
        if not speaker.removeprefix("-").isdecimal():
            raise InputError(f"--speakers has {speaker}, but must be numbers with commas between")


def _check_base(values: flags.FlagValues) -> None:
    """Raises `InputError` for new adapters of weights that are not saved anywhere."""
    if not values.lora_rank or values.eval_only:
        return
    if values.adapters:
        raise InputError(
            "--adapters and --lora_rank do not go together, since the new adapters would need the "
            "merged weights: merge with csm_jax.convert --adapters first, and train that checkpoint"
        )
    if values.from_scratch:
        raise InputError(
            "--from_scratch and --lora_rank do not go together, since the new weights would not be "
            "saved with the adapters: leave out one of them"
        )


def _check_guided(values: flags.FlagValues) -> None:
    """Raises `InputError` for flags of guided attention that are wrong."""
    for head in values.guided_heads:
        if not _HEAD.fullmatch(head):
            raise InputError(
                f"--guided_heads has {head}, but must be layers and heads of the backbone, from 0, "
                "such as 5.5"
            )
    if values.guided_steps is not None and values.guided_steps < 1:
        raise InputError(f"--guided_steps is {values.guided_steps}, but must be 1 or more")
    if not 0 <= values.guided_diagonal <= 1:
        raise InputError(f"--guided_diagonal is {values.guided_diagonal}, but must be 0 to 1")


def _print_losses(values: flags.FlagValues) -> None:
    config, pretrained = _prepare(values, trains_all=True)
    examples = _read_examples(values, pretrained, Path(values.data))
    losses = evaluate(pretrained.params, None, _batches_to_evaluate(examples, config), config)
    if jax.process_index() == 0:
        cli.show(json.dumps(losses))


def _train(values: flags.FlagValues) -> None:
    config, pretrained = _prepare(values, trains_all=not values.lora_rank)
    fsdp.check_batch_size(values.batch_size, config.accumulate, config.mesh)
    train, held_out = _read_data(values, pretrained)
    if config.guided:
        _check_spoken(train, values.data)
    with run_directory(Path(values.out), _settings(values)):
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
    params, frozen = pretrained.params, None
    if config.lora:
        params = new_adapters(pretrained, config.lora, values.seed, config.mesh)
        frozen = pretrained.params
    speak = _speak(pretrained, config.precision, _request(train, held_out))
    run = Run(
        out=out,
        step_config=config,
        run_config=_run_config(values),
        state=init_state(params, config),
        frozen=frozen,
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
        cli.warn(f"{result} is the result of {config.optimizer.steps} steps")


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
    selection = _selection(values, pretrained)
    made, more = make_examples(
        conversations, codes, pretrained.config, pretrained.tokenizer, selection
    )
    report(path, [*problems, *more], len(made), values.on_bad_data, cli.warn)
    return made


def _selection(values: flags.FlagValues, pretrained: PretrainedModel) -> Selection:
    speakers = [int(speaker) for speaker in values.speakers] or None
    max_len = min(values.max_len, pretrained.config.backbone.max_seq_len)
    is_guided = bool(values.guided_heads)
    return Selection(speakers, values.turns, max_len, is_guided, values.guided_diagonal)


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


def _prepare(values: flags.FlagValues, trains_all: bool) -> tuple[TrainStepConfig, PretrainedModel]:
    """The config of the step, and the checkpoint to train."""
    is_alone = jax.device_count() == 1 and values.fsdp == 1
    mesh = None if is_alone else fsdp.make_fsdp_mesh(values.fsdp)
    precision = resolve(values.dtype)
    pretrained = load_pretrained(
        values.checkpoint,
        precision,
        mesh,
        frozen=not trains_all,
        adapters=values.adapters or None,
        scratch_seed=values.seed if values.from_scratch else None,
    )
    config = TrainStepConfig(
        model=pretrained.config,
        optimizer=_optimizer(values),
        precision=precision,
        lora=None if trains_all else _lora(values),
        depth_share=values.depth_share,
        depth_weight=values.depth_weight,
        remat=values.remat,
        accumulate=values.accumulate,
        ema=values.ema,
        mesh=mesh,
        guided=_guided(values),
    )
    if config.guided:
        config.guided.check(config.model)
    return config, pretrained


def _optimizer(values: flags.FlagValues) -> OptimizerConfig:
    rate = values.learning_rate
    if rate is None:
        rate = ADAPTER_RATE if values.lora_rank else WHOLE_RATE
    return OptimizerConfig(
        kind=values.optimizer,
        learning_rate=rate,
        steps=values.steps,
        warmup=min(values.steps // 20, 100) if values.warmup is None else values.warmup,
        weight_decay=values.weight_decay,
        clip=values.clip,
    )


def _guided(values: flags.FlagValues) -> GuidedAttention | None:
    matches = [_HEAD.fullmatch(head) for head in values.guided_heads]
    heads = tuple((int(match[1]), int(match[2])) for match in matches if match)
    if not heads:
        return None
    steps = max(1, values.steps // 2) if values.guided_steps is None else values.guided_steps
    return GuidedAttention(heads, values.guided_weight, steps)


def _lora(values: flags.FlagValues) -> LoRAConfig:
    alpha = 2.0 * values.lora_rank if values.lora_alpha is None else values.lora_alpha
    return LoRAConfig(values.lora_rank, alpha, tuple(values.lora_targets))


def _run_config(values: flags.FlagValues) -> RunConfig:
    return RunConfig(
        save_every=values.save_every,
        eval_every=values.eval_every,
        sample_every=values.sample_every,
        log_every=values.log_every,
        keep=values.keep,
        patience=values.patience,
    )


def _settings(values: flags.FlagValues) -> dict[str, object]:
    """The flags that must be the same when a run is resumed."""
    left_out = FREE_FLAGS | ALIASES
    if not values.guided_heads:
        # As in the settings of versions that guided no attention.
        left_out |= {name for name in values if name.startswith("guided_")}
    names = [name for name in values if name not in left_out and not name.startswith("help")]
    return {name: values[name].value for name in sorted(names)}


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return cli.run(PROGRAM, __doc__, define_flags, main, argv)


if __name__ == "__main__":
    sys.exit(run())
