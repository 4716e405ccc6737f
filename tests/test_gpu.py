"""The programs, compiled by XLA's GPU compiler, which needs no GPU.

The tests show that they lower and compile, and hold the number of kernels, which decides the speed
at small batches; they cannot measure speed.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from ahead_of_time import weights_of_a_frame

import csm_jax
from csm_jax.config import CSMConfig, tiny
from csm_jax.model.precision import Precision


def compiler_is_installed() -> bool:
    plugins = importlib.util.find_spec("jax_plugins")
    return plugins is not None and importlib.util.find_spec("jax_plugins.xla_cuda12") is not None


pytestmark = [
    pytest.mark.gpu_compiler,
    pytest.mark.skipif(
        not compiler_is_installed(),
        reason='the GPU compiler is not installed: pip install "jax[cuda12]"',
    ),
]

SCRIPT = Path(__file__).parents[1] / "examples" / "compile_full_size.py"
# A row of the cache: keys and values, 16 layers, 8 heads of 64, 2048 positions, 2 bytes.
ROW = 2 * 16 * 8 * 64 * 2048 * 2


def compiled(program: str, *flags: str) -> dict:
    """Figures of one program, compiled in a separate process."""
    command = [sys.executable, SCRIPT, "--programs", program, *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


def weights(config: CSMConfig, quantize: str) -> int:
    """Bytes of the weights that a frame multiplies with."""
    bfloat16 = jnp.dtype("bfloat16")
    return weights_of_a_frame(config, Precision(bfloat16, bfloat16, quantize == "int8"))


@pytest.mark.parametrize(
    ("quantize", "kernels"),
    [("none", 193), pytest.param("int8", 198, marks=pytest.mark.long)],
)
def test_a_frame_launches_no_more_kernels(quantize, kernels):
    """One more in a step of the depth decoder would be five more here, and 30 at full size."""
    flags = "--gpu=h100", "--config=tiny", "--max_seq_len=64", f"--quantize={quantize}"
    figures = compiled("frame_loop", *flags)
    assert figures["kernels"] < kernels + 5
    assert figures["bytes"] > weights(tiny(), quantize)


def test_a_frame_of_fused_kernels_compiles():
    flags = "--gpu=h100", "--config=tiny", "--max_seq_len=80", "--kernels=pallas", "--batch=3"
    figures = compiled("frame_loop", *flags)
    assert figures["kernels"] < 130
    assert figures["bytes"] > weights_of_a_frame(tiny(), "none")


@pytest.mark.long
@pytest.mark.parametrize(
    ("quantize", "batch", "kernels"),
    [
        ("none", 1, 698),
        ("none", 8, 821),
        ("none", 32, 823),
        ("int8", 1, 698),
        ("int8", 8, 821),
        ("int8", 32, 823),
    ],
)
def test_a_frame_of_fused_kernels_of_the_full_size(quantize, batch, kernels):
    """Of few kernels, whose arithmetic no test can time."""
    flags = "--gpu=h100", f"--quantize={quantize}", f"--batch={batch}", "--kernels=pallas"
    figures = compiled("frame_loop", *flags)
    assert figures["kernels"] <= kernels + 5
    weights = weights_of_a_frame(csm_jax.csm_1b(), quantize)
    assert weights < figures["bytes"] < 1.05 * weights + batch * 2 * ROW


@pytest.mark.long
@pytest.mark.parametrize(
    ("quantize", "batch", "kernels"),
    [("none", 1, 1740), ("none", 32, 2388), ("int8", 1, 1756), ("int8", 32, 2413)],
)
def test_a_frame_of_the_full_size(quantize, batch, kernels):
    """It reads its weights once a step, and beside them little but the cache."""
    flags = "--gpu=h100", f"--quantize={quantize}", f"--batch={batch}"
    figures = compiled("frame_loop", *flags)
    assert figures["kernels"] < kernels + 30
    read = weights(csm_jax.csm_1b(), quantize)
    assert read < figures["bytes"] < 1.1 * read + batch * 3 * ROW


@pytest.mark.long
@pytest.mark.parametrize("card", ["h200", "a100", "l4", "t4"])
def test_every_card_has_a_compiler(card):
    flags = f"--gpu={card}", "--config=tiny", "--max_seq_len=64", "--dtype=float16"
    assert compiled("frame_loop", *flags)["kernels"] > 100
