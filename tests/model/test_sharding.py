"""Sharding by the table and its rule. `eight_devices.py` tests the effect."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from csm_jax.checkpoints.native_format import flatten, param_shapes
from csm_jax.config import csm_1b, tiny
from csm_jax.errors import InputError
from csm_jax.inference.decode_step import init_state
from csm_jax.model.precision import FLOAT32, Precision
from csm_jax.model.sharding import (
    TABLE,
    check_rows,
    make_mesh,
    param_sharding,
    rows_are_divided,
    state_sharding,
    traced_for,
)

BFLOAT16 = Precision(jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16))
INT8 = dataclasses.replace(BFLOAT16, int8=True)
LAYER = "csm/backbone/layers/0"


def mesh_of(data: int, model: int) -> AbstractMesh:
    """A mesh without devices, since this process has only one."""
    return AbstractMesh((data, model), ("data", "model"))


def specs(config, precision, mesh) -> dict[str, P]:
    shapes = flatten(param_shapes(config, precision))
    model = {path: leaf for path, leaf in shapes.items() if path.startswith("csm/")}
    return {path: param_sharding(path, s.shape, config, mesh).spec for path, s in model.items()}


def state_specs(config, batch: int, mesh):
    shapes = jax.eval_shape(
        lambda: init_state(config=config, batch=batch, max_seq_len=64, dtype=jnp.dtype(jnp.float32))
    )
    return jax.tree.map(lambda sharding: sharding.spec, state_sharding(shapes, mesh))


@pytest.mark.parametrize("precision", [FLOAT32, INT8], ids=["plain", "int8"])
@pytest.mark.parametrize("config", [csm_1b(), tiny()], ids=["csm_1b", "tiny"])
def test_every_parameter_is_in_the_table_once(config, precision):
    for path in flatten(param_shapes(config, precision)):
        assert sum(re.fullmatch(pattern, path) is not None for pattern, _ in TABLE) == 1, path


def test_every_row_of_the_table_is_used():
    paths = flatten(param_shapes(csm_1b(), INT8))
    for pattern, _ in TABLE:
        assert any(re.fullmatch(pattern, path) for path in paths), pattern


def test_a_parameter_missing_from_the_table_is_an_error():
    with pytest.raises(ValueError, match="unpack"):
        param_sharding("csm/new/weight", (4, 4), csm_1b(), mesh_of(1, 2))


@pytest.mark.parametrize("precision", [FLOAT32, INT8], ids=["plain", "int8"])
def test_dimensions_that_an_axis_divides_are_split(precision):
    got = specs(csm_1b(), precision, mesh_of(2, 2))
    assert got[f"{LAYER}/attn/qkv/weight"] == P("model")
    assert got[f"{LAYER}/attn/o/weight"] == P(None, "model")
    assert got[f"{LAYER}/mlp/gate/weight"] == got[f"{LAYER}/mlp/up/weight"] == P("model")
    assert got[f"{LAYER}/mlp/down/weight"] == P(None, "model")
    assert got["csm/text_embedding"] == P("model")
    for path, spec in got.items():
        if "norm" in path or "heads" in path or "audio_embedding" in path:
            assert spec == P(), path
        if path.endswith("weight_scale"):
            rows = got[path.removesuffix("_scale")][:1]
            assert tuple(axis for axis in spec if axis) == tuple(axis for axis in rows if axis)


def test_query_heads_of_a_kv_head_stay_together():
    """4 divides the rows of the depth decoder's qkv and the columns of o, but not 2 kv heads."""
    config = csm_1b()
    got = specs(config, FLOAT32, mesh_of(1, 4))
    depth = "csm/depth_decoder/layers/0"
    assert got[f"{LAYER}/attn/qkv/weight"] == P("model")
    assert not any(got[f"{depth}/attn/qkv/weight"] + got[f"{depth}/attn/o/weight"])
    assert got[f"{depth}/mlp/down/weight"] == P(None, "model")


def test_dimensions_that_an_axis_does_not_divide_are_replicated():
    assert not any(axis for spec in specs(tiny(), INT8, mesh_of(1, 9)).values() for axis in spec)
    got = specs(tiny(), INT8, mesh_of(1, 4))  # 2 kv heads, 263 words, MLPs of 80 and 56
    assert {path for path, spec in got.items() if any(spec)} == {p for p in got if "/mlp/" in p} - {
        path for path in got if path.endswith("down/weight_scale")
    }


@pytest.mark.parametrize(("model", "share"), [(1, 1.0), (2, 0.57), (4, 0.36), (8, 0.25)])
def test_a_device_holds_its_share_of_the_full_size(model, share):
    mesh, config = mesh_of(1, model), csm_1b()
    shapes = flatten({"csm": param_shapes(config, BFLOAT16)["csm"]})
    sizes = {path: (leaf, leaf.dtype.itemsize) for path, leaf in shapes.items()}
    held = sum(
        width * np.prod(param_sharding(path, leaf.shape, config, mesh).shard_shape(leaf.shape))
        for path, (leaf, width) in sizes.items()
    )
    total = sum(width * leaf.size for leaf, width in sizes.values())
    assert share - 0.01 < held / total <= share


def test_the_state_is_split_by_rows_over_data_and_by_kv_heads_over_model():
    got = state_specs(csm_1b(), 8, mesh_of(4, 2))
    assert set(jax.tree.leaves(got.cache.layers)) == {P("data", "model")}
    rest = got._replace(cache=got.cache._replace(layers=()))
    assert set(jax.tree.leaves(rest)) == {P("data")}


def test_a_batch_of_one_row_is_replicated():
    got = state_specs(tiny(), 1, mesh_of(4, 8))
    assert not any(axis for spec in jax.tree.leaves(got) for axis in spec)


@pytest.mark.parametrize(("data", "divided"), [(1, False), (2, True)])
def test_rows_are_divided_by_the_data_axis_alone(data, divided):
    with traced_for(mesh_of(data, 2)):
        assert rows_are_divided() is divided
    assert not rows_are_divided()
    with traced_for(None):
        assert not rows_are_divided()


def test_the_codec_has_no_sharding():
    shape = flatten(param_shapes(tiny()))["codec/upsample/weight"].shape
    assert param_sharding("codec/upsample/weight", shape, tiny(), mesh_of(2, 2)) is None


@pytest.mark.parametrize(("data", "model"), [(0, 1), (1, 0), (1000, 2)])
def test_a_mesh_of_more_devices_than_exist_is_an_error(data, model):
    with pytest.raises(InputError, match=f"a mesh of {data} x {model} needs {data * model} device"):
        make_mesh(data, model)


def test_a_batch_that_the_data_axis_does_not_divide_is_an_error():
    for size in (1, 4, 8):
        check_rows(size, mesh_of(4, 1))
    check_rows(7, None)
    with pytest.raises(InputError, match=r"7 rows .* data axis of 4: choose a batch of 8"):
        check_rows(7, mesh_of(4, 1))


@pytest.mark.long
def test_eight_devices_give_the_codes_of_one():
    """The number of CPU devices is fixed at the start of a process, so the tests run in another."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    file = Path(__file__).with_name("eight_devices.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(file)]
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
