"""Flags of a training run: those of the dataclasses that configure it, and a few of their own."""

import re

from absl import flags

from csm_jax.cli import flags as cli
from csm_jax.cli import model_flags, processes
from csm_jax.cli.dataclass_flags import define_flags as define_fields
from csm_jax.cli.dataclass_flags import read_flags
from csm_jax.config import CSMConfig
from csm_jax.errors import InputError
from csm_jax.model import lora
from csm_jax.model.lora import LoRAConfig
from csm_jax.model.precision import Precision
from csm_jax.train.data import ON_BAD
from csm_jax.train.examples import TURNS, Selection
from csm_jax.train.guided_attention import GuidedAttention
from csm_jax.train.loop import RunConfig
from csm_jax.train.optimizer import KINDS, OptimizerConfig
from csm_jax.train.parts import GROUPS, PARTS, find_parts
from csm_jax.train.presets import PRESETS, find_preset
from csm_jax.train.publish import check_name
from csm_jax.train.step import TrainStepConfig

ADAPTER_RATE, WHOLE_RATE = 2e-4, 3e-5
# Flags that may change when a run is resumed: they do not affect what is trained.
FREE_FLAGS = {"out", "eval_only", "log_every", "save_every", "keep", "eval_every", "sample_every"}
FREE_FLAGS |= {"patience", "codes_cache", "fsdp", "coordinator", "num_processes", "process_id"}
FREE_FLAGS |= {"push_to_hub"}
# Flags that earlier versions did not have; runs of these go on without them.
_NEW_FLAGS = ("preset", "train", "codebook_weights", "decay", "final_rate", "beta2")
_ALIASES = {"optimiser"}
_HEAD = re.compile(r"(\d+)\.(\d+)")
_STEP_FIELDS = {"depth_share", "depth_weight", "codebook_weights", "remat", "accumulate", "ema"}
_OPTIMIZER_FIELDS = {"steps", "decay", "final_rate", "weight_decay", "clip", "beta2"}
_STEP_BOUNDS = {"depth_weight": 0.0, "accumulate": 1}
_RUN_BOUNDS = {"save_every": 1, "eval_every": 0, "sample_every": 0, "log_every": 1}
_RUN_BOUNDS |= {"keep": 1, "patience": 1}


def define_flags(values: flags.FlagValues) -> None:
    """Defines all flags of `csm_jax.finetune`."""
    model_flags.define_checkpoint(values)
    model_flags.define_adapters(values)
    _define_data(values)
    _define_training(values)
    define_fields(values, RunConfig, lower_bounds=_RUN_BOUNDS)
    define = cli.definer(values)
    text, whole = flags.DEFINE_string, flags.DEFINE_integer
    define(text, "out", None, "directory of the run: checkpoints, metrics, the result")
    define(flags.DEFINE_boolean, "eval_only", False, "print the losses on --data as JSON instead")
    hub = "OWNER/NAME: uploads the result there, with a model card; a new repository is private"
    define(text, "push_to_hub", None, hub)
    define(whole, "fsdp", 1, "devices that share the parameters between them", lower_bound=1)
    processes.define_flags(values, "that train together")


def _define_data(values: flags.FlagValues) -> None:
    define = cli.definer(values)
    text, real, listed = flags.DEFINE_string, flags.DEFINE_float, flags.DEFINE_list
    define(text, "data", None, "JSON lines of conversations; audio is relative to the file")
    define(text, "eval_data", None, "conversations to evaluate on, instead of --holdout")
    define(real, "holdout", 0.05, "share of the conversations to evaluate on")
    define(text, "on_bad_data", "fail", "fail or skip, for data that cannot be used")
    define(listed, "speakers", [], "train on the turns of these speakers; default: all")
    define_fields(values, Selection, {"turns", "max_len"}, {"max_len": 32})
    define(text, "codes_cache", None, "directory for codes of recordings; default: the cache")


def _define_training(values: flags.FlagValues) -> None:
    define = cli.definer(values)
    text, whole, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    flag, listed = flags.DEFINE_boolean, flags.DEFINE_list
    presets = f"published settings, {', '.join(PRESETS)}; flags that are given replace theirs"
    define(text, "preset", None, presets)
    parts = f"the parts that are trained, the others stay: {', '.join([*GROUPS, *PARTS])}"
    define(listed, "train", ["all"], parts)
    define(flag, "from_scratch", False, "random weights instead; sizes, tokenizer and codec stay")
    define(whole, "lora_rank", 0, "of adapters; 0 trains the weights themselves", lower_bound=0)
    define(real, "lora_alpha", None, "adapters are scaled by alpha / rank; default: twice the rank")
    targets = f"projections that have adapters, of {', '.join(lora.TARGETS)}"
    define(listed, "lora_targets", list(LoRAConfig.targets), targets)
    define(whole, "batch_size", 8, "conversations in a batch", lower_bound=1)
    kinds = "adamw; or muon, which is faster --from_scratch"
    define(text, "optimizer", OptimizerConfig.kind, kinds)
    flags.DEFINE_alias("optimiser", "optimizer", flag_values=values)
    rate = f"peak learning rate; default: {ADAPTER_RATE} for adapters, else {WHOLE_RATE}"
    define(real, "learning_rate", None, rate)
    define(whole, "warmup", None, "steps up to the peak; default: a 20th, at most 100")
    bounds = {"steps": 1, "weight_decay": 0.0}
    define_fields(values, OptimizerConfig, _OPTIMIZER_FIELDS, bounds)
    define_fields(values, TrainStepConfig, _STEP_FIELDS, _STEP_BOUNDS)
    define(listed, "guided_heads", [], "LAYER.HEAD: attention drawn to the words that are spoken")
    define(real, "guided_weight", 1.0, "of guided attention at the first step", lower_bound=0.0)
    define(whole, "guided_steps", None, "until its weight is 0; default: half of them all")
    diagonal = "share of a text without word times; 0: not guided"
    define(real, "guided_diagonal", Selection.diagonal, diagonal)
    define(text, "dtype", "auto", "to compute in: auto, float32 or bfloat16")
    define(whole, "seed", 0, "the same seed and data give the same weights", lower_bound=0)


