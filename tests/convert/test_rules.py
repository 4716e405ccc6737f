"""The conversion engine with a small table, and every real table in both directions."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import TABLES, assert_same_params, layout, params, section, shapes, written

from csm_jax.config import tiny
from csm_jax.convert import csm
from csm_jax.convert.csm import to_halves
from csm_jax.convert.mimi import fused_qkv
from csm_jax.convert.rules import (
    MAX_PROBLEMS,
    Rule,
    Table,
    Transform,
    convert,
    invert,
    one_to_one,
    plan,
)
from csm_jax.errors import CheckpointError
from csm_jax.model.layers import apply_rope, rope_frequencies

HALVED = Transform(lambda total, count: (total / count,), lambda mean: (mean, mean * 0 + 1))
TRANSPOSED = one_to_one(lambda w: w.swapaxes(0, 1), lambda w: w.swapaxes(0, 1))
TABLE = Table(
    "small",
    (
        Rule("layers.{i}.w", "layer/{i}/weight", TRANSPOSED),
        Rule(("total", "count"), "mean", HALVED),
        Rule(("here.tied", "there.tied"), "tied", alternatives=True),
    ),
    ignore=("buffers.{i}",),
)


class Source(dict):
    """Tensors in memory that record which of them were read."""

    name = "file"

    def __init__(self, tensors):
        super().__init__(tensors)
        self.was_read = []

    @property
    def shapes(self):
        return {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in self.items()}

    def read(self, key):
        self.was_read.append(key)
        return self[key]


def good() -> dict[str, np.ndarray]:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    return {
        "layers.0.w": array,
        "layers.10.w": array + 1,
        "total": array,
        "count": array * 0 + 2,
        "here.tied": array[0],
        "buffers.3": np.zeros(9),
    }


def targets() -> dict[str, jax.ShapeDtypeStruct]:
    wanted = {"layer/0/weight": (3, 2), "layer/10/weight": (3, 2), "mean": (2, 3), "tied": (3,)}
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in wanted.items()}


def run(tensors, table=TABLE):
    return dict(convert(table, Source(tensors), targets()))


def failure(tensors, table=TABLE) -> str:
    source = Source(tensors)
    with pytest.raises(CheckpointError) as caught:
        convert(table, source, targets())
    assert source.was_read == [], "tensors were read before all was checked"
    return str(caught.value)


def test_every_tensor_is_converted():
    got, tensors = run(good()), good()
    np.testing.assert_array_equal(got["layer/0/weight"], tensors["layers.0.w"].T)
    np.testing.assert_array_equal(got["layer/10/weight"], tensors["layers.10.w"].T)
    np.testing.assert_array_equal(got["mean"], tensors["total"] / 2)
    np.testing.assert_array_equal(got["tied"], tensors["here.tied"])
    assert got.keys() == targets().keys()


@pytest.mark.parametrize(
    "name",
    [
        "more",
        "layers.0.w.more",  # only full matches count
        "more.layers.0.w",
        "layers_0_w",  # a dot is a literal
        "layers.x.w",
        "layers.7.w",  # a layer that the config does not have
        "buffers.3.w",
    ],
)
def test_an_unexpected_tensor_is_an_error_that_names_it(name):
    assert f"unexpected tensor {name}" in failure(good() | {name: good()["layers.0.w"]})


@pytest.mark.parametrize("name", ["layers.0.w", "layers.10.w", "total", "count", "here.tied"])
def test_a_missing_tensor_is_an_error_that_names_it(name):
    tensors = good()
    del tensors[name]
    assert f"missing tensor {name}" in failure(tensors)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("layers.0.w", (3, 2), (2, 3)),
        ("layers.10.w", (6,), (2, 3)),
        ("count", (2, 4), (2, 3)),
        ("here.tied", (4,), (3,)),
    ],
)
def test_a_tensor_of_another_shape_is_an_error_with_both_shapes(name, shape, wanted):
    message = failure(good() | {name: np.zeros(shape, np.float32)})
    assert f"{name} is {list(shape)} but the config wants {list(wanted)}" in message


def test_the_expected_shape_in_an_error_is_that_of_the_source_tensor():
    """The transform splits the tensor into three parameters of other shapes."""
    table = Table("fused", (Rule(("qkv", "in_proj"), ("q", "k", "v"), fused_qkv(2), True),))
    wanted = {path: jax.ShapeDtypeStruct((4, 4), jnp.float32) for path in "qkv"}
    with pytest.raises(CheckpointError, match=r"qkv is \[12, 6\] but the config wants \[12, 4\]"):
        plan(table, Source({"qkv": np.zeros((12, 6), np.float32)}), wanted)


def test_all_problems_are_in_one_error():
    tensors = good() | {"more": np.zeros(1), "layers.0.w": np.zeros((5, 5), np.float32)}
    del tensors["here.tied"]
    message = failure(tensors)
    for part in ("file", "small", "unexpected tensor more", "missing tensor here.tied", "[5, 5]"):
        assert part in message


def test_problems_beyond_the_limit_are_counted():
    extra = {f"more.{i}": np.zeros(1) for i in range(MAX_PROBLEMS + 3)}
    message = failure(good() | extra)
    assert message.count("unexpected tensor") == MAX_PROBLEMS
    assert message.endswith("and 3 more")


def test_a_tensor_that_two_rules_match_is_an_error():
    twice = Table("twice", (*TABLE.rules, Rule("layers.0.w", "unused")))
    assert "ambiguous tensor layers.0.w" in failure(good(), twice)


@pytest.mark.parametrize(("rules", "count"), [((), 0), ((Rule("a", "x"), Rule("b", "x")), 2)])
def test_a_parameter_without_exactly_one_rule_is_an_error(rules, count):
    table, wanted = Table("wrong", rules), {"x": jax.ShapeDtypeStruct((1,), jnp.float32)}
    source = Source({rule.sources: np.zeros(1, np.float32) for rule in rules})
    with pytest.raises(CheckpointError, match=f"{count} rules make parameter x"):
        plan(table, source, wanted)


@pytest.mark.parametrize("names", [("here.tied",), ("there.tied",), ("here.tied", "there.tied")])
def test_tied_tensors_may_be_stored_once_or_twice(names):
    tensors = good()
    tied = tensors.pop("here.tied")
    got = run(tensors | {name: tied.copy() for name in names})
    np.testing.assert_array_equal(got["tied"], tied)


def test_tied_tensors_must_be_equal():
    tensors = good()
    tensors["there.tied"] = tensors["here.tied"] + 1
    with pytest.raises(CheckpointError, match=r"there\.tied and here\.tied .* values differ"):
        run(tensors)


def test_the_shape_of_both_tied_tensors_is_checked():
    message = failure(good() | {"there.tied": np.zeros(4, np.float32)})
    assert "there.tied is [4] but the config wants [3]" in message


def test_tensors_are_read_one_at_a_time():
    source = Source(good())
    pairs = convert(TABLE, source, targets())
    assert source.was_read == []
    path, _ = next(pairs)
    assert (path, source.was_read) == ("layer/0/weight", ["layers.0.w"])
    for _ in pairs:
        pass
    assert sorted(source.was_read) == sorted(targets_sources())


def targets_sources() -> list[str]:
    return [name for name in good() if not name.startswith("buffers")]


def test_a_table_with_prefixes_converts_prefixed_names():
    prefixed = TABLE.prefixed("theirs.", "ours/")
    wanted = {f"ours/{path}": shape for path, shape in targets().items()}
    got = dict(convert(prefixed, Source({f"theirs.{n}": t for n, t in good().items()}), wanted))
    assert_same_params(section("ours/", got), run(good()))


def test_the_inverse_writes_the_first_of_tied_names():
    got = {name: make() for name, make in invert(TABLE, targets(), run(good()).__getitem__)}
    assert got.keys() == {"layers.0.w", "layers.10.w", "total", "count", "here.tied"}
    np.testing.assert_array_equal(got["layers.10.w"], good()["layers.10.w"])
    np.testing.assert_array_equal(got["total"] / got["count"], good()["total"] / 2)


@pytest.mark.parametrize("name", TABLES)
def test_converting_a_layout_and_back_gives_equal_tensors(name):
    """All values differ, so a tensor that is dropped, swapped or transposed shows."""
    prefix, table = TABLES[name]
    rng = np.random.default_rng(0)
    tensors = {
        key: rng.standard_normal(tensor.shape, np.float32) for key, tensor in layout(name).items()
    }
    for key in tensors:  # sums of codebook entries are divided by their usage
        if key.endswith(("cluster_usage", "initialized")):
            tensors[key] = np.ones_like(tensors[key])
    wanted = section(prefix, shapes())
    converted = {p: np.asarray(t) for p, t in convert(table, Source(tensors), wanted)}
    assert {path: t.shape for path, t in converted.items()} == {
        path: shape.shape for path, shape in wanted.items()
    }
    assert_same_params(written(table, converted), tensors)


@pytest.mark.parametrize("name", TABLES)
def test_writing_a_layout_and_converting_it_gives_equal_parameters(name):
    prefix, table = TABLES[name]
    got = dict(convert(table, Source(layout(name)), section(prefix, shapes())))
    assert_same_params(got, section(prefix, params()))


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_tensor_of_any_kind_is_an_error_in_every_layout(name):
    prefix, table = TABLES[name]
    tensors, wanted = layout(name), section(prefix, shapes())
    kinds = {re.sub(r"\d+", "0", key): key for key in tensors}
    for key in kinds.values():
        rest = {k: t for k, t in tensors.items() if k != key}
        with pytest.raises(CheckpointError) as caught:
            plan(table, Source(rest), wanted)
        assert f"missing tensor {key}" in str(caught.value)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 2), (6, 8), (2, 6)])
def test_rotating_adjacent_pairs_equals_rotating_halves_of_reordered_rows(num_heads, head_dim):
    """RoPE of torchtune and moshi on their rows, as complex numbers, against csm_jax's."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((num_heads * head_dim, 5), np.float32)
    inputs = rng.standard_normal((7, 5), np.float32)
    frequencies = rope_frequencies(head_dim, 100.0)

    projected = (inputs @ weight.T).reshape(7, num_heads, head_dim // 2, 2)
    angles = np.arange(7)[:, None, None] * frequencies
    theirs = (projected[..., 0] + 1j * projected[..., 1]) * np.exp(1j * angles)

    reordered = to_halves(weight, num_heads)
    ours = (inputs @ reordered.T).reshape(1, 7, num_heads, head_dim)
    rotated = apply_rope(jnp.asarray(ours), jnp.arange(7)[None], frequencies)[0]
    left, right = np.split(np.asarray(rotated), 2, axis=-1)
    np.testing.assert_allclose(left + 1j * right, theirs, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_queries_keys_and_values_are_grouped_by_kv_heads(interleaved):
    """2 kv heads have 3 queries each, and a head has 4 rows; the values number the rows."""
    config = dataclasses.replace(tiny().backbone, head_dim=4)
    sizes = {"q": 6, "k": 2, "v": 2}
    rows = {
        name: [f"{name}{head}.{row}" for head in range(count) for row in range(4)]
        for name, count in sizes.items()
    }
    number = {row: i for i, row in enumerate(itertools.chain(*rows.values()))}
    weights = [np.array([[number[row]] * 5 for row in rows[name]]) for name in "qkv"]
    fuse = csm.fused_qkv(config, interleaved)
    (fused,) = fuse.forward(*weights)
    rotated = (0, 2, 1, 3) if interleaved else (0, 1, 2, 3)
    heads = [("q0", "q1", "q2", "k0", "v0"), ("q3", "q4", "q5", "k1", "v1")]
    expected = [
        f"{head}.{row}"
        for head in itertools.chain(*heads)
        for row in (range(4) if head.startswith("v") else rotated)
    ]
    np.testing.assert_array_equal(fused, np.array([[number[row]] * 5 for row in expected]))
    for back, weight in zip(fuse.inverse(fused), weights, strict=True):
        np.testing.assert_array_equal(back, weight)
