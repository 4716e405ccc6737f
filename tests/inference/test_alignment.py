"""Attention to the text, from batches: what a teacher-forced pass of the same frames attends to."""

import dataclasses

import jax
import numpy as np
import pytest
from countdown import CONFIG, NUM_CODEBOOKS, random_weights
from fixtures import up_to_the_end

import csm_jax
from csm_jax.checkpoints.alignment_heads import AlignmentHeads
from csm_jax.inference.decode_batch import DecodeBatch, Rewind, Utterance
from csm_jax.model.csm import bind
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.tokenizer import byte_tokenizer
from csm_jax.prompt.turns import Prompt, Segment, join_rows, text_rows, turn_rows

HEADS = ((0, 1), (CONFIG.backbone.num_layers - 1, CONFIG.backbone.num_heads - 1))
TOKENIZER = byte_tokenizer(CONFIG)
NUM_FRAMES = 9
TEXTS = ["a", "twelve", "no more"]


def prompt_of(text: str, context_frames: int) -> tuple[Prompt, int]:
    """A prompt with a turn of context, and how many of its rows are the text."""
    codes = np.arange(context_frames * NUM_CODEBOOKS).reshape(-1, NUM_CODEBOOKS) % 30
    before = turn_rows(Segment(1, "so", codes=codes), CONFIG, TOKENIZER)
    rows = text_rows(text, 0, CONFIG, TOKENIZER)
    return join_rows([*before, rows]), len(rows.frames)


def new_batch(heads=HEADS) -> DecodeBatch:
    return DecodeBatch(CONFIG, random_weights(), 3, 64, heads=heads)


def run_on(batch: DecodeBatch, num_frames: int):
    runs = []
    while sum(run.codes.shape[1] for run in runs) < num_frames:
        runs.append(batch.run(min(4, num_frames - sum(run.codes.shape[1] for run in runs))))
    return tuple(np.concatenate([run[i] for run in runs], axis=1) for i in (0, 1))


def teacher_forced(prompt: Prompt, codes: np.ndarray, num_text: int) -> np.ndarray:
    """What a pass over prompt and codes attends to in the text: [F, N, num_text]."""
    frames = np.concatenate([prompt.frames, np.pad(codes, ((0, 0), (0, 1)))])
    columns = np.arange(NUM_CODEBOOKS + 1) < NUM_CODEBOOKS
    mask = np.concatenate([prompt.mask, np.tile(columns, (len(codes), 1))])

    @jax.jit
    def attend(params, frames, mask):
        return bind(CONFIG, params).attend(frames, mask, HEADS)[1].attention

    weights = np.asarray(attend(random_weights(), frames[None], mask[None]))[0]  # [N, T, S]
    first = len(prompt.frames) - 1
    text = slice(len(prompt.frames) - num_text, len(prompt.frames))
    return weights[:, first : first + len(codes), text].transpose(1, 0, 2)


def join(batch: DecodeBatch, index: int, num_shared: int = 0) -> tuple[Prompt, int]:
    prompt, num_text = prompt_of(TEXTS[index], context_frames=3 + 2 * index)
    sampling = Sampling(temperature=1.2)
    utterance = Utterance(prompt, sampling, index, NUM_FRAMES + 3, num_shared, num_text)
    batch.join(index, utterance)
    return prompt, num_text


@pytest.mark.parametrize("num_shared", [0, 5])
def test_attention_of_ragged_rows_is_that_of_a_teacher_forced_pass(num_shared):
    batch = new_batch()
    prompts = [join(batch, index, num_shared) for index in range(3)]
    codes, attention = run_on(batch, NUM_FRAMES)
    for index, (prompt, num_text) in enumerate(prompts):
        expected = teacher_forced(prompt, codes[index], num_text)
        got = attention[index, ..., :num_text]
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_attention_after_a_rewind_is_that_of_the_frames_that_stay():
    batch = new_batch()
    prompt, num_text = join(batch, 1)
    codes, _ = run_on(batch, 5)
    batch.rewind(1, Rewind(codes[1, :2], 77))
    more, attention = run_on(batch, 4)
    whole = np.concatenate([codes[1, :2], more[1]])
    expected = teacher_forced(prompt, whole, num_text)[2:]
    np.testing.assert_allclose(attention[1, ..., :num_text], expected, atol=1e-5)


