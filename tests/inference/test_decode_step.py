"""The decode step against one pass over the whole sequence, its seeds and its ends of speech."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from countdown import (
    CONFIG,
    GREEDY,
    NUM_CODEBOOKS,
    PROMPTS,
    SAMPLED,
    VOCAB,
    blank_heads,
    count_from,
    countdown,
    counted,
    make_prompt,
    random_weights,
)
from fixtures import generate
from scipy import stats

from csm_jax.checkpoints.random_weights import random_params
from csm_jax.inference.decode_batch import DecodeBatch
from csm_jax.inference.decode_step import (
    CHUNK_FRAMES,
    GenerationState,
    Row,
    init_state,
    prefill,
    run_frames,
    set_row,
)
from csm_jax.inference.generator import Generator
from csm_jax.model.csm import bind
from csm_jax.model.kv_cache import KVCache
from csm_jax.model.precision import FLOAT32, Precision
from csm_jax.model.sampling import Sampling, SamplingParams
from csm_jax.prompt.tokenizer import byte_tokenizer


def start(params, prompts, state: GenerationState | None = None) -> GenerationState:
    """The state after prefill of the prompts, by the compiled functions."""
    if state is None:
        state = empty_state(len(prompts))
    for index, (frames, mask) in enumerate(prompts):
        state = prefill(params, state, frames, mask, np.int32(index), config=CONFIG)
        row = Row(
            length=np.int32(len(frames) - 1),
            frame=frames[-1],
            mask=mask[-1],
            seed=np.uint32(index),
            num_frames=np.int32(0),
            seen=np.zeros(VOCAB, bool),
            done=np.bool_(False),
        )
        state = set_row(state, np.int32(index), row)
    return state


def empty_state(batch: int) -> GenerationState:
    dtype = jnp.dtype(jnp.float32)
    return init_state(config=CONFIG, batch=batch, max_seq_len=64, dtype=dtype)


def run_state(params, state, sampling, num_frames: int, kv_length: int = 64):
    values, count, never = SamplingParams.stack(sampling), np.int32(num_frames), np.bool_(False)
    state, frames, count = run_frames(
        params, state, values, count, never, config=CONFIG, kv_length=kv_length
    )
    return state, frames.codes, count


def likeliest(params, prompt, codes: np.ndarray) -> np.ndarray:
    """Greedy codes [n, Q] by one teacher-forced pass over prompt and codes."""
    frames, mask = prompt
    size = len(frames) + len(codes)
    rows, kept = np.zeros((2, 96, NUM_CODEBOOKS + 1), np.int32)
    rows[: len(frames)], rows[len(frames) : size, :-1] = frames, codes
    kept[: len(frames)], kept[len(frames) : size, :-1] = mask, 1
    predicted = np.asarray(_one_pass(params, rows, kept.astype(bool)))
    return predicted[len(frames) - 1 : size - 1]


@jax.jit
def _one_pass(params, rows, mask):
    """Codes [T, Q] of the frame after each row; codebooks 1 and up are given the next row."""
    model = bind(CONFIG, params)
    cache = KVCache.create(CONFIG.backbone, 1, len(rows), jnp.float32, num_lengths=1)
    hidden, _ = model.backbone(model.embed(rows[None], mask[None]), cache)
    first = jnp.argmax(model.backbone_logits(hidden[0]), axis=-1)
    following = jnp.roll(rows[:, :-1], -1, axis=0)
    rest = jnp.argmax(model.depth_logits(hidden[0], following), axis=-1)
    return jnp.concatenate([first[:, None], rest], axis=1)


# --- Against one pass over the whole sequence ---------------------------------------------------


def test_greedy_codes_are_the_argmax_of_a_teacher_forced_pass():
    """This tests the whole loop: prefill, cache, feeding back, and the depth decoder."""
    codes = generate(CONFIG, random_weights(), PROMPTS, [GREEDY] * 3, [0] * 3, max_frames=30)
    for prompt, row in zip(PROMPTS, codes, strict=True):
        assert row.shape == (30, NUM_CODEBOOKS)
        assert row.dtype == np.int32
        np.testing.assert_array_equal(likeliest(random_weights(), prompt, row), row)


def test_a_frame_depends_on_all_frames_before_it():
    params, prompt = random_weights(), PROMPTS[1]
    (codes,) = generate(CONFIG, random_weights(), [prompt], [GREEDY], [0], max_frames=30)
    for changed in (0, 10):
        other = codes.copy()
        other[changed] = (other[changed] + 1) % VOCAB
        got = likeliest(params, prompt, other)
        np.testing.assert_array_equal(got[:changed], codes[:changed])
        assert (got[changed + 1 :] != codes[changed + 1 :]).any(axis=1).mean() > 0.5


def test_rows_may_fill_the_cache_to_the_last_position():
    """8 and 25 need 33 positions, one more than the smallest cache; 60 is not a power of two."""
    limit = 60
    backbone = dataclasses.replace(CONFIG.backbone, max_seq_len=limit)
    short = dataclasses.replace(CONFIG, backbone=backbone)
    for length, max_frames in ((8, 25), (34, 26), (58, 2), (59, 1)):
        prompt = make_prompt(length, seed=3)
        (codes,) = generate(short, random_weights(), [prompt], [GREEDY], [0], max_frames)
        assert len(codes) == max_frames
        np.testing.assert_array_equal(likeliest(random_weights(), prompt, codes), codes)


# --- Rows and seeds -----------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [[GREEDY] * 3, SAMPLED], ids=["greedy", "sampled"])
def test_rows_of_a_ragged_batch_equal_the_same_rows_alone(sampling):
    seeds = [11, 5, 11]
    together = generate(CONFIG, random_weights(), PROMPTS, sampling, seeds, max_frames=30)
    for row, arguments in zip(together, zip(PROMPTS, sampling, seeds, strict=True), strict=True):
        prompt, values, seed = arguments
        (alone,) = generate(CONFIG, random_weights(), [prompt], [values], [seed], max_frames=30)
        np.testing.assert_array_equal(row, alone)


def test_a_row_does_not_depend_on_other_rows():
    rows = generate(CONFIG, random_weights(), PROMPTS, SAMPLED, [1, 2, 3], max_frames=30)
    others = [SAMPLED[0], GREEDY, Sampling(top_p=0.1, repetition_penalty=3.0)]
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[1]]
    changed = generate(CONFIG, random_weights(), prompts, others, [1, 8, 9], max_frames=30)
    np.testing.assert_array_equal(rows[0], changed[0])
    assert not np.array_equal(rows[1], changed[1])


def test_equal_seeds_give_equal_codes_and_others_do_not():
    prompts, sampling = [PROMPTS[0]] * 3, [Sampling(top_k=VOCAB)] * 3
    seeds = [4, 4, 4 + 2**31]
    same, again, other = generate(CONFIG, random_weights(), prompts, sampling, seeds, max_frames=25)
    np.testing.assert_array_equal(same, again)
    assert (same != other).mean() > 0.5
    repeated = generate(CONFIG, random_weights(), prompts, sampling, seeds, max_frames=25)
    np.testing.assert_array_equal(repeated, [same, again, other])


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_any_integer_is_a_seed(seed):
    first, second = (
        generate(CONFIG, random_weights(), PROMPTS[:1], [Sampling()], [seed], max_frames=2)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_frames_and_rows_use_different_random_keys():
    """With heads of zeros, pairs of frames and pairs of rows are uniform."""
    params = blank_heads(random_weights())
    sampling = [Sampling(temperature=1.0, top_k=VOCAB)] * 64
    codes = np.stack(
        generate(CONFIG, params, [PROMPTS[0]] * 64, sampling, range(64), max_frames=25)
    )
    classes = codes % 7  # 35 ids: five of each
    pairs = {
        "frames": (classes[:, 1:], classes[:, :-1]),
        "rows": (classes[1:], classes[:-1]),
        "next frame of the next row": (classes[1:, 1:], classes[:-1, :-1]),
    }
    for name, (left, right) in pairs.items():
        counts = np.bincount((left * 7 + right).ravel(), minlength=49)
        assert stats.chisquare(counts).pvalue > 1e-4, name


# --- The cache ----------------------------------------------------------------------------------


def test_leftovers_in_the_cache_have_no_effect():
    dirty = jax.tree.map(lambda leaf: leaf + 1e3 if leaf.ndim == 4 else leaf, empty_state(3).cache)
    codes = []
    for state in (empty_state(3), empty_state(3)._replace(cache=dirty)):
        state = start(random_weights(), PROMPTS, state)
        codes.append(run_state(random_weights(), state, SAMPLED, 20)[1])
    np.testing.assert_array_equal(*codes)


def test_reading_the_filled_part_of_the_cache_equals_reading_all():
    """The longest row reaches 51 of 64 positions."""
    codes = []
    for kv_length in (51, 64):
        state = start(random_weights(), PROMPTS)
        codes.append(run_state(random_weights(), state, SAMPLED, 20, kv_length)[1])
    np.testing.assert_array_equal(*codes)


# --- The end of speech --------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 7, 34), (34, 2, 1), (26, 27, 28), (3, 3, 5)])
def test_every_row_ends_at_its_own_frame_of_zeros(counts):
    """The ends are immediate (1), and around the end of a chunk of 25 frames."""
    rows = generate(
        CONFIG, countdown(), [count_from(n) for n in counts], [GREEDY] * 3, [0] * 3, max_frames=60
    )
    for row, count in zip(rows, counts, strict=True):
        assert row.shape == (count - 1, NUM_CODEBOOKS)
        np.testing.assert_array_equal(row, counted(count))


@pytest.mark.parametrize(
    ("count", "progress"), [(14, [5, 10, 14]), (5, [5]), (1, [1]), (6, [5, 6])]
)
def test_the_loop_stops_when_all_rows_have_ended(count, progress):
    """The frame of zeros counts too."""
    frames_run = []
    prompts = [count_from(n) for n in (1, count, 1)]
    generate(CONFIG, countdown(), prompts, [GREEDY] * 3, [0] * 3, 60, 5, frames_run.append)
    assert frames_run == progress


@pytest.mark.parametrize("chunk", [5, CHUNK_FRAMES, 1000])
@pytest.mark.parametrize("max_frames", [1, 5, 7, 25, 26, 60])
def test_no_more_than_max_frames_are_generated(max_frames, chunk):
    """This holds for any number of frames at a time; a run has at most `CHUNK_FRAMES`."""
    frames_run = []
    forever = countdown(first={1: 34})
    watch = frames_run.append
    (codes,) = generate(CONFIG, forever, [count_from(34)], [GREEDY], [0], max_frames, chunk, watch)
    expected = [33 - t if t < 33 else 34 - (t - 33) for t in range(max_frames)]
    np.testing.assert_array_equal(codes, np.repeat(expected, NUM_CODEBOOKS).reshape(codes.shape))
    step = min(chunk, CHUNK_FRAMES)
    assert frames_run == [*range(step, max_frames, step), max_frames]


@pytest.mark.parametrize("max_frames", [3, 4, 5])
def test_an_end_of_speech_at_the_last_frame_is_recognized(max_frames):
    (codes,) = generate(CONFIG, countdown(), [count_from(5)], [GREEDY], [0], max_frames)
    np.testing.assert_array_equal(codes, counted(5)[:max_frames])


ALMOST_ENDS = {
    "codebook 0 alone": ({}, {(1, 0): 9}, [0] + [9] * (NUM_CODEBOOKS - 1)),
    "codebook 3 alone": ({1: 2}, {(3, 2): 0, (4, 0): 2}, [2, 2, 2, 0, 2, 2, 2]),
    "all but codebook 0": ({0: 2}, {(1, 2): 0}, [2] + [0] * (NUM_CODEBOOKS - 1)),
    "all but the last": ({}, {(NUM_CODEBOOKS - 1, 0): 9}, [0] * (NUM_CODEBOOKS - 1) + [9]),
}


@pytest.mark.parametrize(("first", "depth", "frame"), ALMOST_ENDS.values(), ids=ALMOST_ENDS.keys())
def test_a_frame_with_some_zeros_is_not_the_end_of_speech(first, depth, frame):
    (codes,) = generate(
        CONFIG, countdown(first, depth), [count_from(3)], [GREEDY], [0], max_frames=10
    )
    assert len(codes) == 10
    assert frame in codes.tolist()


def test_ended_rows_do_not_advance():
    """They keep returning zeros, and the others go on: the codes of the compiled loop itself, in
    a model that would go on after its end."""
    params = countdown(first={0: 34})
    state = start(params, [count_from(n) for n in (3, 20, 1)])
    state, codes, count = run_state(params, state, [GREEDY] * 3, 10)
    assert count == 10
    assert codes.shape == (3, CHUNK_FRAMES, NUM_CODEBOOKS)
    expected = [[2, 1] + [0] * 8, list(range(19, 9, -1)), [0] * 10]
    np.testing.assert_array_equal(codes[:, :10, 0], expected)
    np.testing.assert_array_equal(state.done, [True, False, True])
    np.testing.assert_array_equal(state.num_frames, [3, 10, 1])
    # 3 positions of prompt, of which the last is fed with the first frame.
    np.testing.assert_array_equal(state.cache.lengths, [2 + 3, 2 + 10, 2 + 1])
    assert [np.flatnonzero(row).tolist() for row in state.seen] == [
        [0, 1, 2],
        list(range(10, 20)),
        [0],
    ]
    state, codes, count = run_state(params, state, [GREEDY] * 3, 3)
    assert not np.asarray(codes)[[0, 2]].any()
    np.testing.assert_array_equal(state.num_frames, [3, 13, 1])
    np.testing.assert_array_equal(state.cache.lengths, [2 + 3, 2 + 13, 2 + 1])


def test_rows_end_with_sampling_too():
    """The temperature is so low that the result is certain."""
    sampling = [Sampling(temperature=0.1)] * 3
    rows = generate(
        CONFIG, countdown(), [count_from(n) for n in (4, 1, 9)], sampling, [1, 2, 3], max_frames=60
    )
    for row, count in zip(rows, (4, 1, 9), strict=True):
        np.testing.assert_array_equal(row, counted(count))


def test_an_immediate_end_of_speech_is_empty_audio():
    params = random_params(CONFIG)
    params["csm"] = blank_heads(params["csm"])
    model = Generator.from_params(CONFIG, params, byte_tokenizer(CONFIG), FLOAT32)
    notices = []
    options = dict(sampling=GREEDY, max_audio_length_ms=2400, notify=notices.append)
    codes, audio = model.generate_codes("hello", **options), model.generate("hello", **options)
    assert list(model.stream("hello", **options)) == []
    assert [notice.kind for notice in notices] == ["nothing_said"] * 3
    assert codes.shape == (0, NUM_CODEBOOKS)
    assert audio.shape == (0,)
    assert audio.dtype == np.float32


# --- Repetition penalty, shapes and types -------------------------------------------------------


def test_with_a_huge_penalty_every_id_comes_once():
    """All logits are negative here, so that the penalty makes any used id the least likely."""
    params = dict(random_weights())
    head = np.abs(params["codebook0_head"]["weight"])
    params["codebook0_head"] = {"weight": jnp.asarray(-head)}
    # All embeddings and outputs positive: then so are the states, and their products negative.
    for table in ("text_embedding", "audio_embedding"):
        params[table] = 100 * jnp.abs(params[table])
    values = [Sampling(greedy=True, repetition_penalty=1e6), GREEDY, Sampling()]
    rows = generate(CONFIG, params, [PROMPTS[0]] * 3, values, [0] * 3, max_frames=VOCAB)
    assert sorted(rows[0][:, 0]) == list(range(VOCAB))
    assert len(set(rows[1][:, 0])) < VOCAB / 2
    depth_ids = [len(set(rows[0][:, codebook])) for codebook in range(1, NUM_CODEBOOKS)]
    assert min(depth_ids) < VOCAB  # the penalty applies to codebook 0 only


def test_few_shapes_are_compiled():
    functions = init_state, prefill, set_row, run_frames
    compiled = [function._cache_size() for function in functions]
    values = [Sampling(), GREEDY, Sampling(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1)]
    values += [Sampling(repetition_penalty=1.3, depth_temperature=0.5, depth_top_k=2)]
    for length in (5, 12, 16, 23, 31):
        value = values[length % len(values)]
        prompts = [make_prompt(length)] * 7  # no other test has a batch of seven rows
        generate(CONFIG, random_weights(), prompts, [value] * 7, [length] * 7, 33 - length % 2)
    assert [
        function._cache_size() - before
        for function, before in zip(functions, compiled, strict=True)
    ] == [1] * 4


@pytest.mark.parametrize("weights", ["bfloat16", "float16"])
@pytest.mark.parametrize("activations", ["float32", "weights"])
def test_codes_are_generated_in_narrow_types(weights, activations):
    """Activations are float32 on a CPU and of the weights' type elsewhere; both are tested."""
    activations = weights if activations == "weights" else activations
    precision = Precision(jnp.dtype(weights), jnp.dtype(activations))
    params = random_params(CONFIG, precision)["csm"]
    batch = DecodeBatch(CONFIG, params, 1, 64)
    assert batch._state.cache.layers[0].key.dtype == activations
    (codes,) = generate(CONFIG, params, PROMPTS[:1], [Sampling()], [0], max_frames=3)
    assert codes.shape == (3, NUM_CODEBOOKS)
    assert codes.min() >= 0
    assert codes.max() < VOCAB


def test_two_codebooks_are_enough():
    two = dataclasses.replace(CONFIG, num_codebooks=2)
    params = random_params(two)["csm"]
    prompt = make_prompt(6, tiny=two)
    (codes,) = generate(two, params, [prompt], [Sampling()], [0], max_frames=3)
    assert codes.shape == (3, 2)
