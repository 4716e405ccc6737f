"""Interventions: what a caller changes while speech is generated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from csm_jax.model.logits_functions import Call

GUIDED = ("text", "context")
STACKS = ("backbone", "depth_decoder")


@dataclass(frozen=True, eq=False)
class Steering:
    """A vector that is added to what a layer passes on (activation steering).

    It is added at every frame: in the backbone from the last position of the prompt on, so that the
    context and the text are processed without it; in the depth decoder at all of its positions.

    Attributes:
      layer: counted from 1, as in `States.backbone`; of the last one before the final norm.
      vector: float [D], such as the difference of the mean states of two kinds of speech.
      strength: how many times the vector is added; 0 changes nothing, negative ones subtract it.
        float, or float [R] for the frames of the speech, of which the last one goes on.
      stack: "backbone" or "depth_decoder".
    """

    layer: int
    vector: np.ndarray
    strength: float | np.ndarray = 1.0
    stack: str = "backbone"


@dataclass(frozen=True, eq=False)
class HeadOutput:
    """An attention head whose output is replaced, before the output projection of its layer.

    It is replaced at the positions at which a `Steering` of the stack is added.

    Attributes:
      layer, head: counted from 0, as in `States.backbone_attention`.
      output: float [H], such as the mean over other speech; None is zeros.
      stack: "backbone" or "depth_decoder".
    """

    layer: int
    head: int
    output: np.ndarray | None = None
    stack: str = "backbone"


@dataclass(frozen=True, eq=False)
class Guidance:
    """Classifier-free guidance: codes are drawn from the logits of two prompts.

    They are unconditional + scale * (conditional - unconditional), where the conditional prompt is
    that of the request, and the unconditional one lacks its text or its context (Ho and Salimans,
    2022). Repetition penalty, temperature and filters come after. The same frames follow both.

    Attributes:
      scale: 1 is the plain distribution, 0 the unconditional one, and above 1 the request counts
        for more. float, or float [R] for the frames of the speech, of which the last one goes on.
      over: "text" leaves the words of the text out, and keeps the tag of its speaker; "context"
        leaves out all turns before, and the parts before of a long text.
      depth_decoder: whether codebooks 1 and up are guided too, or codebook 0 alone.
    """

    scale: float | np.ndarray
    over: str = "text"
    depth_decoder: bool = True


@dataclass(frozen=True, eq=False)
class LogitsFunction:
    """A function that changes logits, compiled into the frame loop.

        def ban(logits, state, step):
            return logits.at[7].set(-jnp.inf), state

    It is pure, of one row, and written in `jax.numpy`: `function(logits, state, step)` returns
    logits and state of the same shapes and types. Logits are float32 [V], after guidance and before
    repetition penalty, temperature and filters; -inf excludes an id. `step` is a `CodeStep`: frame,
    codebook, the codes of this frame so far and those of the frame before.

    A function object is compiled once, so define it once, and give what differs between requests as
    its state.

    Attributes:
      function: as above.
      state: arrays and numbers in any pytree, at the beginning of each part of a text. It goes from
        frame to frame, and in the depth decoder from codebook to codebook too. With a state the
        guard is off, since it could not go back to an earlier one.
    """

    function: Call
    state: Any = ()


@dataclass(frozen=True, eq=False)
class Interventions:
    """What is changed in the frames of a request; None of everything changes nothing.

    Attributes:
      forced: int [R, Q], codes that are given instead of drawn, frame by frame from the first on;
        -1 is drawn. Whole frames are continued, single codebooks or frames are filled in. Speech
        does not end before the last given code, unless that is in a frame of zeros at the end,
        which ends it there. The text must be short enough for one part, and have no pauses; the
        guard is off.
      steering: vectors that are added; those of one layer add up.
      guidance: of text or context.
      heads: attention heads whose outputs are replaced.
      logits: a function of the logits of codebook 0.
      depth_logits: a function of those of the other codebooks.
    """

    forced: np.ndarray | None = None
    steering: Sequence[Steering] = ()
    guidance: Guidance | None = None
    heads: Sequence[HeadOutput] = ()
    logits: LogitsFunction | None = None
    depth_logits: LogitsFunction | None = None


NO_CHANGE = Interventions()