def test_codes_do_not_depend_on_the_heads():
    codes = []
    for heads in (HEADS, ()):
        batch = new_batch(heads)
        for index in range(3):
            join(batch, index)
        codes.append(np.concatenate([batch.run(4).codes, batch.run(4).codes], axis=1))
    np.testing.assert_array_equal(*codes)


def test_an_end_that_is_excluded_is_never_drawn():
    """The logit of id 0 of the first codebook, which begins every end of speech."""
    prompt, num_text = prompt_of("a", 2)
    for bias, expected in ((-np.inf, 0), (1e4, 1)):
        batch = new_batch()
        utterance = Utterance(prompt, Sampling(), 5, 20, 0, num_text, end_bias=bias)
        batch.join(0, utterance)
        codes = batch.run(12).codes[0]
        assert (codes[:, 0] == 0).any() == bool(expected)
        assert len(up_to_the_end(codes)) == (0 if expected else 12)


def test_an_end_that_is_raised_is_completed():
    """A frame that only begins with 0 would be noise in the middle of speech."""
    prompt, num_text = prompt_of("a", 2)
    plain, raised = [], []
    for seed in range(8):
        for bias, ends in ((0.0, plain), (6.0, raised)):
            batch = new_batch()
            batch.join(0, Utterance(prompt, Sampling(), seed, 20, 0, num_text, end_bias=bias))
            codes = batch.run(12).codes[0]
            assert not bias or (codes[codes[:, 0] == 0] == 0).all()
            ends.append(len(up_to_the_end(codes)))
    assert np.mean(raised) < np.mean(plain)


@pytest.fixture(scope="module")
def demo():
    return csm_jax.load("demo", dtype="float32")


def times(words) -> list[tuple[str, float, float]]:
    return [(word.text, word.start, word.end) for word in words]


def test_words_of_a_request_are_those_of_the_same_request_alone(demo):
    """Alone, in chunks, as a stream, and in an engine with others."""
    texts = ["four nine one", "two two seven eight zero", "five"]
    alone, streamed, submitted = [], [], []
    for text in texts:
        words = []
        demo.generate(text, on_word=words.append)
        alone.append(words)
        words = []
        list(demo.stream(text, on_word=words.append))
        streamed.append(words)
    with csm_jax.Engine(demo, 2) as engine:
        tickets = []
        for text in texts:
            submitted.append([])
            tickets.append(engine.submit(text, on_word=submitted[-1].append))
        sharpened = [ticket.words() for ticket in tickets]
    for one, stream, batched in zip(alone, streamed, submitted, strict=True):
        assert [word.text for word in one] == [word.text for word in stream]
        for other in (stream, batched):
            np.testing.assert_allclose(
                [word[1:] for word in times(other)], [word[1:] for word in times(one)], atol=0.02
            )
    for text, words in zip(texts, sharpened, strict=True):
        expected = demo.speak(text).words
        np.testing.assert_allclose(
            [word[1:] for word in times(words)], [word[1:] for word in times(expected)], atol=0.02
        )


def test_words_are_all_of_the_text_in_order_and_without_overlaps(demo):
    speech = demo.speak("Three, four! seven eight nine - zero.", speaker=1, seed=3)
    assert " ".join(word.text for word in speech.words) == "Three, four! seven eight nine - zero."
    ends = [0.0, *(word.end for word in speech.words)]
    for word, before in zip(speech.words, ends, strict=False):
        assert before <= word.start <= word.end <= len(speech.audio) / speech.sample_rate
        assert 0 <= word.confidence <= 1


def test_words_of_long_texts_are_timed_in_the_whole_speech(demo):
    digits = "one two three four. "
    inference = dataclasses.replace(demo.inference, max_part_characters=30)
    model = dataclasses.replace(demo, inference=inference)
    speech = model.speak(digits * 3)
    assert [word.text for word in speech.words] == (digits * 3).split()
    starts = [word.start for word in speech.words]
    assert starts == sorted(starts)
    assert starts[-1] > 0.7 * len(speech.audio) / speech.sample_rate


def test_a_model_without_heads_has_no_words():
    model = csm_jax.load("random:tiny")
    speech = model.speak("one two", max_audio_length_ms=400)
    assert speech.words == ()
    with_heads = dataclasses.replace(model, alignment=AlignmentHeads(((0, 0),), (0.1,), (0.5,)))
    assert len(with_heads.speak("one two", max_audio_length_ms=400).words) == 2
