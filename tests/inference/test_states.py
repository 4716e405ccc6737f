"""States of the bundled checkpoint's speech; their numbers are compared in `tests/reference`."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")
import attention_map

import csm_jax

TEXT = "three one four"


@pytest.fixture(scope="module")
def demo():
    return csm_jax.load("demo", dtype="float32")


def test_the_alignment_head_goes_forward_through_the_text(demo):
    codes = demo.generate_codes(TEXT, seed=1)
    ((layer, head),) = demo.alignment.heads
    states = demo.states(TEXT, codes, backbone_attention=[layer])
    text = slice(states.start - states.num_text, states.start)
    weights = states.backbone_attention.values[0, head, states.start - 1 : -2, text]
    centers = weights @ np.arange(states.num_text) / weights.sum(axis=-1)
    assert len(centers) == len(codes)
    assert np.corrcoef(centers, np.arange(len(codes)))[0, 1] > 0.9


def test_the_example_draws_a_picture(tmp_path, capsys):
    out = tmp_path / "attention.png"
    attention_map.main([f"--text={TEXT}", "--seed=1", f"--out={out}"])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "frames" in capsys.readouterr().out
