import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import generate, up_to_the_end
from scipy import stats

from csm_jax import config
from csm_jax.cache import KVCache
from csm_jax.decode_batch import DecodeBatch, Rewind, Utterance
from csm_jax.decode_step import (
    CHUNK_FRAMES,
    GenerationState,
    Row,
    init_state,
    prefill,
    run_frames,
    set_row,
)
from csm_jax.generator import Generator
from csm_jax.model import bind
from csm_jax.precision import Precision
from csm_jax.random_weights import random_params
from csm_jax.sampling import Sampling, SamplingParams
from csm_jax.tokenizer import byte_tokenizer

CONFIG = config.tiny()
VOCAB, NUM_CODEBOOKS = CONFIG.audio_vocab_size, CONFIG.num_codebooks
GREEDY = Sampling(greedy=True)


def make_prompt(length: int, seed: int = 0, tiny: config.CSMConfig = CONFIG):
    """Some text, some audio, and text."""
    rng = np.random.default_rng(seed)
    is_audio = (np.arange(length) > length // 3) & (np.arange(length) < length - 2)
    columns = np.arange(tiny.num_codebooks + 1) < tiny.num_codebooks
    mask = is_audio[:, None] == columns[None, :]
    frames = rng.integers(0, tiny.audio_vocab_size, size=mask.shape, dtype=np.int32)
    return np.where(mask, frames, 0).astype(np.int32), mask


PROMPTS = [make_prompt(length, seed=length) for length in (5, 18, 31)]


@functools.cache
def random_weights():
    return random_params(CONFIG)["csm"]


def start(params, prompts, state: GenerationState | None = None) -> GenerationState:
    """The state after the prompts, made by the compiled functions themselves."""
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
    return run_frames(params, state, values, count, never, config=CONFIG, kv_length=kv_length)


def likeliest(params, prompt, codes: np.ndarray) -> np.ndarray:
    """Greedy codes [n, Q] by one pass over prompt and codes, every choice given all before it."""
    frames, mask = prompt
    size = len(frames) + len(codes)
    rows, kept = np.zeros((2, 96, NUM_CODEBOOKS + 1), np.int32)
    rows[: len(frames)], rows[len(frames) : size, :-1] = frames, codes
    kept[: len(frames)], kept[len(frames) : size, :-1] = mask, 1
    predicted = np.asarray(_one_pass(params, rows, kept.astype(bool)))
    return predicted[len(frames) - 1 : size - 1]


@jax.jit
def _one_pass(params, rows, mask):
    """Codes [T, Q] of the frame after each row, codebooks 1 and up given those in the next row."""
    model = bind(CONFIG, params)
    cache = KVCache.create(CONFIG.backbone, 1, len(rows), jnp.float32, num_lengths=1)
    hidden, _ = model.backbone(model.embed(rows[None], mask[None]), cache)
    first = jnp.argmax(model.backbone_logits(hidden[0]), axis=-1)
    following = jnp.roll(rows[:, :-1], -1, axis=0)
    rest = jnp.argmax(model.depth_logits(hidden[0], following), axis=-1)
    return jnp.concatenate([first[:, None], rest], axis=1)


# --- Against one pass over the whole sequence ---------------------------------------------------


def test_greedy_codes_are_the_argmax_of_a_teacher_forced_pass():
    """The whole loop at once: prefill, cache, feeding, and a depth decoder that starts empty."""
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


def test_up_to_the_last_position():
    """8 and 25 need 33 positions, one more than the smallest cache has; 60 is no power of two."""
    limit = 60
    backbone = dataclasses.replace(CONFIG.backbone, max_seq_len=limit)
    short = dataclasses.replace(CONFIG, backbone=backbone)
    for length, max_frames in ((8, 25), (34, 26), (58, 2), (59, 1)):
        prompt = make_prompt(length, seed=3)
        (codes,) = generate(short, random_weights(), [prompt], [GREEDY], [0], max_frames)
        assert len(codes) == max_frames
        np.testing.assert_array_equal(likeliest(random_weights(), prompt, codes), codes)


# --- Rows and seeds -----------------------------------------------------------------------------

SAMPLED = [Sampling(), Sampling(temperature=1.3, top_p=0.9), Sampling(top_k=5, min_p=0.05)]


@pytest.mark.parametrize("sampling", [[GREEDY] * 3, SAMPLED], ids=["greedy", "sampled"])
def test_rows_of_a_ragged_batch_equal_the_same_rows_alone(sampling):
    seeds = [11, 5, 11]
    together = generate(CONFIG, random_weights(), PROMPTS, sampling, seeds, max_frames=30)
    for row, arguments in zip(together, zip(PROMPTS, sampling, seeds, strict=True), strict=True):
        prompt, values, seed = arguments
        (alone,) = generate(CONFIG, random_weights(), [prompt], [values], [seed], max_frames=30)
        np.testing.assert_array_equal(row, alone)


def test_a_row_does_not_depend_on_its_neighbours():
    rows = generate(CONFIG, random_weights(), PROMPTS, SAMPLED, [1, 2, 3], max_frames=30)
    others = [SAMPLED[0], GREEDY, Sampling(top_p=0.1, repetition_penalty=3.0)]
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[1]]
    changed = generate(CONFIG, random_weights(), prompts, others, [1, 8, 9], max_frames=30)
    np.testing.assert_array_equal(rows[0], changed[0])
    assert not np.array_equal(rows[1], changed[1])


