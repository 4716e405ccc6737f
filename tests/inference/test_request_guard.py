"""The guard's verdicts as a request carries them out."""

import numpy as np
import pytest
from request_driver import (
    END,
    LONG,
    Q,
    StubModel,
    assert_prompt,
    begin,
    codes,
    frames_for,
    join,
    kinds,
    loop,
    play,
)

from csm_jax import Request, Sampling, Segment
from csm_jax.inference.request_state import RequestState
from csm_jax.prompt.splitting import split_text

GREEDY = Sampling(greedy=True)
# Drafts of an utterance; what is released of them; the frames it is rewound to; notices.
COURSES = {
    "clean": ([join(codes(40), END)], codes(40), [], []),
    "loop": (
        [join(codes(20), loop(40)), join(codes(20), codes(9, 2), END)],
        join(codes(20), loop(4), codes(9, 2)[4:]),
        [24],
        ["resampled"],
    ),
    "three loops": (
        [join(codes(20), loop(40)), join(codes(28), loop(40, 1)), join(codes(36), loop(40, 2))],
        None,
        [24, 32],
        ["resampled", "resampled", "guard_cut"],
    ),
    "end in a loop": ([join(codes(9), loop(12), END)], join(codes(9), loop(12)), [], []),
    "end in suspense after a loop": (
        [join(codes(9), loop(30)), join(codes(13), loop(10, 1), END)],
        None,
        [13],
        ["resampled"],
    ),
    "no end": ([codes(300)], codes(300)[: frames_for("Hi.")], [], ["guard_cut"]),
    "loop at the end of what is allowed": (
        [join(codes(80), loop(40)), codes(300)],
        None,
        [84],
        ["resampled", "guard_cut"],
    ),
    "loop, then silence": (
        [join(codes(9), loop(30)), join(codes(40), np.full((60, Q), 3, np.int32)), codes(200)],
        None,
        [13, 50],
        ["resampled", "resampled", "guard_cut"],
    ),
}


@pytest.mark.parametrize(
    ("drafts", "expected", "rewound_to", "expected_kinds"), COURSES.values(), ids=COURSES
)
def test_the_outcome_does_not_depend_on_the_chunks(drafts, expected, rewound_to, expected_kinds):
    """One by one, by hundreds, or mixed: the same frames, rewinds and notices."""
    outcomes = []
    for chunks in ([1], [2], [25], [500], [3, 1, 8, 30]):
        state, notices = begin(Request("Hi.", seed=3))
        (utterance,), (released,), (rewinds,) = play(state, drafts, chunks=chunks)
        assert utterance.max_frames == frames_for("Hi.") + 1  # one too many is seen, not released
        outcomes.append((released.tolist(), [rewind.seed for rewind in rewinds], notices))
        assert [len(rewind.codes) for rewind in rewinds] == rewound_to
        assert kinds(notices) == expected_kinds
    for outcome in outcomes[1:]:
        assert outcome == outcomes[0]
    if expected is not None:
        np.testing.assert_array_equal(released, expected)
    # A draft is released up to where it was left, and the next one from there on.
    borders = [0, *rewound_to, len(released)]
    for draft, start, end in zip(drafts, borders, borders[1:], strict=False):
        np.testing.assert_array_equal(released[start:end], draft[start:end])


def test_notices_name_the_fault_and_its_time():
    state, notices = begin(Request("Hi."))
    play(state, COURSES["three loops"][0])
    assert [notice.message for notice in notices] == [
        "the speech repeats itself at 1.9 s: it went on from there with another seed",
        "the speech repeats itself at 2.6 s: it went on from there with another seed",
        "the speech repeats itself at 3.2 s: it was cut there",
    ]


@pytest.mark.parametrize("name", ["three loops", "loop", "end in a loop"])
def test_a_part_is_context_as_it_was_released(name):
    """Cut, rewound, or with frames at its end that were held back to the last."""
    state, notices = begin(Request(LONG))
    drafts, _, _, expected_kinds = COURSES[name]
    utterances, released, _ = play(state, drafts, [join(codes(9), END)], [join(codes(9), END)])
    parts = split_text(LONG)
    assert_prompt(utterances[1], Segment(0, parts[0], codes=released[0]), text=parts[1])
    assert kinds(notices) == expected_kinds


@pytest.mark.parametrize("left_alone", [{"guard": "off"}, {"sampling": GREEDY}], ids=str)
def test_without_the_guard_all_frames_are_released(left_alone):
    """And the codes of silence, for which the codec has to run, are not computed."""
    generated = join(codes(5), loop(60), np.full((40, Q), 3, np.int32), codes(15))
    model, notices = StubModel(), []
    state = RequestState(model, Request("Hi.", **left_alone), notices.append)
    _, (released,), (rewinds,) = play(state, [join(generated, END)], chunks=[7])
    np.testing.assert_array_equal(released, generated)
    assert (rewinds, notices, model.num_silences) == ([], [], 0)
