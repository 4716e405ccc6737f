"""The tree of errors: what an `except` of a caller catches, and what it does not."""

import asyncio
import inspect

import pytest

import csm_jax
from csm_jax import errors

CLASSES = [
    each
    for _, each in inspect.getmembers(errors, inspect.isclass)
    if each.__module__ == errors.__name__
]
VALUE_ERRORS = {errors.InputError, errors.CheckpointError}


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_is_a_csm_error(error):
    assert issubclass(error, csm_jax.CSMError)


@pytest.mark.parametrize("error", CLASSES)
def test_only_bad_arguments_and_bad_files_are_value_errors(error):
    assert issubclass(error, ValueError) == (error in VALUE_ERRORS)


@pytest.mark.parametrize("error", CLASSES)
def test_no_error_is_caught_as_one_of_the_system(error):
    """`OSError` promises an errno and a `strerror`, which these messages have in their text."""
    assert not issubclass(error, OSError)


def test_the_errors_of_an_engine_can_be_told_apart():
    kinds = {csm_jax.QueueFullError, csm_jax.EngineClosedError, csm_jax.RequestCancelledError}
    for error in kinds:
        assert [kind for kind in kinds if issubclass(error, kind)] == [error]


def test_the_former_name_of_a_cancellation_still_works():
    assert csm_jax.CancelledError is csm_jax.RequestCancelledError
    assert not issubclass(csm_jax.RequestCancelledError, asyncio.CancelledError)


def test_a_value_out_of_range_is_caught_as_a_value_error():
    with pytest.raises(ValueError, match="top_k is 0"):
        csm_jax.Sampling(top_k=0)


@pytest.mark.parametrize(
    ("message", "line"), [("one\ntwo", "one"), ("", "RuntimeError"), ("one", "one")]
)
def test_a_quoted_error_is_its_first_line_or_its_name(message, line):
    assert errors.first_line(RuntimeError(message)) == line
