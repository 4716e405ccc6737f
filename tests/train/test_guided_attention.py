"""Guided attention: its loss, what it does to the attention, and that it costs nothing if off."""

import dataclasses
import json
import math

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from csm_jax import finetune
from csm_jax.cli import training_flags
from csm_jax.errors import InputError
from csm_jax.model.csm import bind
from csm_jax.model.precision import FLOAT32
from csm_jax.train import loss as loss_module
from csm_jax.train import step as step_module
from csm_jax.train.batches import Batch
from csm_jax.train.guided_attention import GuidedAttention, guided_entropy
from csm_jax.train.optimizer import OptimizerConfig
from csm_jax.train.step import TrainStepConfig, eval_step, init_state, losses, train_step

MODEL = fixtures.shallow(backbone=2)
HEAD = (MODEL.backbone.num_layers - 1, 1)
GUIDED = GuidedAttention((HEAD,), weight=1.0, steps=1000)
PLAIN = TrainStepConfig(MODEL, OptimizerConfig(learning_rate=1e-2, steps=50, warmup=0), FLOAT32)
CONFIG = dataclasses.replace(PLAIN, guided=GUIDED)
SEED = np.uint32(7)

pytestmark = pytest.mark.usefixtures("lenient")


def params():
    return fixtures.language_params(MODEL)


def batch(num_rows=4) -> Batch:
    """Rows of ten positions of text and 22 frames: each speaks two positions, in their order."""
    random = np.random.default_rng(0)
    frames = random.integers(1, 30, (num_rows, 32, MODEL.num_codebooks + 1)).astype(np.int32)
    mask = np.zeros(frames.shape, bool)
    mask[:, :10, -1] = mask[:, 10:, :-1] = True
    loss_mask = np.zeros(frames.shape[:2], bool)
    loss_mask[:, 10:] = True
    loss_mask[1, 10:20] = False  # context
    spoken = np.zeros((*frames.shape[:2], 2), np.int32)
    first = np.arange(22) * 9 // 22
    spoken[:, 10:] = np.stack([first, first + 2], axis=1)
    spoken[2, 15:18] = 0  # a pause
    return Batch(frames, mask, loss_mask, spoken)


def test_the_loss_is_the_logarithm_of_the_attention_on_what_is_spoken():
    """It is of the position before each frame, and of frames in the loss mask that speak."""
    given, (head, other) = batch(), (HEAD, (0, 0))

    @jax.jit
    def attend(params):
        return bind(MODEL, params).attend(given.frames, given.mask, (head, other))[1].attention

    attention = np.asarray(attend(params()))
    want, count = 0.0, 0
    for row, frame in zip(*np.nonzero(given.loss_mask), strict=True):
        first, end = given.spoken[row, frame]
        if first == end:
            continue
        count += 1
        for number in (0, 1):
            on_words = float(attention[row, number, frame - 1, first:end].sum())
            want -= math.log(on_words) / 2
    assert count == 4 * 22 - 10 - 3
    got = jax.jit(guided_entropy)(attention, given.spoken, given.loss_mask)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    config = dataclasses.replace(CONFIG, guided=dataclasses.replace(GUIDED, heads=(head, other)))
    keys = jax.vmap(jax.random.key)(jnp.arange(4, dtype=jnp.uint32))
    sums = jax.jit(losses, static_argnames="config")(params(), None, given, keys, config=config)
    np.testing.assert_allclose(sums.guided, want, rtol=1e-4)
    assert sums.num_guided == count


def test_training_draws_the_guided_head_to_what_is_spoken():
    state, mass = init_state(params(), CONFIG), []
    for _ in range(25):
        state, metrics = train_step(state, None, batch(), SEED, config=CONFIG)
        mass.append(math.exp(-metrics.guided_loss))
    assert mass[0] < 0.2
    assert mass[-1] > 0.8


def stepped(config: TrainStepConfig, given: Batch):
    return train_step(init_state(params(), config), None, given, SEED, config=config)


@pytest.mark.long
def test_parts_of_a_batch_change_nothing():
    state, metrics = stepped(CONFIG, batch())
    other, other_metrics = stepped(dataclasses.replace(CONFIG, accumulate=2), batch())
    for ours, theirs in [(other_metrics, metrics), (other.opt_state, state.opt_state)]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-6), ours, theirs)


