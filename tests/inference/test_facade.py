"""The signatures of the facade, what it accepts beside strings, and how it prints."""

import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from engine_requests import SMALL

import csm_jax
from csm_jax import Engine, Generator, InputError, Request
from csm_jax.config import CSMConfig
from csm_jax.inference.engine_config import EngineConfig
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.inference.request_parameters import generate_parameters, submit_parameters
from csm_jax.model.precision import Precision

METHODS = [Generator.generate, Generator.generate_codes, Generator.stream, Engine.submit]
SHORT = Request("Hi.", seed=1, max_audio_length_ms=160, guard="off")


def public_parameters(function) -> dict[str, inspect.Parameter]:
    return {k: v for k, v in inspect.signature(function).parameters.items() if k != "self"}


def defaults(parameters) -> dict:
    return {name: parameter.default for name, parameter in parameters.items()}


# --- Signatures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__qualname__)
def test_methods_have_the_parameters_of_a_request(method):
    """With the same names, order, types and defaults."""
    parameters = public_parameters(method)
    wanted = public_parameters(Request)
    shared = {name: parameters[name] for name in parameters if name in wanted}
    assert list(parameters)[: len(wanted)] == list(wanted)
    assert defaults(shared) == defaults(wanted)
    types = {name: parameter.annotation for name, parameter in shared.items()}
    assert types.pop("text") == str | Request
    assert types == {name: wanted[name].annotation for name in types}
    options = [parameters[name] for name in parameters if name not in wanted]
    assert all(option.kind is option.KEYWORD_ONLY for option in options)


@pytest.mark.parametrize(
    ("method", "template"),
    [(Generator.generate, generate_parameters), (Engine.submit, submit_parameters)],
)
def test_options_are_those_that_the_method_takes(method, template):
    options = [
        name
        for name, parameter in inspect.signature(template).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    own = inspect.signature(method.__wrapped__).parameters
    assert list(own) == ["self", "request", *options]


def test_help_shows_names_types_and_defaults():
    text = str(inspect.signature(Generator.generate))
    for part in (
        "text: str | csm_jax.inference.request.Request",
        "speaker: int = 0",
        "seed: int = 0",
    ):
        assert part in text
    assert "max_audio_length_ms: float | None = None" in text
    assert text.endswith("-> numpy.ndarray")


def test_an_engine_has_the_parameters_of_its_config(model):
    parameters = public_parameters(Engine)
    del parameters["model"]
    assert defaults(parameters) == dataclasses.asdict(EngineConfig())
    with Engine(model, max_batch=2, max_queue=3) as engine:
        assert engine.config == EngineConfig(max_batch=2, max_queue=3)


# --- Calls ---------------------------------------------------------------------------------------


def test_a_misspelled_parameter_is_named_with_the_nearest(model):
    message = "speeker is no parameter of {}: did you mean speaker"
    with Engine(model, max_batch=1) as engine:
        calls = [model.generate, model.generate_codes, model.stream, engine.submit]
        for call in calls:
            with pytest.raises(InputError, match=message.format(call.__name__)):
                call("Hi.", speeker=1)
    with pytest.raises(InputError, match="max_bach is no parameter of generate_batch: did you"):
        model.generate_batch([], max_bach=1)
    with pytest.raises(InputError, match="volume is no parameter of generate: there are text, spe"):
        model.generate("Hi.", volume=11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "generate: missing a required argument: 'text'"), (range(20), "generate: too many")],
)
def test_other_calls_that_do_not_fit_are_input_errors(model, arguments, message):
    with pytest.raises(InputError, match=message):
        model.generate(*arguments)


def test_a_request_stands_for_its_fields(model):
    """And other arguments replace its own."""
    whole = model.generate_codes(SHORT)
    values = {field.name: getattr(SHORT, field.name) for field in dataclasses.fields(SHORT)}
    np.testing.assert_array_equal(whole, model.generate_codes(**values))
    other = model.generate_codes(SHORT, seed=2)
    np.testing.assert_array_equal(other, model.generate_codes(dataclasses.replace(SHORT, seed=2)))
    assert (whole != other).any()


def test_a_stream_reports_its_progress(model):
    counts = []
    chunks = list(model.stream(SHORT, progress=counts.append))
    assert counts[-1] == sum(map(len, chunks)) // model.codec.frame_size == 2


@pytest.mark.parametrize(("given", "kept"), [(True, "on"), (False, "off"), ("off", "off")])
def test_the_guard_is_on_or_off_or_a_bool(given, kept):
    assert Request("Hi.", guard=given).guard == kept


# --- Loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32, jnp.dtype("float16")], ids=str)
def test_dtype_can_be_a_type(dtype):
    model = csm_jax.load("random:tiny", dtype=dtype)
    assert model.precision == csm_jax.load("random:tiny", jnp.dtype(dtype).name).precision


@pytest.mark.parametrize("dtype", [jnp.int8, "int8", None, 3.5], ids=str)
def test_other_types_are_refused(dtype):
    with pytest.raises(InputError, match=r"dtype is .*, but must be auto, float32, bfloat16 or"):
        csm_jax.load("random:tiny", dtype=dtype)


def test_repr_has_sizes_types_and_devices():
    model = csm_jax.load("random:tiny", "bfloat16", "int8")
    assert str(model).startswith("Generator(")
    assert str(model).endswith(" parameters, bfloat16, int8 weights, 1 device: cpu)")
    assert "int8" not in str(csm_jax.load("random:tiny"))


def test_a_model_carries_its_precision(model):
    float32 = jnp.dtype("float32")
    assert model.precision == Precision(float32, float32)
    assert isinstance(model, LoadedModel)
    assert isinstance(model.config, CSMConfig)
    assert model.inference == SMALL


# --- Codes beyond the codebook -------------------------------------------------------------------


def test_codes_beyond_the_codebook_are_clamped_and_refused_by_the_codec(model):
    """A model's vocabulary has ids that are no codes."""
    last = model.config.codec.codebook_size - 1
    assert model.config.audio_vocab_size > last + 1
    codes = np.full((4, model.config.num_codebooks), last + 1, np.int32)
    clamped = model.codec.decode(np.full_like(codes, last))
    np.testing.assert_array_equal(model.codec.clamp(codes), np.full_like(codes, last))
    np.testing.assert_array_equal(model.decode(codes), clamped)
    streamed, _ = model.codec.decode_frames(codes[None], model.codec.decode_stream_state())
    np.testing.assert_allclose(np.asarray(streamed)[0], clamped, atol=1e-5)
    with pytest.raises(InputError, match=f"code {last + 1} is outside"):
        model.codec.decode(codes)