def test_the_seed_decides():
    prompts, sampling = [PROMPTS[0]] * 3, [Sampling(top_k=VOCAB)] * 3
    seeds = [4, 4, 4 + 2**31]
    same, again, other = generate(CONFIG, random_weights(), prompts, sampling, seeds, max_frames=25)
    np.testing.assert_array_equal(same, again)
    assert (same != other).mean() > 0.5
    repeated = generate(CONFIG, random_weights(), prompts, sampling, seeds, max_frames=25)
    np.testing.assert_array_equal(repeated, [same, again, other])


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_any_whole_number_is_a_seed(seed):
    first, second = (
        generate(CONFIG, random_weights(), PROMPTS[:1], [Sampling()], [seed], max_frames=2)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_frames_draw_from_different_keys():
    """With heads that know nothing, pairs of frames and pairs of rows are uniform."""
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


def blank_heads(params):
    heads = "codebook0_head", "depth_heads"
    return params | {name: jax.tree.map(jnp.zeros_like, params[name]) for name in heads}


# --- The end of speech --------------------------------------------------------------------------
#
# The weights of a model that counts down: attention and MLP add nothing, an id is a unit vector,
# and so is its successor in the head. After text n it says frames of n - 1, n - 2, ... and, at 0,
# the end.


def countdown(first=None, depth=()):
    """Weights of the counting model.

    Args:
      first: {id: id that codebook 0 has in the next frame}, where it is not one less.
      depth: {(codebook, id before): id}, where a codebook does not repeat the one before it.
    """
    params = jax.tree.map(jnp.zeros_like, random_weights())
    for stack in ("backbone", "depth_decoder"):
        norm = {"scale": jnp.ones_like(params[stack]["norm"]["scale"])}
        params[stack] = params[stack] | {"norm": norm}
    embed_dim, depth_dim = CONFIG.backbone.embed_dim, CONFIG.depth_decoder.embed_dim
    codes = np.eye(VOCAB, embed_dim, dtype=np.float32)
    params["audio_embedding"] = jnp.asarray(np.tile(codes, (NUM_CODEBOOKS, 1)))
    params["text_embedding"] = params["text_embedding"].at[:VOCAB].set(codes)
    params["projection"] = {"weight": jnp.eye(depth_dim, embed_dim)}
    successors = {code: code - 1 for code in range(1, VOCAB)} | {0: 0} | (first or {})
    head = np.zeros((VOCAB, embed_dim), np.float32)
    head[list(successors.values()), list(successors.keys())] = 1.0
    params["codebook0_head"] = {"weight": jnp.asarray(head)}
    heads = np.tile(np.eye(VOCAB, depth_dim, dtype=np.float32), (NUM_CODEBOOKS - 1, 1, 1))
    for (codebook, before), code in dict(depth).items():
        heads[codebook - 1, :, before] = 0.0
        heads[codebook - 1, code, before] = 1.0
    params["depth_heads"] = {"weight": jnp.asarray(heads)}
    return params


def say(count: int):
    """A prompt after which the counting model says `count - 1` first."""
    frames, mask = np.zeros((2, 3, NUM_CODEBOOKS + 1), np.int32)
    frames[:, -1] = [20, 30, count]
    mask[:, -1] = 1
    return frames, mask.astype(bool)


def counted(count: int) -> np.ndarray:
    return np.repeat(np.arange(count - 1, 0, -1), NUM_CODEBOOKS).reshape(-1, NUM_CODEBOOKS)


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 7, 34), (34, 2, 1), (26, 27, 28), (3, 3, 5)])
def test_every_row_ends_at_its_own_frame_of_zeros(counts):
    """At once (1), and around the end of a chunk of 25 frames."""
    rows = generate(
        CONFIG, countdown(), [say(n) for n in counts], [GREEDY] * 3, [0] * 3, max_frames=60
    )
    for row, count in zip(rows, counts, strict=True):
        assert row.shape == (count - 1, NUM_CODEBOOKS)
        np.testing.assert_array_equal(row, counted(count))


