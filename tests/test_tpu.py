"""The full size, compiled by the TPU compiler, which needs no TPU.

The tests show that the programs lower, compile and fit into the memory of v5e chips; they cannot
measure speed. The compiler is libtpu, which `pip install "jax[tpu]"` installs.
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
# Parameters without the codec, and the part that four chips split in two: all but the audio table,
# the projection and the heads. int8 does not change the tables.
PARAMETERS = {"none": 3.106e9, "int8": 1.952e9}
HALF_SPLIT = 3.106e9 - 2.694e9 / 2
# A row of the cache: keys and values, 16 layers, 8 heads of 64, 2048 positions, 2 bytes.
ROW = 2 * 16 * 8 * 64 * 2048 * 2
# MisoTTS 8B: parameters, those of the two tables, and those that a mesh does not split. A row of
# its cache has 32 layers and heads of 128.
MISO, MISO_TABLES, MISO_WHOLE = 8.188e9, 0.794e9, 0.381e9
MISO_ROW = 2 * 32 * 8 * 128 * 2048 * 2
# The codec's parameters, and its state for 32 rows.
CODEC_BYTES = 0.385e9 + 0.4e9


def compiled(program: str, *flags: str) -> dict:
    """Sizes of one program of the full-size model, compiled in a separate process."""
    command = [sys.executable, SCRIPT, "--tpu", *flags, "--programs", program]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


def assert_fits(figures: dict, parameters: float, cache: float) -> None:
    """Checks the size of the arguments, that the cache is updated in place, and that all fits."""
    arguments = figures["argument_bytes"]
    assert parameters + cache == pytest.approx(arguments, rel=0.01)
    assert figures["donated_bytes"] > cache
    assert arguments + figures["additional_bytes"] + CODEC_BYTES < CHIP_BYTES


@pytest.mark.long
@pytest.mark.parametrize("batch", [1, 32, 64])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_the_frame_loop_fits_one_chip_and_holds_its_cache_once(quantize, batch):
    figures = compiled("frame_loop", f"--quantize={quantize}", f"--batch={batch}")
    assert_fits(figures, PARAMETERS[quantize], batch * ROW)
    assert figures["additional_bytes"] < 0.3e9
    # Of weights or keys and values, a layer alone has more.
    assert figures["copied_bytes"] < batch * ROW / 32 / 2


@pytest.mark.long
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_prefill_fits_one_chip(quantize):
    """Its arguments are the parameters of the backbone."""
    figures = compiled("prefill", f"--quantize={quantize}", "--batch=32", "--prompt=512")
    assert figures["argument_bytes"] < PARAMETERS[quantize] + 32 * ROW
    assert figures["donated_bytes"] > 32 * ROW
    assert figures["additional_bytes"] < 0.5e9


@pytest.mark.long
@pytest.mark.parametrize("batch", [1, 32])
def test_a_codec_step_fits_one_chip(batch):
    """Its arguments are the parameters of the decoder."""
    figures = compiled("codec_step", f"--batch={batch}")
    assert figures["argument_bytes"] + figures["additional_bytes"] < CODEC_BYTES


@pytest.mark.long
@pytest.mark.parametrize("program", ["frame_loop", pytest.param("prefill", marks=pytest.mark.long)])
def test_four_chips_split_rows_and_weights(program):
    figures = compiled(program, "--topology=v5e:2x2", "--data=2", "--model=2", "--batch=32")
    if program == "frame_loop":
        assert_fits(figures, HALF_SPLIT, 32 * ROW / 4)
    assert figures["argument_bytes"] < HALF_SPLIT + 32 * ROW / 4 + 0.01e9


@pytest.mark.long
def test_four_chips_split_weights_of_int8():
    flags = "--topology=v5e:2x2", "--model=4", "--quantize=int8", "--batch=32"
    figures = compiled("frame_loop", *flags)
    assert figures["argument_bytes"] < 0.45 * (PARAMETERS["int8"] + 32 * ROW)
    assert figures["argument_bytes"] + figures["additional_bytes"] + CODEC_BYTES < CHIP_BYTES


@pytest.mark.long
def test_miso_8b_in_int8_fits_one_chip():
    figures = compiled("frame_loop", "--config=miso_8b", "--quantize=int8", "--batch=1")
    assert_fits(figures, MISO + MISO_TABLES, MISO_ROW)


@pytest.mark.long
def test_miso_8b_in_bfloat16_fits_four_chips():
    flags = "--topology=v5e:2x2", "--data=2", "--model=2", "--batch=8"
    figures = compiled("frame_loop", "--config=miso_8b", *flags)
    assert_fits(figures, 2 * (MISO_WHOLE + (MISO - MISO_WHOLE) / 2), 8 * MISO_ROW / 4)


@pytest.mark.long
def test_a_step_of_lora_training_fits_one_chip():
    """The step uses bfloat16 and rematerialization, with eight conversations of 1024 positions."""
    figures = compiled("train_step", "--lora_rank=16", "--batch=8", "--length=1024")
    assert figures["argument_bytes"] > PARAMETERS["none"]
    assert figures["argument_bytes"] + figures["additional_bytes"] + CODEC_BYTES < CHIP_BYTES


@pytest.mark.long
def test_a_step_of_full_training_fits_four_chips():
    """float32 parameters with two moments each are divided by four; the computation is bfloat16."""
    flags = "--topology=v5e:2x2", "--fsdp=4", "--batch=4", "--length=1024"
    figures = compiled("train_step", *flags)
    assert figures["argument_bytes"] == pytest.approx(3 * 2 * PARAMETERS["none"] / 4, rel=0.02)
    assert figures["argument_bytes"] + figures["additional_bytes"] + CODEC_BYTES < CHIP_BYTES
