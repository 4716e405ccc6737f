"""Which turns are pinned, chosen as context, and remembered."""

import dataclasses

import numpy as np
import pytest
from fixtures import CONFIG, TOKENIZER
from hypothesis import given
from hypothesis import strategies as st

from csm_jax import Segment
from csm_jax.prompt.turns import Turn
from csm_jax.prompt.window import ContextTurn, choose_context, find_newest, find_pinned, fits

Q = CONFIG.num_codebooks
ENOUGH = 30


def spoken(speaker: int, num_frames: int = 5, pinned: bool = False) -> Segment:
    codes = np.ones((num_frames, Q), np.int32)
    return Segment(speaker, "hm", codes=codes, pinned=pinned)


def in_context(*turns: Segment) -> list[ContextTurn]:
    pinned = find_pinned(turns)
    return [
        ContextTurn(Turn(turn, CONFIG, TOKENIZER), index + 1, index in pinned)
        for index, turn in enumerate(turns)
    ]


def numbers(turns: list[ContextTurn]) -> list[int]:
    return [turn.number for turn in turns]


# --- Pinned turns --------------------------------------------------------------------------------


def test_the_first_turn_with_sound_of_each_speaker_is_pinned():
    silent = Segment(0, "Not spoken yet.")
    ended_at_once = Segment(0, "Hm.", codes=np.ones((0, Q), np.int32))
    recorded = Segment(2, "Hm.", np.zeros(9, np.float32))
    turns = [silent, ended_at_once, spoken(1), spoken(0), spoken(1), spoken(0), recorded]
    assert find_pinned(turns) == {2, 3, 6}
    assert find_pinned([silent]) == find_pinned([]) == set()


def test_turns_that_a_caller_pins_replace_the_first_of_their_speaker():
    turns = [spoken(0), spoken(1), spoken(0, pinned=True), spoken(0, pinned=True), spoken(1)]
    assert find_pinned(turns) == {1, 2, 3}


def test_shared_turns_are_pinned_and_a_voice_needs_no_other_turn():
    turns = [spoken(0), spoken(0), spoken(0), spoken(1)]
    assert find_pinned(turns, num_shared=2) == {0, 1, 3}
    assert find_pinned(turns, has_voice={0}) == {3}


# --- The context of a part -----------------------------------------------------------------------


def test_the_speakers_pinned_turn_comes_before_newer_turns_and_other_pinned_turns_after_them():
    turns = in_context(spoken(1, 20), spoken(0, 10), *[spoken(s, 20) for s in (0, 1, 0, 1)])
    of_ten, of_twenty = turns[1].turn.length, turns[0].turn.length
    for room, kept in (
        (of_ten - 1, []),
        (of_ten, [2]),
        (of_ten + of_twenty, [2, 6]),
        # 40 frames are enough.
        (of_ten + 2 * of_twenty, [2, 5, 6]),
        (of_ten + 3 * of_twenty, [1, 2, 5, 6]),
        (9999, [1, 2, 5, 6]),
    ):
        assert numbers(choose_context(turns, 0, room, ENOUGH)) == kept
    assert numbers(choose_context(turns, 0, 9999, 0)) == [1, 2]
    assert numbers(choose_context(turns, 0, 9999, np.inf)) == [1, 2, 3, 4, 5, 6]


SPOKEN = st.tuples(st.integers(0, 2), st.integers(0, 40), st.booleans() | st.just(False))


@given(st.lists(SPOKEN, max_size=12), st.integers(-5, 300), st.integers(0, 100))
def test_the_context_is_the_pins_that_fit_and_the_newest_turns_without_a_gap(given, room, enough):
    turns = in_context(*[spoken(*each) for each in given])
    kept = choose_context(turns, 0, room, enough)
    assert numbers(kept) == sorted(numbers(kept))
    assert sum(each.turn.length for each in kept) <= max(room, 0)

    def is_own(each: ContextTurn) -> bool:
        return each.is_pinned and each.turn.speaker == 0

    # Newest first, as many of the speaker's pinned turns as fit.
    left = room
    for each in reversed([each for each in turns if is_own(each)]):
        assert (each in kept) == (each.turn.length <= left)
        left -= each.turn.length * (each in kept)
    # The shortest end of the turns that has enough speech, or the longest that fits.
    for size in range(len(turns) + 1):
        end = turns[len(turns) - size :]
        is_enough = sum(each.turn.num_frames for each in end) >= enough
        used = sum(each.turn.length for each in end if not (is_own(each) and each in kept))
        has_next = size < len(turns)
        following = turns[-size - 1] if has_next else None
        fits_too = following in kept and is_own(following) if following else False
        if following and not fits_too:
            fits_too = used + following.turn.length <= left
        if is_enough or not fits_too:
            break
    assert all(each in kept for each in end)
    others = [each for each in kept if each not in end and not each.is_pinned]
    assert others == []


@given(st.lists(SPOKEN, max_size=12), st.integers(0, 300))
def test_turns_fit_if_their_positions_do(given, room):
    turns = in_context(*[spoken(*each) for each in given])
    assert fits(turns, room) == (sum(each.turn.length for each in turns) <= room)


# --- Turns that are remembered -------------------------------------------------------------------


@given(st.lists(SPOKEN, max_size=20), st.integers(1, 20), st.integers(1, 200))
def test_turns_are_remembered_while_they_fit(given, most, room):
    turns = [spoken(*each) for each in given]
    lengths = [1 + length for _, length, _ in given]
    kept = find_newest(turns, most, lengths, room)
    assert kept == sorted(set(kept))
    assert len(kept) <= max(most, 1)
    if len(turns) <= most and sum(lengths) <= room:
        assert kept == list(range(len(turns)))
    if turns:
        assert kept[-1] == len(turns) - 1
    pinned = find_pinned(turns)
    for group in (pinned, set(range(len(turns))) - pinned):
        # The newest of each kind, and no more than fit beside the newest of all.
        chosen = sorted(group & set(kept))
        assert chosen == sorted(group)[len(group) - len(chosen) :]
        assert sum(lengths[i] for i in chosen) <= room or chosen == [len(turns) - 1]


def test_the_turns_that_fix_voices_are_remembered():
    turns = [spoken(i % 2) for i in range(30)]
    assert find_newest(turns, 8) == [0, 1, *range(24, 30)]
    assert find_newest(turns, 8, [10] * 30, 45) == [0, 1, 26, 27, 28, 29]
    many = [spoken(i) for i in range(30)]
    assert find_newest(many, 8) == list(range(22, 30))
    assert find_newest([*many, *turns], 8) == [*range(26, 30), *range(56, 60)]


@pytest.mark.parametrize("most", [1, 2])
def test_the_newest_turn_is_always_remembered(most):
    turns = [spoken(0), spoken(1), spoken(0)]
    assert find_newest(turns, most)[-1] == 2
    assert find_newest(turns[:1], most, [100], 10) == [0]


def test_a_turn_is_not_pinned_by_default():
    assert not spoken(0).pinned
    assert dataclasses.replace(spoken(0), pinned=True).pinned
