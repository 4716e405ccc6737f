"""SentencePiece models in the form of the `tokenizers` library.

The file is a protobuf message (sentencepiece_model.proto), of which a few fields are read.
"""

import base64
import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

# Kinds of pieces, and of models.
_NORMAL, _UNKNOWN, _USER_DEFINED, _BYTE = 1, 2, 4, 6
_UNIGRAM, _BPE = 1, 2
_SPACE = "\u2581"


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


def to_tokenizers(model: bytes) -> dict[str, Any] | None:
    """The content of a `tokenizer.json` that encodes as a model does; None for words or letters.

    Symbols that the user defined are never merged with others: they are split off first. Names of
    control pieces in a text become these pieces, as with all tokenizers of transformers.
    """
    fields = list(_fields(model))
    pieces = [_piece(value) for number, value in fields if number == 1]
    trainer = _message(fields, 2)
    make_model = {_UNIGRAM: _unigram, _BPE: _bpe}.get(trainer.get(3, _UNIGRAM))
    if make_model is None:
        return None
    symbols = sorted((p.text for p in pieces if p.kind == _USER_DEFINED), key=len, reverse=True)
    split = {
        "type": "Split",
        "pattern": {"Regex": "|".join(re.escape(symbol) for symbol in symbols)},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(_message(fields, 3))},
        "pre_tokenizer": split if symbols else None,
        "post_processor": None,
        "decoder": {
            "type": "Metaspace",
            "replacement": _SPACE,
            "prepend_scheme": "first",
            "split": False,
        },
        "model": make_model(pieces),
    }


def _bpe(pieces: list[_Piece]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next((piece.text for piece in pieces if piece.kind == _UNKNOWN), None),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": _has_bytes(pieces),
        "ignore_merges": True,
        "vocab": {piece.text: i for i, piece in enumerate(pieces)},
        "merges": _merges(pieces),
    }


def _unigram(pieces: list[_Piece]) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": next((i for i, piece in enumerate(pieces) if piece.kind == _UNKNOWN), None),
        "vocab": [[piece.text, piece.score] for piece in pieces],
        "byte_fallback": _has_bytes(pieces),
    }


def _has_bytes(pieces: list[_Piece]) -> bool:
    return any(piece.kind == _BYTE for piece in pieces)


def _normalizers(spec: dict[int, Any]) -> list[dict[str, Any]]:
    """What SentencePiece does to a text before it looks for pieces; its defaults are 1."""
    steps: list[dict[str, Any]] = []
    if charsmap := spec.get(2):
        encoded = base64.b64encode(charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if spec.get(4, 1):
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.get(3, 1):
        steps.append({"type": "Prepend", "prepend": _SPACE})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]


def _merges(pieces: list[_Piece]) -> list[list[str]]:
    """All pairs of pieces that make another, those with the highest score first."""
    scores = {piece.text: piece.score for piece in pieces if piece.kind == _NORMAL}
    pairs = [
        (-score, text[:i], text[i:])
        for text, score in scores.items()
        for i in range(1, len(text))
        if text[:i] in scores and text[i:] in scores
    ]
    return [[left, right] for _, left, right in sorted(pairs)]


def _piece(message: Any) -> _Piece:
    values = dict(_fields(message))
    return _Piece(values[1].decode(), values.get(2, 0.0), values.get(3, _NORMAL))


def _message(fields: list[tuple[int, Any]], number: int) -> dict[int, Any]:
    """The fields of a message in another; empty if it is not there."""
    return next((dict(_fields(value)) for n, value in fields if n == number), {})


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field: integers, floats, or bytes of strings and messages."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
        elif wire == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        else:
            size, code = (8, "<d") if wire == 1 else (4, "<f")
            value, at = struct.unpack(code, message[at : at + size])[0], at + size
        yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, and the position behind it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
