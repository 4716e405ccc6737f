"""Audio formats of responses."""

from typing import get_args

from csm_jax.serve.audio.encoding import FORMATS, FormatName


def test_the_type_of_format_names_lists_all_formats():
    assert get_args(FormatName) == tuple(FORMATS)
