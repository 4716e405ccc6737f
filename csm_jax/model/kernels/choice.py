"""Which kernels compute steps of one position: XLA's, or fused ones in Pallas (Triton)."""

import logging

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from csm_jax.config import CSMConfig
from csm_jax.errors import InputError
from csm_jax.model.csm import CSM, bind
from csm_jax.model.layers import Params
from csm_jax.model.precision import Device, Precision

XLA, PALLAS = "xla", "pallas"
KERNELS = (XLA, PALLAS)

# The first compute capability with products of bfloat16 (Ampere).
_LEAST_CAPABILITY = 8.0

logger = logging.getLogger("csm_jax")


def choose(kernels: str, precision: Precision, mesh: Mesh | None = None) -> str:
    """The kernels that a model runs in: XLA's where the fused ones do not apply, with a warning.

    Args:
      precision, mesh: of the model.

    Raises:
      InputError: there are no such kernels.
    """
    if kernels not in KERNELS:
        raise InputError(f"kernels is {kernels}, but must be {' or '.join(KERNELS)}")
    if kernels == PALLAS and (reason := _obstacle(precision, mesh)):
        logger.warning("kernels=%s: %s, so XLA's kernels are used", PALLAS, reason)
        return XLA
    return kernels


def _obstacle(precision: Precision, mesh: Mesh | None) -> str | None:
    """Why the fused kernels do not apply, if they do not."""
    device: Device = mesh.devices.flat[0] if mesh else jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or not capability[:1].isdigit():
        return f"the device is {device.device_kind} and no CUDA GPU"
    if float(capability) < _LEAST_CAPABILITY:
        return f"the compute capability is {capability}, and below {_LEAST_CAPABILITY}"
    if mesh and mesh.size > 1:
        return f"the model is on {mesh.size} devices, and the kernels run on one"
    if precision.activations != jnp.bfloat16:
        return f"the model is computed in {precision.activations}, and the kernels in bfloat16"
    return None


def bind_to_kernels(config: CSMConfig, params: Params, kernels: str) -> CSM:
    """Like `csm.bind`, a model whose steps of one position run in these kernels."""
    if kernels == XLA:
        return bind(config, params)
    # Pallas takes as long to import as the rest of the package.
    from csm_jax.model.kernels.fused import FusedCSM

    return bind(config, params, FusedCSM)
