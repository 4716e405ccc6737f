"""Functions of logits in the frame loop, against closed forms; all in one compiled batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from countdown import CONFIG, NUM_CODEBOOKS, PROMPTS, VOCAB, random_weights

from csm_jax import CodeStep, InputError, Interventions, LogitsFunction, Request, Sampling
from csm_jax.inference.decode_batch import DecodeBatch, Utterance
from csm_jax.inference.request_state import RequestState

NUM_FRAMES, MAX_FRAMES = 12, 16
PENALTY, BANNED = 1.7, np.arange(0, VOCAB, 2)
FREE = Sampling(top_k=VOCAB)


def penalize(logits: jax.Array, seen: Any, step: CodeStep) -> tuple[jax.Array, Any]:
    """The repetition penalty, with the codes that were used as its state."""
    used = jnp.arange(len(logits), dtype=jnp.int32) == step.previous[0]
    seen = seen | used
    penalized = jnp.where(logits > 0, logits / PENALTY, logits * PENALTY)
    return jnp.where(seen, penalized, logits), seen


def ban(logits: jax.Array, state: Any, step: CodeStep) -> tuple[jax.Array, Any]:
    return logits.at[BANNED].set(-jnp.inf), state


def only(logits: jax.Array, code: jax.Array) -> jax.Array:
    ids = jnp.arange(len(logits), dtype=jnp.int32)
    return jnp.where(ids == code % len(logits), logits, -jnp.inf)


def count(logits: jax.Array, total: Any, step: CodeStep) -> tuple[jax.Array, Any]:
    """Codebook 0 is the one of the frame before, the frame's number and the state together."""
    return only(logits, step.previous[0] + step.frame + total["n"]), {"n": total["n"] + 1}


def count_on(logits: jax.Array, total: Any, step: CodeStep) -> tuple[jax.Array, Any]:
    """The other codebooks are the sum of all before, their number and a running number."""
    spoken = jnp.sum(jnp.where(step.codes < 0, 0, step.codes))
    return only(logits, spoken + step.codebook + total), total + 1


def counted(start: int, on: int) -> np.ndarray:
    """What `count` from `start` and `count_on` from `on` lead to."""
    codes, total = np.zeros((MAX_FRAMES, NUM_CODEBOOKS), np.int32), on
    for frame in range(MAX_FRAMES):
        before = codes[frame - 1, 0] if frame else -1
        codes[frame, 0] = (before + frame + start + frame) % VOCAB
        for codebook in range(1, NUM_CODEBOOKS):
            codes[frame, codebook] = (codes[frame, :codebook].sum() + codebook + total) % VOCAB
            total += 1
    return codes


def function(call, state=()) -> LogitsFunction:
    return LogitsFunction(call, jax.tree.map(jnp.asarray, state))


def utterance(sampling: Sampling = FREE, **functions) -> Utterance:
    return Utterance(PROMPTS[0], sampling, 5, MAX_FRAMES, **functions)


PENALIZE = function(penalize, np.zeros(VOCAB, bool))
UTTERANCES = {
    "penalty": utterance(logits=PENALIZE),
    "built-in penalty": utterance(Sampling(top_k=VOCAB, repetition_penalty=PENALTY)),
    "ban": utterance(logits=function(ban), depth_logits=function(ban)),
    "count": utterance(
        logits=function(count, {"n": np.int32(3)}), depth_logits=function(count_on, np.int32(1))
    ),
    "count from another number": utterance(
        logits=function(count, {"n": np.int32(7)}), depth_logits=function(count_on, np.int32(0))
    ),
    "plain": utterance(),
}


@pytest.fixture(scope="module")
def batch() -> DecodeBatch:
    return DecodeBatch(CONFIG, random_weights(), len(UTTERANCES), 64)


@pytest.fixture(scope="module")
def generated(batch) -> dict[str, np.ndarray]:
    for index, each in enumerate(UTTERANCES.values()):
        batch.join(index, each)
    # In two runs, between which the states are kept.
    codes = np.concatenate([batch.run(5).codes, batch.run(NUM_FRAMES - 5).codes], axis=1)
    return dict(zip(UTTERANCES, codes, strict=True))


def test_a_penalty_with_a_state_equals_the_built_in_one(generated):
    np.testing.assert_array_equal(generated["penalty"], generated["built-in penalty"])
    assert (generated["penalty"] != generated["plain"]).any()


def test_codes_that_are_banned_are_not_drawn(generated):
    assert not np.isin(generated["ban"], BANNED).any()
    assert np.isin(generated["plain"], BANNED).any()


def test_a_function_is_told_frame_codebook_and_codes_and_keeps_its_state(generated):
    """Each row has the state that it began with."""
    np.testing.assert_array_equal(generated["count"], counted(3, 1)[:NUM_FRAMES])
    other = generated["count from another number"]
    np.testing.assert_array_equal(other, counted(7, 0)[:NUM_FRAMES])


def test_the_state_of_a_row_begins_anew_and_another_goes_on(batch, generated):
    batch.leave(3)
    batch.join(3, UTTERANCES["count"])
    codes = batch.run(4).codes
    np.testing.assert_array_equal(codes[3], counted(3, 1)[:4])
    np.testing.assert_array_equal(codes[4], counted(7, 0)[NUM_FRAMES:])


def fails(logits, state, step):
    raise ValueError("no such code")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (ban, "is no LogitsFunction of a function"),
        (LogitsFunction(3), "is no LogitsFunction of a function"),  # type: ignore[arg-type]
        (LogitsFunction(fails), "the function of logits failed: no such code"),
        (LogitsFunction(lambda logits, state, step: logits), "returns float32"),
        (LogitsFunction(lambda logits, state, step: (logits[1:], state)), "expected .*float32"),
        (LogitsFunction(lambda logits, n, step: (logits, n + 1.5), np.int32(1)), "failed|returns"),
    ],
    ids=range(6),
)
def test_functions_that_do_not_fit_are_refused(model, given, message):
    with pytest.raises(InputError, match=message):
        RequestState(model, Request("so", interventions=Interventions(depth_logits=given)))


def test_the_guard_is_off_only_with_a_state(model):
    for state, is_guarded in (((), True), (np.int32(1), False)):
        keep = LogitsFunction(lambda logits, state, step: (logits, state), state)
        request = Request("so", guard="off", interventions=Interventions(logits=keep))
        assert RequestState(model, request)._can_resample() == is_guarded