@pytest.mark.parametrize(("step", "weight"), [(0, 2.0), (5, 1.5), (20, 0.0), (90, 0.0)])
def test_the_weight_falls_to_zero_in_a_line(step, weight):
    guided = GuidedAttention((HEAD,), weight=2.0, steps=20)
    assert guided.weight_at(jnp.asarray(step, jnp.int32)) == weight


@pytest.mark.long
def test_after_its_steps_guided_attention_changes_nothing():
    over = dataclasses.replace(CONFIG, guided=dataclasses.replace(GUIDED, weight=0.0))
    state, metrics = stepped(over, batch())
    plain, plain_metrics = stepped(PLAIN, batch()._replace(spoken=None))
    np.testing.assert_allclose(metrics.grad_norm, plain_metrics.grad_norm, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, plain.params
    )


def test_nothing_of_it_is_computed_when_it_is_off(monkeypatch):
    """Neither in a step without it nor in evaluation; and its inputs are no inputs then."""

    def fail(*_, **__):
        raise AssertionError("computed")

    for module in (loss_module, step_module):
        monkeypatch.setattr(module, "guided_frames", fail)
    monkeypatch.setattr(loss_module, "guided_entropy", fail)
    # Another number of steps, since a program that is in the cache is not traced again.
    config = dataclasses.replace(PLAIN, optimizer=dataclasses.replace(PLAIN.optimizer, steps=51))
    state, given = init_state(params(), config), batch()
    program = train_step.lower(state, None, given, SEED, config=config)
    assert program.out_info[1].guided_loss is None
    without = train_step.lower(state, None, given._replace(spoken=None), SEED, config=config)
    assert program.as_text() == without.as_text()
    guided = dataclasses.replace(config, guided=GUIDED)
    assert eval_step.lower(params(), None, given, config=guided).out_info.guided is None


@pytest.mark.parametrize("head", [(99, 0), (0, 99)])
def test_heads_that_do_not_exist_are_refused(head):
    with pytest.raises(InputError, match="there is no attention head"):
        GuidedAttention((HEAD, head), 1.0, 10).check(MODEL)


# --- The command ----------------------------------------------------------------------------------

COMMON = ["--checkpoint=random:tiny", "--batch_size=2", "--max_len=512", "--log_every=1"]
COMMON += ["--steps=2", "--holdout=0", "--sample_every=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return fixtures.write_conversations(tmp_path_factory.mktemp("data"))


def with_words(data):
    """The same data with the times of the two words of each turn."""
    lines = []
    for line in data.read_text().splitlines():
        turns = json.loads(line)
        for turn in turns:
            first, second = turn["text"].split()
            turn["words"] = [
                {"text": first, "start": 0.0, "end": 0.08},
                {"text": second, "start": 0.08, "end": 0.16},
            ]
        lines.append(json.dumps(turns) + "\n")
    path = data.with_name("timed.jsonl")
    path.write_text("".join(lines))
    return path


def run(data, out, *arguments: str) -> int:
    return finetune.run([*COMMON, f"--data={data}", f"--out={out}", *arguments])


def test_the_command_guides_attention_and_logs_its_loss(data, tmp_path):
    assert run(with_words(data), tmp_path / "run", "--guided_heads=0.1,1.0") == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["guided_loss"] > 0 for line in lines] == [True, True]
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["guided_heads"] == ["0.1", "1.0"]


def test_a_run_without_guided_attention_has_the_settings_of_earlier_versions():
    values = flags.FlagValues()
    training_flags.define_flags(values)
    values(["finetune"])
    assert not [name for name in training_flags.read_settings(values) if name.startswith("guided_")]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--guided_heads=5", "--guided_heads has 5, but must be layers and heads"),
        ("--guided_heads=0.99", "there is no attention head 0.99"),
        ("--guided_heads=0.1", "has word times, which --guided_heads needs"),
        ("--guided_steps=0", "--guided_steps is 0, but must be 1 or more"),
        ("--guided_diagonal=2", "--guided_diagonal is 2.0, but must be 0 to 1"),
    ],
)
def test_wrong_flags_are_one_line(data, tmp_path, capsys, flag, message):
    assert run(data, tmp_path / "run", flag) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]


@pytest.mark.long
def test_the_diagonal_guides_turns_without_word_times(data, tmp_path):
    arguments = ("--guided_heads=0.1", "--guided_diagonal=0.2")
    assert run(data, tmp_path / "run", *arguments) == 0