def apply_preset(values: flags.FlagValues) -> None:
    """Sets the flags that --preset has values for and the command line has not; says so.

    Raises:
      InputError: there is no such preset.
    """
    if values.preset is None:
        return
    preset = find_preset(values.preset)
    left = {name: value for name, value in preset.values.items() if not values[name].present}
    for name, value in left.items():
        values[name].value = value
    listed = " ".join(f"--{name}={_as_text(value)}" for name, value in left.items())
    cli.warn(f"--preset={values.preset} ({preset.source}): {listed}")


def _as_text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_as_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def check(values: flags.FlagValues) -> None:
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
    for speaker in values.speakers:
        if not speaker.removeprefix("-").isdecimal():
            raise InputError(f"--speakers has {speaker}, but must be numbers with commas between")
    if values.push_to_hub is not None:
        check_name(values.push_to_hub)
    read_flags(values, TrainStepConfig, _STEP_FIELDS)
    _read_optimizer(values)
    _check_parts(values)
    _check_base(values)
    _check_guided(values)


def _check_parts(values: flags.FlagValues) -> None:
    """Raises `InputError` for parts that cannot be trained with the other flags."""
    trained = find_parts(values.train)
    if values.from_scratch and trained < set(PARTS):
        raise InputError("--from_scratch trains everything: leave --train out")
    if values.guided_heads and "backbone" not in trained:
        raise InputError("--guided_heads are heads of the backbone, which --train leaves out")
    if not values.lora_rank or not values["train"].present:
        return
    adapted = read_lora(values).adapted_parts
    for name in values.train:
        if not find_parts([name]) & adapted:
            raise InputError(
                f"--train has {name}, which has no adapters with --lora_targets="
                f"{','.join(values.lora_targets)}: leave it out, or train it without --lora_rank"
            )


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


def read_selection(values: flags.FlagValues, model: CSMConfig) -> Selection:
    """The turns that count in the loss."""
    speakers = [int(speaker) for speaker in values.speakers] or None
    max_len = min(values.max_len, model.backbone.max_seq_len)
    is_guided = bool(values.guided_heads)
    return Selection(speakers, values.turns, max_len, is_guided, values.guided_diagonal)


def read_step(
    values: flags.FlagValues, model: CSMConfig, precision: Precision, lora: LoRAConfig | None
) -> TrainStepConfig:
    """What a step is compiled for, but for the mesh."""
    config = TrainStepConfig(
        model=model,
        optimizer=_read_optimizer(values),
        precision=precision,
        lora=lora,
        guided=_read_guided(values),
        **read_flags(values, TrainStepConfig, _STEP_FIELDS),
    )
    if config.guided:
        config.guided.check(model)
    return config


def _read_optimizer(values: flags.FlagValues) -> OptimizerConfig:
    rate = values.learning_rate
    if rate is None:
        rate = ADAPTER_RATE if values.lora_rank else WHOLE_RATE
    return OptimizerConfig(
        kind=values.optimizer,
        learning_rate=rate,
        warmup=min(values.steps // 20, 100) if values.warmup is None else values.warmup,
        **read_flags(values, OptimizerConfig, _OPTIMIZER_FIELDS),
    )


def _read_guided(values: flags.FlagValues) -> GuidedAttention | None:
    matches = [_HEAD.fullmatch(head) for head in values.guided_heads]
    heads = tuple((int(match[1]), int(match[2])) for match in matches if match)
    if not heads:
        return None
    steps = max(1, values.steps // 2) if values.guided_steps is None else values.guided_steps
    return GuidedAttention(heads, values.guided_weight, steps)


def read_lora(values: flags.FlagValues) -> LoRAConfig:
    """The adapters to train; --lora_rank is at least 1."""
    alpha = 2.0 * values.lora_rank if values.lora_alpha is None else values.lora_alpha
    parts = tuple(part for part in lora.PARTS if part in find_parts(values.train))
    return LoRAConfig(values.lora_rank, alpha, tuple(values.lora_targets), parts)


def read_run(values: flags.FlagValues) -> RunConfig:
    """The intervals of a run."""
    return RunConfig(**read_flags(values, RunConfig))


def read_settings(values: flags.FlagValues) -> dict[str, object]:
    """The flags that must be the same when a run is resumed."""
    left_out = FREE_FLAGS | _ALIASES
    left_out |= {name for name in _NEW_FLAGS if values[name].value == values[name].default}
    if not values.guided_heads:
        # As in the settings of versions that guided no attention.
        left_out |= {name for name in values if name.startswith("guided_")}
    names = [name for name in values if name not in left_out and not name.startswith("help")]
    return {name: values[name].value for name in sorted(names)}
