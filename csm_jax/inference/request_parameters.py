"""Parameters of the methods that speak: those of a `Request`, or a `Request` in place of the text.

Each list is written out once, as a function without a body, and `takes_request` gives it to
methods: so `help`, editors and type checkers see every parameter, and a method gets a `Request`.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from csm_jax.errors import InputError
from csm_jax.inference.interventions import NO_CHANGE, Interventions
from csm_jax.inference.request import (
    DEFAULT_SAMPLING,
    Notify,
    OnWord,
    Progress,
    Request,
    as_request,
)
from csm_jax.inference.take import Rank, rank_take
from csm_jax.inference.voice import Voice
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.turns import Segment

P = ParamSpec("P")
R = TypeVar("R")
Owner = TypeVar("Owner")


def generate_parameters(
    text: str | Request,
    speaker: int = 0,
    context: Sequence[Segment] = (),
    sampling: Sampling = DEFAULT_SAMPLING,
    max_audio_length_ms: float | None = None,
    seed: int = 0,
    guard: str | bool = "on",
    shared_turns: int = 0,
    pauses: bool = False,
    best_of: int = 1,
    interventions: Interventions = NO_CHANGE,
    context_seconds: float | None = None,
    voice: Voice | None = None,
    rank: Rank = rank_take,
    *,
    progress: Progress | None = None,
    notify: Notify | None = None,
    on_word: OnWord | None = None,
) -> None:
    """The parameters of `Generator.generate`, `generate_codes`, `speak` and `stream`."""


def submit_parameters(
    text: str | Request,
    speaker: int = 0,
    context: Sequence[Segment] = (),
    sampling: Sampling = DEFAULT_SAMPLING,
    max_audio_length_ms: float | None = None,
    seed: int = 0,
    guard: str | bool = "on",
    shared_turns: int = 0,
    pauses: bool = False,
    best_of: int = 1,
    interventions: Interventions = NO_CHANGE,
    context_seconds: float | None = None,
    voice: Voice | None = None,
    rank: Rank = rank_take,
    *,
    stream: bool = True,
    wait: bool = False,
    background: bool = False,
    share: str = "",
    weight: float = 1.0,
    keep: bool = True,
    on_word: OnWord | None = None,
) -> None:
    """The parameters of `Engine.submit`."""


def takes_request(
    parameters: Callable[P, None],
) -> Callable[[Callable[Concatenate[Owner, Request, ...], R]], Callable[Concatenate[Owner, P], R]]:
    """Gives a method that takes a `Request` and options the parameters of another function.

    The keyword-only parameters are the options, which the method gets with their defaults; of the
    others the request is made. Calls that do not fit raise `InputError`.
    """
    signature = inspect.signature(parameters)
    options = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }

    def decorate(
        method: Callable[Concatenate[Owner, Request, ...], R],
    ) -> Callable[Concatenate[Owner, P], R]:
        own = inspect.signature(method)
        this = next(iter(own.parameters.values()))

        @functools.wraps(method)
        def call(self: Owner, *args: P.args, **kwargs: P.kwargs) -> R:
            given = _bind(signature, method.__name__, args, kwargs)
            chosen = {name: given.pop(name, default) for name, default in options.items()}
            return method(self, as_request(**given), **chosen)

        call.__dict__["__signature__"] = signature.replace(
            parameters=[this, *signature.parameters.values()],
            return_annotation=own.return_annotation,
        )
        return call

    return decorate


def checks_call(method: Callable[P, R]) -> Callable[P, R]:
    """Lets calls that do not fit a method's parameters raise `InputError`."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        _bind(signature, method.__name__, args, kwargs)
        return method(*args, **kwargs)

    return call


def _bind(
    signature: inspect.Signature, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name. Raises `InputError` if they do not fit the parameters."""
    known = [parameter for parameter in signature.parameters if parameter != "self"]
    for unknown in kwargs:
        if unknown not in known:
            near = difflib.get_close_matches(unknown, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise InputError(f"{unknown} is no parameter of {name}: {hint}")
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise InputError(f"{name}: {error}") from error