@pytest.mark.parametrize(
    ("count", "progress"), [(14, [5, 10, 14]), (5, [5]), (1, [1]), (6, [5, 6])]
)
def test_the_loop_stops_when_all_rows_have_ended(count, progress):
    """The frame of zeros counts too: it took its time."""
    frames_run = []
    prompts = [say(n) for n in (1, count, 1)]
    generate(CONFIG, countdown(), prompts, [GREEDY] * 3, [0] * 3, 60, 5, frames_run.append)
    assert frames_run == progress


@pytest.mark.parametrize("chunk", [5, CHUNK_FRAMES, 1000])
@pytest.mark.parametrize("max_frames", [1, 5, 7, 25, 26, 60])
def test_max_frames(max_frames, chunk):
    """However many frames are asked for at a time; a run makes no more than `CHUNK_FRAMES`."""
    frames_run = []
    forever = countdown(first={1: 34})
    watch = frames_run.append
    (codes,) = generate(CONFIG, forever, [say(34)], [GREEDY], [0], max_frames, chunk, watch)
    expected = [33 - t if t < 33 else 34 - (t - 33) for t in range(max_frames)]
    np.testing.assert_array_equal(codes, np.repeat(expected, NUM_CODEBOOKS).reshape(codes.shape))
    step = min(chunk, CHUNK_FRAMES)
    assert frames_run == [*range(step, max_frames, step), max_frames]


@pytest.mark.parametrize("max_frames", [3, 4, 5])
def test_an_end_at_the_last_frame_allowed(max_frames):
    (codes,) = generate(CONFIG, countdown(), [say(5)], [GREEDY], [0], max_frames)
    np.testing.assert_array_equal(codes, counted(5)[:max_frames])


ALMOST_ENDS = {
    "codebook 0 alone": ({}, {(1, 0): 9}, [0] + [9] * (NUM_CODEBOOKS - 1)),
    "codebook 3 alone": ({1: 2}, {(3, 2): 0, (4, 0): 2}, [2, 2, 2, 0, 2, 2, 2]),
    "all but codebook 0": ({0: 2}, {(1, 2): 0}, [2] + [0] * (NUM_CODEBOOKS - 1)),
    "all but the last": ({}, {(NUM_CODEBOOKS - 1, 0): 9}, [0] * (NUM_CODEBOOKS - 1) + [9]),
}


@pytest.mark.parametrize(("first", "depth", "frame"), ALMOST_ENDS.values(), ids=ALMOST_ENDS.keys())
def test_some_zeros_are_not_the_end(first, depth, frame):
    (codes,) = generate(CONFIG, countdown(first, depth), [say(3)], [GREEDY], [0], max_frames=10)
    assert len(codes) == 10
    assert frame in codes.tolist()


def test_ended_rows_stand_still():
    """They keep returning zeros, and the others go on: the codes of the compiled loop itself, in
    a model that would speak on after its end."""
    params = countdown(first={0: 34})
    state = start(params, [say(n) for n in (3, 20, 1)])
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


