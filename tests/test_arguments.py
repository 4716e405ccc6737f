"""Arguments of callers: every form of a number is the number, and nothing else is."""

import decimal

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import CONFIG, TOKENIZER

from csm_jax.errors import InputError
from csm_jax.inference.conversation import Conversation
from csm_jax.inference.request import Request
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.normalizing import normalize_text
from csm_jax.prompt.turns import Segment, turn_rows

ZEROS = [0, 0.0, -0.0, np.int8(0), np.uint64(0), np.float32(0), np.array(0), jnp.int32(0)]
NO_INTEGERS = [True, np.True_, 0.5, "0", b"0", [0], np.zeros(1), float("nan"), float("inf"), 1j]
NO_INTEGERS += [decimal.Decimal(0), np.float32(0.5), Ellipsis, 1e300 * 1e10, np.array(True)]


@pytest.mark.parametrize("zero", ZEROS, ids=repr)
def test_every_form_of_a_speaker_makes_the_same_prompt(zero):
    """The reference writes the speaker's number as Python's int."""
    (text,) = turn_rows(Segment(zero, "Hi."), CONFIG, TOKENIZER)
    assert text.frames[:, -1].tolist() == TOKENIZER.encode("[0]Hi.")
    request = Request("Hi.", speaker=zero, seed=zero, shared_turns=zero)
    assert request == Request("Hi.")
    assert {type(request.speaker), type(request.seed), type(request.shared_turns)} == {int}


def test_large_and_negative_numbers_are_kept():
    assert Request("Hi.", seed=np.uint64(2**64 - 1)).seed == 2**64 - 1
    assert Request("Hi.", seed=np.int8(-3), speaker=np.float64(-2)).seed == -3


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
@pytest.mark.parametrize("name", ["speaker", "seed", "shared_turns"])
def test_other_values_for_a_whole_number_are_refused_in_one_line(name, value):
    with pytest.raises(InputError, match=f"^{name} is .*, but must be a whole number") as caught:
        Request("Hi.", **{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [*NO_INTEGERS, None], ids=repr)
def test_a_turn_needs_a_whole_number_as_its_speaker(value):
    with pytest.raises(InputError, match=r"^speaker is "):
        Segment(value, "Hi.")


def test_none_is_the_default_of_every_field():
    names = ["speaker", "context", "sampling", "max_audio_length_ms", "seed", "guard"]
    assert Request("Hi.", **dict.fromkeys([*names, "shared_turns"])) == Request("Hi.")


def test_none_is_the_default_of_a_conversation():
    conversation = Conversation(None, None, seed=None, sampling=None, guard=None)  # pyright: ignore
    assert conversation.request("Hi.", None) == Request("Hi.")  # pyright: ignore


@pytest.mark.parametrize("text", [None, b"Hi.", 5, ["Hi."]])
def test_a_text_that_is_no_str_is_refused(text):
    with pytest.raises(InputError, match=r"^the text is of type"):
        Request(text)
    # A turn may have no text, but then it has audio.
    with pytest.raises(InputError, match=r"^(the text is of type|a turn has neither a text)"):
        turn_rows(Segment(0, text), CONFIG, TOKENIZER)


def test_a_context_may_be_any_iterable_of_turns():
    turns = [Segment(0, "Hi."), Segment(1, "Ho.")]
    assert list(Request("a", context=iter(turns)).context) == turns
    assert Request("a", context=turns).context == turns


@pytest.mark.parametrize("context", [Segment(0, "a"), "ab", 5, ["a"], [{"text": "a"}], [None]])
def test_a_context_of_something_else_is_refused(context):
    with pytest.raises(InputError, match="context must be a list of turns"):
        Request("a", context=context)


@pytest.mark.parametrize("length", [True, "1000", [1000], 1j])
def test_a_length_that_is_no_number_is_refused(length):
    with pytest.raises(InputError, match=r"^max_audio_length_ms is"):
        Request("a", max_audio_length_ms=length)


FIELDS = {"temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.25, "repetition_penalty": 2}


@pytest.mark.parametrize("name", FIELDS)
def test_numbers_of_sampling_may_have_any_form(name):
    value = FIELDS[name]
    expected = Sampling(**{name: value})
    for form in (np.float16(value), np.float64(value), np.asarray(value), jnp.asarray(value)):
        given = Sampling(**{name: form})
        assert given == expected
        assert type(getattr(given, name)) in (int, float)
    assert Sampling(**{name: None}) == Sampling()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", ["0.5", [0.5], True, 1j, np.zeros(2), ...], ids=repr)
@pytest.mark.parametrize("name", [*FIELDS, "depth_temperature", "depth_top_k"])
def test_other_values_of_sampling_are_refused_in_one_line(name, value):
    with pytest.raises(InputError, match=f"^{name} is ") as caught:
        Sampling(**{name: value})
    assert "\n" not in str(caught.value)


def test_greedy_is_true_or_false():
    """The text "false" would be true."""
    assert (
        Sampling(greedy=np.bool_(True))
        == Sampling(greedy=jnp.asarray(True))
        == Sampling(greedy=True)
    )
    for value in ("false", 1, 0.0, [False]):
        with pytest.raises(InputError, match=r"^greedy is .*, but must be True or False"):
            Sampling(greedy=value)


@pytest.mark.parametrize("text", [None, b"5", 5])
def test_only_a_str_is_normalized(text):
    with pytest.raises(InputError, match=r"^the text is of type"):
        normalize_text(text)


@pytest.mark.parametrize("sampling", [0.9, {"temperature": 0.9}, "greedy"])
def test_sampling_of_another_type_is_refused(sampling):
    with pytest.raises(InputError, match=r"^sampling is of type"):
        Request("a", sampling=sampling)
    assert Request("a", sampling=Sampling(0.5)).sampling.temperature == 0.5
