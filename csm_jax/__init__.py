"""CSM-1B, Sesame's conversational speech model, in JAX."""

from csm_jax.config import CSMConfig, csm_1b, miso_8b, tiny
from csm_jax.errors import (
    CancelledError,
    CheckpointError,
    CSMError,
    EngineClosedError,
    InputError,
    OutputError,
    QueueFullError,
    RequestCancelledError,
)
from csm_jax.inference.alignment.words import Word
from csm_jax.inference.conversation import Conversation
from csm_jax.inference.engine import Engine, Ticket
from csm_jax.inference.generator import Generator, load
from csm_jax.inference.interventions import (
    Guidance,
    HeadOutput,
    Interventions,
    LogitsFunction,
    Steering,
)
from csm_jax.inference.request import Notice, Request
from csm_jax.inference.scores import Score
from csm_jax.inference.speech import Speech
from csm_jax.inference.states import NamedArray, States
from csm_jax.inference.take import Take, rank_take
from csm_jax.inference.voice import Voice
from csm_jax.mimi.codec import Codec
from csm_jax.model.logits_functions import CodeStep
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.normalizing import normalize_text
from csm_jax.prompt.turns import Segment

__all__ = [
    "CSMConfig",
    "CSMError",
    "CancelledError",
    "CheckpointError",
    "CodeStep",
    "Codec",
    "Conversation",
    "Engine",
    "EngineClosedError",
    "Generator",
    "Guidance",
    "HeadOutput",
    "InputError",
    "Interventions",
    "LogitsFunction",
    "NamedArray",
    "Notice",
    "OutputError",
    "QueueFullError",
    "Request",
    "RequestCancelledError",
    "Sampling",
    "Score",
    "Segment",
    "Speech",
    "States",
    "Steering",
    "Take",
    "Ticket",
    "Voice",
    "Word",
    "csm_1b",
    "load",
    "miso_8b",
    "normalize_text",
    "rank_take",
    "tiny",
]