def test_sampled_rows_end_too():
    """At a temperature that leaves no doubt."""
    sampling = [Sampling(temperature=0.1)] * 3
    rows = generate(
        CONFIG, countdown(), [say(n) for n in (4, 1, 9)], sampling, [1, 2, 3], max_frames=60
    )
    for row, count in zip(rows, (4, 1, 9), strict=True):
        np.testing.assert_array_equal(row, counted(count))


def test_an_end_at_once_is_empty_audio():
    params = random_params(CONFIG)
    params["csm"] = blank_heads(params["csm"])
    model = Generator(CONFIG, params, byte_tokenizer(CONFIG))
    notices = []
    said = dict(sampling=GREEDY, max_audio_length_ms=2400, notify=notices.append)
    codes, audio = model.generate_codes("hello", **said), model.generate("hello", **said)
    assert list(model.stream("hello", **said)) == []
    assert [notice.kind for notice in notices] == ["nothing_said"] * 3
    assert codes.shape == (0, NUM_CODEBOOKS)
    assert audio.shape == (0,)
    assert audio.dtype == np.float32


# --- Rows that come and go ----------------------------------------------------------------------

KINDS = {"greedy": [GREEDY] * 3, "sampled": SAMPLED}
kinds = pytest.mark.parametrize("sampling", KINDS.values(), ids=KINDS.keys())


# Few shapes are compiled: 33 to 64 positions, in batches of 3.
NUM_FRAMES = 28


@functools.cache
def alone(length: int, sampling: Sampling, seed: int, max_frames: int = NUM_FRAMES) -> np.ndarray:
    prompt = make_prompt(length, seed=length)
    (codes,) = generate(CONFIG, random_weights(), [prompt], [sampling], [seed], max_frames)
    assert len(codes) == max_frames
    return codes


def new_batch(params=None, max_seq_len: int = 64) -> DecodeBatch:
    return DecodeBatch(CONFIG, params or random_weights(), 3, max_seq_len)


def run_on(batch: DecodeBatch, num_frames: int) -> np.ndarray:
    """Codes [B, num_frames, Q], however many runs it takes."""
    codes = np.zeros((batch.size, 0, NUM_CODEBOOKS), np.int32)
    while codes.shape[1] < num_frames:
        codes = np.concatenate([codes, batch.run(num_frames - codes.shape[1])[0]], axis=1)
    return codes


@kinds
@pytest.mark.parametrize("schedule", range(4))
def test_rows_come_and_go_without_a_trace(sampling, schedule):
    """Every row says what it says alone, whoever joins, leaves or goes back beside it, wherever
    and whenever, and whoever was in its place before: random schedules."""
    rng = np.random.default_rng(schedule)
    batch = new_batch()
    waiting = [(length, sampling[i % 3], i) for i, length in enumerate((5, 31, 18, 36, 7, 33, 12))]
    speaking: dict[int, tuple] = {}
    spoken: dict[tuple, np.ndarray] = {}
    while waiting or speaking:
        for index in sorted({0, 1, 2} - speaking.keys()):
            if waiting and rng.random() < 0.6:
                length, values, seed = speaking[index] = waiting.pop()
                spoken[speaking[index]] = np.zeros((0, NUM_CODEBOOKS), np.int32)
                prompt = make_prompt(length, seed=length)
                batch.join(index, Utterance(prompt, values, seed, NUM_FRAMES))
        codes, _ = batch.run(int(rng.integers(1, 9)))
        for index, who in list(speaking.items()):
            spoken[who] = np.concatenate([spoken[who], codes[index]])
            if rng.random() < 0.2:
                spoken[who] = spoken[who][: rng.integers(0, len(spoken[who]) + 1)]
                batch.rewind(index, Rewind(spoken[who], seed=who[2]))
            if len(spoken[who]) == NUM_FRAMES or rng.random() < 0.05:
                batch.leave(index)
                del speaking[index]
    assert max(map(len, spoken.values())) == NUM_FRAMES
    for who, codes in spoken.items():
        np.testing.assert_array_equal(codes, alone(*who)[: len(codes)])


