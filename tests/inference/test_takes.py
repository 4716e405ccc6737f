"""`best_of`: takes side by side, of which the best is kept."""

import dataclasses

import numpy as np
import pytest

import csm_jax
from csm_jax import Engine, InputError, Request, Segment
from csm_jax.errors import CSMError, QueueFullError, RequestCancelledError
from csm_jax.inference import take, takes
from csm_jax.inference.request import MAX_TAKES
from csm_jax.inference.request_state import RequestState

TEXT = "four nine one zero"


@pytest.fixture(scope="module")
def model():
    return csm_jax.load("demo", dtype="float32")


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, max_batch=3) as engine:
        yield engine


def by_hand(engine: Engine, request: Request) -> list[csm_jax.Ticket]:
    """The takes of a request, each as a request of its own."""
    seeds = takes.take_seeds(request.seed, request.best_of)
    return [
        engine.submit(dataclasses.replace(request, best_of=1, seed=seed), stream=False)
        for seed in seeds
    ]


def test_takes_have_seeds_of_their_own_and_the_first_is_that_of_the_request():
    assert takes.take_seeds(5, 1) == [5]
    assert takes.take_seeds(5, 4)[:2] == takes.take_seeds(5, 2)
    assert len({*takes.take_seeds(5, MAX_TAKES), *takes.take_seeds(6, MAX_TAKES)}) == 2 * MAX_TAKES


def test_the_take_with_the_highest_rank_is_kept(engine):
    request = Request(TEXT, seed=3, best_of=3)
    expected = [ticket.codes() for ticket in by_hand(engine, request)]
    assert len({codes.tobytes() for codes in expected}) == 3
    for best in range(3):
        wanted = expected[best].tobytes()
        ticket = engine.submit(
            request, rank=lambda take, wanted=wanted: take.codes.tobytes() == wanted, stream=False
        )
        np.testing.assert_array_equal(ticket.codes(), expected[best])


def test_without_alignment_heads_the_take_that_the_model_is_surest_of_is_kept(model):
    plain = dataclasses.replace(model, alignment=None)
    with Engine(plain, max_batch=3) as engine:
        request = Request(TEXT, seed=5, best_of=3)
        codes = [ticket.codes() for ticket in by_hand(engine, request)]
        scores = [plain.score(TEXT, each) for each in codes]
        # The mean over all codes with those of the end, and the entropy of the first codebook.
        certainties = [
            np.concatenate([score.log_probability, score.end_log_probability[None]]).mean()
            - score.entropy[:, 0].mean()
            for score in scores
        ]
        kept = engine.submit(request, stream=False).codes()
    np.testing.assert_array_equal(kept, codes[int(np.argmax(certainties))])


def test_a_take_that_is_cut_is_kept_only_if_all_are(engine, monkeypatch):
    """Whatever is likely."""
    monkeypatch.setattr(take, "_certainty", lambda score: -len(score.codes))
    request = Request(TEXT, seed=3, best_of=2)
    shortest = min(len(ticket.codes()) for ticket in by_hand(engine, request))
    assert len(engine.submit(request, stream=False).codes()) == shortest
    submit = engine.submit

    def cut_the_second(each, **options):
        limit = 400.0 if each.seed != request.seed else None
        return submit(dataclasses.replace(each, max_audio_length_ms=limit), **options)

    ticket = takes.submit_takes(request, engine.model, 2048, cut_the_second, False, True, None)
    np.testing.assert_array_equal(ticket.codes(), submit(TEXT, seed=3, stream=False).codes())


def test_recordings_of_the_context_are_encoded_once(engine, monkeypatch):
    encoded = []
    encode = type(engine.model).encode

    def count(self, audio):
        encoded.append(len(audio))
        return encode(self, audio)

    monkeypatch.setattr(type(engine.model), "encode", count)
    silence = Segment(0, "two", np.zeros(24_000, np.float32))
    ticket = engine.submit(TEXT, context=[silence], best_of=3, stream=False)
    ticket.codes()
    assert encoded.count(24_000) == 1
    assert "silent_context" in {notice.kind for notice in ticket.notices}


def test_of_equal_takes_the_first_is_kept(engine):
    codes = engine.submit(TEXT, seed=3, best_of=3, stream=False, rank=lambda take: 0).codes()
    np.testing.assert_array_equal(codes, engine.submit(TEXT, seed=3, stream=False).codes())


def test_speech_has_all_takes_the_best_first_and_equal_ones_in_the_order_of_their_seeds(model):
    request = Request(TEXT, seed=3, best_of=4)
    ranks = dict(zip(takes.take_seeds(3, 4), [1.0, 2.0, 1.0, 3.0], strict=True))
    speech = model.speak(request, rank=lambda take: ranks[take.seed])
    seeds = [take.seed for take in speech.takes]
    assert seeds == [list(ranks)[index] for index in (3, 1, 0, 2)]
    np.testing.assert_array_equal(speech.takes[0].codes, speech.codes)
    alone = model.generate(TEXT, seed=seeds[-1])
    np.testing.assert_allclose(speech.takes[-1].audio, alone, atol=1e-5)
    assert model.speak(TEXT, seed=3).takes == ()


