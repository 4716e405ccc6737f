"""Files that are something else than their name says are told as what they are."""

import pytest

from csm_jax.io import contents


@pytest.mark.parametrize(
    ("content", "what"),
    [
        # As in the specification of Git LFS.
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs"),
        (b"<!DOCTYPE html>\n<html>", "web page"),
        (b"\xef\xbb\xbf\n<HTML>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "web page"),
        (b"GGUF\3\0\0\0", "GGUF"),
    ],
)
def test_files_that_are_something_else_are_named(tmp_path, content, what):
    (tmp_path / "file").write_bytes(content)
    assert what in contents.explain(RuntimeError("header too large"), tmp_path / "file")


@pytest.mark.parametrize("text", [b"GGUF is a format.", b"<?xml version='1.0'?><speak>Hi</speak>"])
def test_texts_that_only_look_like_it_are_not(text):
    assert contents.mistaken_content(text) is None


def test_other_files_have_the_error_of_their_library(tmp_path):
    (tmp_path / "file").write_bytes(b"{}")
    for path in (tmp_path / "file", tmp_path / "gone"):
        assert contents.explain(RuntimeError("one\ntwo"), path) == "one"