@kinds
@pytest.mark.parametrize("num_kept", [0, 1, 9, 20])
def test_going_back_with_the_same_seed_says_the_same_again(sampling, num_kept):
    """Beside a neighbour that does not notice."""
    batch = new_batch()
    for index in range(2):
        batch.join(index, Utterance(PROMPTS[index], sampling[index], index, 33))
    codes = run_on(batch, 20)
    neighbour = [codes[1]]
    for _ in range(2):
        batch.rewind(0, Rewind(codes[0, :num_kept], seed=0))
        if num_kept == 20:
            break
        again = run_on(batch, min(6, 20 - num_kept))
        np.testing.assert_array_equal(again[0], codes[0, num_kept:][: again.shape[1]])
        neighbour.append(again[1])
    expected = generate(CONFIG, random_weights(), PROMPTS[1:2], sampling[1:2], [1], 33)[0]
    neighbour = np.concatenate(neighbour)
    np.testing.assert_array_equal(neighbour, expected[: len(neighbour)])


def test_going_back_with_another_seed_says_something_else():
    """After the frames that are kept: with greedy sampling, which no seed changes, the rest is the
    same; so the first frames are all there."""
    for values, is_same in ((GREEDY, True), (Sampling(top_k=VOCAB), False)):
        batch = new_batch()
        batch.join(0, Utterance(PROMPTS[1], values, 0, 28))
        codes = run_on(batch, 20)[0]
        batch.rewind(0, Rewind(codes[:8], seed=1))
        other = run_on(batch, 12)[0]
        assert np.array_equal(other, codes[8:]) == is_same
        batch.rewind(0, Rewind(np.concatenate([codes[:8], other[:3]]), seed=1))
        np.testing.assert_array_equal(run_on(batch, 9)[0], other[3:])


def test_what_was_taken_back_is_not_penalised():
    sampling = Sampling(greedy=True, repetition_penalty=1e6)
    batch = new_batch()
    batch.join(0, Utterance(PROMPTS[1], sampling, 0, 28))
    codes = run_on(batch, 20)[0]
    assert len(set(codes[:, 0])) > 12
    for num_kept in (0, 7):
        batch.rewind(0, Rewind(codes[:num_kept], seed=0))
        np.testing.assert_array_equal(run_on(batch, 20 - num_kept)[0], codes[num_kept:])


def test_going_back_from_the_end():
    batch = new_batch(countdown())
    batch.join(1, Utterance(say(6), GREEDY, 0, 40))
    codes, ended = batch.run(20)
    np.testing.assert_array_equal(up_to_the_end(codes[1]), counted(6))
    assert ended.all()
    assert batch.run(20)[0].shape == (3, 0, NUM_CODEBOOKS)
    batch.rewind(1, Rewind(codes[1, :2], seed=1))
    again, ended = batch.run(20)
    np.testing.assert_array_equal(again, codes[:, 2:])
    assert ended.all()


@pytest.mark.parametrize("lengths", [(5, 31), (31, 5), (31, 31), (20, 36)], ids=str)
def test_the_occupant_before_leaves_no_trace(lengths):
    batch = new_batch()
    for length in lengths:
        prompt = make_prompt(length, seed=length)
        batch.join(1, Utterance(prompt, SAMPLED[0], 3, NUM_FRAMES))
        codes = run_on(batch, NUM_FRAMES)[1]
        batch.leave(1)
    np.testing.assert_array_equal(codes, alone(lengths[1], SAMPLED[0], 3))


def test_what_lies_in_the_cache_has_no_effect():
    dirty = jax.tree.map(lambda leaf: leaf + 1e3 if leaf.ndim == 4 else leaf, empty_state(3).cache)
    codes = []
    for state in (empty_state(3), empty_state(3)._replace(cache=dirty)):
        state = start(random_weights(), PROMPTS, state)
        codes.append(run_state(random_weights(), state, SAMPLED, 20)[1])
    np.testing.assert_array_equal(*codes)


def test_attending_to_what_there_is_says_the_same_as_attending_to_all():
    """The longest row comes to 51 of 64 positions."""
    codes = []
    for kv_length in (51, 64):
        state = start(random_weights(), PROMPTS)
        codes.append(run_state(random_weights(), state, SAMPLED, 20, kv_length)[1])
    np.testing.assert_array_equal(*codes)


def test_the_length_of_a_batch_has_no_effect():
    batch = new_batch(max_seq_len=512)
    batch.join(1, Utterance(PROMPTS[1], SAMPLED[1], 5, NUM_FRAMES))
    np.testing.assert_array_equal(run_on(batch, NUM_FRAMES)[1], alone(18, SAMPLED[1], 5))


