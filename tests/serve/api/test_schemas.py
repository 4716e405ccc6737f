"""The options of requests, which several APIs and the page share."""

import re
from pathlib import Path

import csm_jax.serve
from csm_jax import Sampling
from csm_jax.cli.dataclass_flags import field_descriptions, field_types
from csm_jax.serve.api.schemas import Options

STATIC = Path(csm_jax.serve.__file__).with_name("static")


def test_the_apis_offer_every_field_of_sampling_but_these():
    """A temperature of 0 is greedy."""
    left_out = {"greedy", "depth_temperature", "depth_top_k"}
    assert field_types(Sampling).keys() - Options.model_fields.keys() == left_out


def test_fields_of_sampling_are_described_as_in_the_library():
    properties = Options.model_json_schema()["properties"]
    for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
        assert properties[name]["description"] == field_descriptions(Sampling)[name]


def test_options_that_are_left_out_are_the_defaults_of_the_server():
    default = Sampling(0.5, 7, 0.9, 0.1, 1.2, depth_temperature=0.6, depth_top_k=3)
    assert Options().sampling(default) == default
    assert Options.of(default).sampling(Sampling()) == Sampling(0.5, 7, 0.9, 0.1, 1.2)


def test_the_page_has_a_setting_for_every_option():
    text = (STATIC / "settings.js").read_text(encoding="utf-8")
    assert re.findall(r'^    name: "(\w+)"', text, re.MULTILINE) == list(Options.model_fields)
