"""CSM-1B, Sesame's conversational speech model, in JAX."""

from csm_jax.config import CSMConfig, csm_1b, tiny
from csm_jax.errors import CheckpointError, CSMError, InputError, OutputError
from csm_jax.generator import Generator, load
from csm_jax.mimi.codec import Codec
from csm_jax.prompt import Segment
from csm_jax.sampling import Sampling

__all__ = [
    "CSMConfig",
    "CSMError",
    "CheckpointError",
    "Codec",
    "Generator",
    "InputError",
    "OutputError",
    "Sampling",
    "Segment",
    "csm_1b",
    "load",
    "tiny",
]