def test_the_choice_is_the_same_each_time(engine):
    request = Request(TEXT, seed=8, best_of=3)
    first, second = (engine.submit(request, stream=False).codes() for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_a_ticket_of_takes_has_the_words_and_notices_of_the_best(engine, model):
    words = []
    ticket = engine.submit(TEXT, seed=3, best_of=2, max_audio_length_ms=800, on_word=words.append)
    chunks = list(ticket)
    assert len(chunks) == 1
    np.testing.assert_allclose(chunks[0], model.decode(ticket.codes()), atol=1e-6)
    np.testing.assert_array_equal(chunks[0], ticket.result())
    assert [notice.kind for notice in ticket.notices] == ["cut"]
    assert [word.text for word in words] == TEXT.split()
    assert [word.text for word in ticket.words()] == TEXT.split()
    assert ticket.timing.frames > 0


def test_every_way_to_speak_keeps_the_same_take(model):
    request = Request(TEXT, seed=4, best_of=2)
    notices = []
    expected = model.generate(request, notify=notices.append)
    speech = model.speak(request)
    np.testing.assert_array_equal(speech.audio, expected)
    np.testing.assert_array_equal(model.generate_codes(request), speech.codes)
    assert [word.text for word in speech.words] == TEXT.split()
    np.testing.assert_array_equal(np.concatenate(list(model.stream(request))), expected)
    conversation = csm_jax.Conversation(model, seed=4, best_of=2)
    np.testing.assert_array_equal(conversation.speak(TEXT), expected)
    (batched,) = model.generate_batch([request], max_batch=2)
    np.testing.assert_allclose(batched, expected, atol=1e-5)


def test_bad_input_of_a_stream_is_an_error_at_the_call(model):
    with pytest.raises(InputError):
        model.stream("a", context=[Segment(0, " ", codes=np.zeros((1, 32), np.int32))], best_of=2)


@pytest.mark.parametrize("count", [0, MAX_TAKES + 1, 1.5])
def test_the_number_of_takes_is_bounded(count):
    with pytest.raises(InputError, match="best_of is"):
        Request("a", best_of=count)


def test_takes_that_find_no_place_in_the_queue_are_all_refused(model):
    with Engine(model, max_batch=1, max_queue=3) as engine:
        with pytest.raises(QueueFullError):
            engine.submit(TEXT, best_of=MAX_TAKES)
        assert len(engine.submit("one", best_of=2, wait=True).codes())


def test_cancel_cancels_all_takes(model):
    with Engine(model, max_batch=2) as engine:
        ticket = engine.submit(TEXT, best_of=2)
        ticket.cancel()
        with pytest.raises(RequestCancelledError):
            ticket.codes()


def test_a_choice_that_fails_is_the_error_of_the_request(engine):
    def fail(take):
        raise ValueError("no score")

    with pytest.raises(CSMError, match="no take could be chosen: no score"):
        engine.submit(TEXT, best_of=2, rank=fail).codes()
    with pytest.raises(InputError, match="rank is of type str"):
        engine.submit(TEXT, best_of=2, rank="surest")


def test_a_rank_is_given_audio_codes_words_and_scores_of_every_take(engine, model):
    """And each take is what its seed leads to alone."""
    given: list[csm_jax.Take] = []

    def longest(take: csm_jax.Take) -> int:
        given.append(take)
        return len(take.codes)

    ticket = engine.submit(TEXT, seed=3, best_of=2, rank=longest, stream=False)
    assert len(ticket.codes()) == max(len(take.codes) for take in given)
    assert [take.seed for take in given] == takes.take_seeds(3, 2)
    for each in given:
        np.testing.assert_array_equal(each.codes, model.generate_codes(TEXT, seed=each.seed))
        np.testing.assert_array_equal(each.audio, model.decode(each.codes))
        assert each.score.total == pytest.approx(model.score(TEXT, each.codes).total, rel=1e-4)
        assert [word.text for word in each.words] == TEXT.split()


def test_scores_of_takes_have_the_context_that_the_takes_had(model):
    """What fixes a voice is not left out for what is newer."""
    room, shape = model.config.backbone.max_seq_len, model.config.num_codebooks
    sizes = 20, room // 2, room // 2 - 20
    voice, *newer = (np.full((size, shape), i + 1, np.int32) for i, size in enumerate(sizes))
    context = [Segment(0, "zero", codes=codes) for codes in (voice, *newer)]
    request = Request(TEXT, 0, context, max_audio_length_ms=800, context_seconds=np.inf)
    utterance = RequestState(model, request, lambda notice: None).next_utterance()
    assert utterance is not None
    given = takes._as_given(model, request, voice[:10])
    assert given is not None
    before = len(given.prompt.frames) - 11
    np.testing.assert_array_equal(given.prompt.frames[:before], utterance.prompt.frames)
    kept = set(given.prompt.frames[:before, 0])
    assert 1 in kept
    assert 2 not in kept
    assert 3 in kept