def test_a_run_pauses_when_a_row_ends():
    """Anew: rows that had ended before, or that nobody is in, are no reason."""
    batch = new_batch(countdown())
    batch.join(0, Utterance(say(3), GREEDY, 0, 30))
    batch.join(2, Utterance(say(9), GREEDY, 0, 30))
    runs = [batch.run(25, pause=True) for _ in range(3)]
    assert [codes.shape[1] for codes, _ in runs] == [3, 6, 0]
    assert [ended.tolist() for _, ended in runs] == [[True, True, False], [True] * 3, [True] * 3]
    codes = np.concatenate([codes for codes, _ in runs], axis=1)
    for row, count in zip(codes, (3, 1, 9), strict=True):
        np.testing.assert_array_equal(up_to_the_end(row), counted(count))


def test_a_run_stops_at_the_limit_of_a_row():
    batch = new_batch()
    batch.join(0, Utterance(PROMPTS[0], GREEDY, 0, NUM_FRAMES))
    batch.join(1, Utterance(PROMPTS[1], GREEDY, 0, 4))
    first = batch.run(25)[0]
    assert first.shape[1] == 4
    assert batch.run(25)[0].shape[1] == 0
    batch.leave(1)
    codes = np.concatenate([first[0], run_on(batch, NUM_FRAMES - 4)[0]])
    np.testing.assert_array_equal(codes, alone(5, GREEDY, 0))
    assert batch.run(25)[0].shape[1] == 0
    batch.rewind(0, Rewind(codes[:22], seed=0))
    assert batch.run(25)[0].shape[1] == NUM_FRAMES - 22


def test_a_row_that_is_too_long_is_refused():
    batch = new_batch(max_seq_len=40)
    with pytest.raises(ValueError, match=r"31 \+ 10 positions in 40"):
        batch.join(0, Utterance(PROMPTS[2], GREEDY, 0, 10))
    batch.join(0, Utterance(PROMPTS[2], GREEDY, 0, 9))


# --- Repetition penalty -------------------------------------------------------------------------


def test_a_huge_penalty_says_every_id_once():
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
    assert min(depth_ids) < VOCAB  # the penalty is for codebook 0 alone


# --- Compilation and types ----------------------------------------------------------------------


def test_few_shapes_are_compiled():
    functions = init_state, prefill, set_row, run_frames
    compiled = [function._cache_size() for function in functions]
    values = [Sampling(), GREEDY, Sampling(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1)]
    values += [Sampling(repetition_penalty=1.3, depth_temperature=0.5, depth_top_k=2)]
    for length in (5, 12, 16, 23, 31):
        value = values[length % len(values)]
        prompts = [make_prompt(length)] * 2  # no other test has two rows
        generate(CONFIG, random_weights(), prompts, [value] * 2, [length] * 2, 33 - length % 2)
    assert [
        function._cache_size() - before
        for function, before in zip(functions, compiled, strict=True)
    ] == [1] * 4


@pytest.mark.parametrize("weights", ["bfloat16", "float16"])
@pytest.mark.parametrize("activations", ["float32", "weights"])
def test_narrow_types(weights, activations):
    """Activations are float32 on a CPU and of the weights' type elsewhere; here both are tried."""
    activations = weights if activations == "weights" else activations
    precision = Precision(jnp.dtype(weights), jnp.dtype(activations))
    params = random_params(CONFIG, precision)["csm"]
    batch = DecodeBatch(CONFIG, params, 1, 64)
    assert batch._state.cache.layers[0].key.dtype == activations
    (codes,) = generate(CONFIG, params, PROMPTS[:1], [Sampling()], [0], max_frames=3)
    assert codes.shape == (3, NUM_CODEBOOKS)
    assert codes.min() >= 0
    assert codes.max() < VOCAB


def test_two_codebooks_are_the_fewest():
    two = dataclasses.replace(CONFIG, num_codebooks=2)
    params = random_params(two)["csm"]
    prompt = make_prompt(6, tiny=two)
    (codes,) = generate(two, params, [prompt], [Sampling()], [0], max_frames=3)
    assert codes.shape == (3, 2)
