"""Prompts: the rows of text and audio, and the turns that are refused."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from csm_jax import config
from csm_jax.errors import InputError
from csm_jax.prompt.turns import (
    Segment,
    Turn,
    check_text,
    join_rows,
    text_rows,
    turn_rows,
)

CONFIG = dataclasses.replace(config.tiny(), num_codebooks=3)
BOS, EOS = 256, 257
TOKENIZER = SimpleNamespace(encode=lambda text: [BOS, *text.encode(), EOS])
AUDIO = np.zeros(4000, np.float32)
CODES = np.array([[1, 2, 3], [4, 5, 6]])
# The codes of the audio of every turn.
ENCODED = np.array([[7, 8, 9], [0, 0, 1], [34, 0, 2]], np.int32)


def build(text="hi", speaker=0, context=(), encode=lambda _: ENCODED):
    """The prompt of a text: the turns so far, and the text."""
    spoken = [rows for turn in context for rows in turn_rows(turn, CONFIG, TOKENIZER, encode)]
    return join_rows([*spoken, text_rows(text, speaker, CONFIG, TOKENIZER)])


def expected_text(text: str) -> list[list[int]]:
    return [[0, 0, 0, id] for id in (BOS, *map(ord, text), EOS)]


def expected_audio(codes) -> list[list[int]]:
    return [[*codes, 0] for codes in np.asarray(codes).tolist()] + [[0, 0, 0, 0]]


def test_a_space_after_the_speaker_replaces_spaces_before_the_text():
    """As MisoTTS was trained: `[7] hi`, whatever stands before the text."""
    spaced = dataclasses.replace(CONFIG, space_after_speaker=True)
    for text in ("hi", "  hi"):
        (rows,) = turn_rows(Segment(7, text), spaced, TOKENIZER)
        assert rows.frames.tolist() == expected_text("[7] hi")
        assert text_rows(text, 7, spaced, TOKENIZER).frames.tolist() == expected_text("[7] hi")


TEXT, SOUND = [False] * 3 + [True], [True] * 3 + [False]


def test_a_prompt_without_context_row_by_row():
    frames, mask = build("hi", speaker=7)
    assert frames.dtype == np.int32
    assert mask.dtype == bool
    assert frames.tolist() == [
        [0, 0, 0, 256],
        [0, 0, 0, ord("[")],
        [0, 0, 0, ord("7")],
        [0, 0, 0, ord("]")],
        [0, 0, 0, ord("h")],
        [0, 0, 0, ord("i")],
        [0, 0, 0, 257],
    ]
    assert mask.tolist() == [[False, False, False, True]] * 7


def test_the_rows_of_a_turn_with_codes():
    frames, mask = build("b", context=[Segment(1, "a", codes=CODES)])
    assert frames.tolist() == [
        *expected_text("[1]a"),
        [1, 2, 3, 0],
        [4, 5, 6, 0],
        [0, 0, 0, 0],  # the end of the audio: a frame of zeros with a mask
        *expected_text("[0]b"),
    ]
    assert mask.tolist() == [TEXT] * 6 + [SOUND] * 3 + [TEXT] * 6


@pytest.mark.parametrize("turn", [{"codes": CODES}, {"audio": AUDIO}])
def test_a_recording_without_a_transcript_has_its_speaker_but_no_words(turn):
    segment = Segment(1, None, **turn)
    frames, mask = build("b", context=[segment])
    codes = turn.get("codes", ENCODED)
    rows = [*expected_text("[1]"), *expected_audio(codes)]
    assert frames.tolist() == [*rows, *expected_text("[0]b")]
    assert mask.tolist() == [TEXT] * 5 + [SOUND] * (len(codes) + 1) + [TEXT] * 6
    num_frames = len(CODES) if "codes" in turn else -(-len(AUDIO) // CONFIG.codec.frame_size)
    assert Turn(segment, CONFIG, TOKENIZER).length == 5 + num_frames + 1


def test_a_turn_with_neither_text_nor_audio_is_refused():
    with pytest.raises(InputError, match="neither a text nor audio"):
        build(context=[Segment(0, None)])
    with pytest.raises(InputError, match="neither a text nor audio"):
        Turn(Segment(0, None), CONFIG, TOKENIZER)


def test_turns_follow_in_their_order():
    context = [
        Segment(0, "one", audio=AUDIO),
        Segment(123, "two"),
        Segment(1, "three", codes=CODES),
        Segment(0, "four", audio=AUDIO, codes=CODES),  # codes instead of audio
    ]
    frames, mask = build("five", speaker=123, context=context)
    expected = [
        *expected_text("[0]one"),
        *expected_audio(ENCODED),
        *expected_text("[123]two"),
        *expected_text("[1]three"),
        *expected_audio(CODES),
        *expected_text("[0]four"),
        *expected_audio(CODES),
        *expected_text("[123]five"),
    ]
    assert frames.tolist() == expected
    assert mask.tolist() == [TEXT if row[-1] else SOUND for row in expected]


@pytest.mark.parametrize("speaker", [0, 7, 123])
def test_any_number_is_a_speaker(speaker):
    frames, _ = build("hi", speaker, [Segment(speaker, "yes")])
    assert frames.tolist() == expected_text(f"[{speaker}]yes") + expected_text(f"[{speaker}]hi")


def test_text_is_not_normalized():
    frames, _ = build(" Oh,  well\n")
    assert frames.tolist() == expected_text("[0] Oh,  well\n")


def test_the_codec_gets_the_audio_of_the_turn():
    encoded = []

    def encode(audio):
        encoded.append(audio)
        return ENCODED

    spoken = [np.linspace(-0.5, 0.5, n, dtype=np.float32) for n in (100, 200)]
    context = [Segment(0, "a", audio=spoken[0]), Segment(1, "b", codes=CODES)]
    context += [Segment(0, "c"), Segment(1, "d", audio=spoken[1])]
    build("e", 0, context, encode)
    assert len(encoded) == 2
    for got, expected in zip(encoded, spoken, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_empty_codes_are_accepted():
    frames, _ = build("b", context=[Segment(0, "a", codes=np.zeros((0, 3), np.int32))])
    assert frames.tolist() == [*expected_text("[0]a"), [0, 0, 0, 0], *expected_text("[0]b")]


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_empty_text_is_refused(text):
    for arguments in ({"text": text}, {"context": [Segment(0, text, codes=CODES)]}):
        with pytest.raises(InputError, match="text is empty"):
            build(**arguments)
    with pytest.raises(InputError, match="text is empty"):
        check_text(text)


def test_joined_turns_keep_their_types():
    """A single turn is not changed."""
    parts = turn_rows(Segment(1, "a", codes=CODES), CONFIG, TOKENIZER)
    assert [len(frames) for frames, _ in parts] == [6, 3]
    for joined in (join_rows(parts), join_rows(parts[:1])):
        frames, mask = joined
        assert (frames.dtype, mask.dtype, frames.shape) == (np.int32, bool, mask.shape)
    np.testing.assert_array_equal(join_rows(parts[:1])[0], parts[0][0])


BAD_TURNS = {
    "one row": ({"codes": CODES[0]}, r"shape \[3\].*\[num_frames, 3\]"),
    "transposed": ({"codes": CODES.T}, r"shape \[3, 2\].*\[num_frames, 3\]"),
    "batched": ({"codes": CODES[None]}, r"shape \[1, 2, 3\].*\[num_frames, 3\]"),
    "codes too large": ({"codes": CODES + 29}, r"30\.\.35.*0\.\.34"),
    "codes negative": ({"codes": CODES - 2}, r"-1\.\.4.*0\.\.34"),
    "codes not whole": ({"codes": CODES + 0.5}, r"float64"),
    "stereo": ({"audio": np.zeros((2, 4000), np.float32)}, r"\(2, 4000\)"),
    "no samples": ({"audio": np.zeros(0, np.float32)}, "no samples"),
    "not finite": ({"audio": np.full(10, np.nan, np.float32)}, "10 of 10 samples"),
}


@pytest.mark.parametrize(("values", "message"), BAD_TURNS.values(), ids=BAD_TURNS.keys())
def test_bad_turns_are_refused(values, message):
    with pytest.raises(InputError, match=message) as error:
        build(context=[Segment(0, "a", **values)])
    assert "\n" not in str(error.value)


def test_the_largest_codes_of_the_vocabulary_are_accepted():
    build(context=[Segment(0, "a", codes=np.full((1, 3), 34))])
