"""The full size through the real TPU compiler, which needs no TPU.

What passes here lowers, compiles and fits into the memory of a v5e chip; how fast it is, only a
TPU can tell. The compiler is libtpu, which `pip install "jax[tpu]"` brings.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.tpu_compiler,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason='libtpu, the TPU compiler, is not installed: pip install "jax[tpu]"',
    ),
]

SCRIPT = Path(__file__).parents[1] / "examples" / "compile_full_size.py"
CHIP_BYTES = 16e9
# Of the codec: its parameters, and its state and temporaries for 32 rows.
CODEC_BYTES = 0.32e9 + 0.5e9
FOUR_CHIPS = "--topology=v5e:2x2"


def figures(program: str, *flags: str) -> dict:
    """Compiles one program of the full-size model, in a process of its own."""
    command = [sys.executable, SCRIPT, "--tpu", *flags, "--programs", program]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


def assert_fits(figures: dict, parameters: float, cache: float) -> None:
    """Parameters and caches take what they should, the caches are not copied on the way out, and
    there is room for all and the codec in a chip."""
    arguments = figures["argument_bytes"]
    assert parameters + cache < arguments < 1.02 * (parameters + cache) + 0.01e9
    assert figures["donated_bytes"] > cache
    assert arguments + figures["additional_bytes"] + CODEC_BYTES < CHIP_BYTES


# A row of 2048 positions: 16 layers, 8 heads of 64, keys and values, 2 bytes each.
ROW = 16 * 2 * 8 * 64 * 2048 * 2
# Without the codec; int8 leaves the embeddings (0.80 GB) as they are.
BFLOAT16, INT8 = 3.106e9, 1.96e9
