"""Text files of users: a byte order mark is no part of the text; other encodings are one line."""

import codecs
import json

import pytest

from csm_jax.cli.manifest import read_manifest
from csm_jax.errors import InputError
from csm_jax.inference.request import Request
from csm_jax.io.script import read_script
from csm_jax.io.text import read_text
from csm_jax.serve.__main__ import _keys
from csm_jax.serve.admission.api_keys import read_keys
from csm_jax.train.data import read_conversations

TURN = {"speaker": 0, "text": "Grüß dich.", "audio": "a.wav"}


@pytest.mark.parametrize("text", ["", "a", "ä\r\nb\u2028", "\ufeff"])
def test_a_byte_order_mark_at_the_start_is_left_out(tmp_path, text):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + text.encode())
    assert read_text(tmp_path / "a.txt") == text
    (tmp_path / "b.txt").write_bytes(text.removeprefix("\ufeff").encode())
    assert read_text(tmp_path / "b.txt") == text.removeprefix("\ufeff")


def read_lines(path):
    return [line.request.text for line in read_manifest(path, Request("?"))]


def read_training(path):
    conversations, problems = read_conversations(path)
    assert not problems
    return [conversation.turns[0].text for conversation in conversations]


def read_turns(path):
    return [turn.text for turn in read_script(path)]


def read_key_lines(path):
    class Values:
        api_keys_file = str(path)

    return list(_keys(Values()))  # pyright: ignore


READERS = [
    (read_turns, json.dumps([{"speaker": 0, "text": "Grüß dich."}], ensure_ascii=False)),
    (read_lines, json.dumps({"text": "Grüß dich."}, ensure_ascii=False)),
    (read_training, json.dumps([TURN], ensure_ascii=False)),
    (read_key_lines, "# grün\n0123456789abcdef0123 tenant=green"),
]


@pytest.mark.parametrize(("read", "text"), READERS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_file_of_text_may_begin_with_a_byte_order_mark(tmp_path, read, text, end):
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    plain.write_bytes(f"{text}{end}".encode())
    marked.write_bytes(f"{text}{end}".encode("utf-8-sig"))
    assert read(marked) == read(plain) != []


ENCODINGS = ["latin-1", "cp1252", "utf-16", "utf-16-le-sig", "utf-16-be-sig", "utf-32"]


def encode(text: str, encoding: str) -> bytes:
    if not encoding.endswith("-sig"):
        return text.encode(encoding)
    plain = encoding.removesuffix("-sig")
    mark = codecs.BOM_UTF16_LE if plain.endswith("le") else codecs.BOM_UTF16_BE
    return mark + text.encode(plain)


@pytest.mark.parametrize(("read", "text"), READERS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_another_encoding_is_one_line_that_says_what_to_do(tmp_path, read, text, encoding):
    (tmp_path / "a.txt").write_bytes(encode(text, encoding))
    with pytest.raises(InputError, match=r"a\.txt cannot be read as UTF-8.*save it as UTF-8$"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("read", [read for read, _ in READERS])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, read):
    for path in (tmp_path / "gone", tmp_path / "\0"):
        with pytest.raises(InputError, match="cannot be read: ") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_the_line_of_the_first_wrong_byte_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(InputError, match="line 3 has the byte 0xe9; it may be Latin-1"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("data", ["a\nb".encode("utf-16-le"), b"a\nPK\3\4\0"])
def test_a_file_with_zero_bytes_is_no_text(tmp_path, data):
    """UTF-16 without its mark is valid UTF-8, and would be spoken letter by letter."""
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(InputError, match=r"line [12] has a zero byte; it may be UTF-16"):
        read_text(tmp_path / "a.txt")


def test_a_pointer_of_git_lfs_is_no_text(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (tmp_path / "a.txt").write_text(pointer)
    with pytest.raises(InputError, match="git lfs pull"):
        read_text(tmp_path / "a.txt")


def test_marks_of_files_that_were_joined_are_left_out(tmp_path):
    script = "0: One.\n".encode("utf-8-sig") + "1: Two.\n".encode("utf-8-sig")
    (tmp_path / "a.txt").write_bytes(script)
    assert read_text(tmp_path / "a.txt") == "0: One.\n1: Two.\n"


def test_keys_without_comments_are_read():
    assert read_keys("# a comment\n\nkey\n") == ["key"]
