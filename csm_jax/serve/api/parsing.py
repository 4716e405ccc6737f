"""Parses bodies and messages to pydantic models: strictly, within limits, off the event loop.

The values of JSON are counted before it is parsed: the parser holds the interpreter's lock, so the
event loop waits for it even if it runs in a thread.
"""

import asyncio
import codecs
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import parse_qsl

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, TypeAdapter, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from csm_jax.serve.errors import ApiError, as_bad_field
from csm_jax.serve.middleware.body_limits import body_of
from csm_jax.serve.settings import Limits

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

JSON = "application/json"
MULTIPART = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"
# Bytes that are parsed on the event loop; larger bodies are parsed in a thread.
_INLINE_BYTES = 16_384
# Of a number: the time to parse one grows faster than its length.
_MAX_DIGITS = 400
# Fields of a form, including files.
_MAX_PARTS = 64
T = TypeVar("T")


async def read_fields(
    http: HTTPRequest, model: type[T], *, recordings: bool = False, forms: bool = False
) -> T:
    """Reads the body of a request as a pydantic model.

    Args:
      recordings: allows a larger body, with recordings or files of lines.
      forms: also allows a form, whose files become bytes.

    Raises:
      ApiError: a field is missing or wrong, or the body is of another type or beyond a limit.
    """
    kind, options = _content_type(http)
    body = body_of(http)
    # Recordings in a form of this type are larger by escaping, and slow to decode.
    if recordings and kind != URLENCODED:
        body.allow_recordings()
    if kind == JSON:
        return await parse_json(TypeAdapter(model), await _read(http), body.limits)
    if not forms or kind not in (MULTIPART, URLENCODED):
        kinds = "JSON or a form" if forms else JSON
        raise ApiError(415, f"the Content-Type is {kind[:80]!r}; send {kinds}")
    data = await _read(http)
    if kind == MULTIPART:
        fields = await _in_thread(len(data), _parse_multipart, data, options.get(b"boundary", b""))
    else:
        fields = await _in_thread(len(data), _parse_urlencoded, data)
    try:
        return TypeAdapter(model).validate_python(fields)
    except ValidationError as error:
        raise as_bad_field(error) from error


async def _read(http: HTTPRequest) -> bytes:
    """The body. `Request.body` would keep it in memory until the response has ended."""
    return b"".join([piece async for piece in http.stream()])


def _content_type(http: HTTPRequest) -> tuple[str, dict[bytes, bytes]]:
    """The media type, and its parameters. Raises `ApiError`."""
    values = http.headers.getlist("content-type")
    if len(values) != 1 or not values[0].strip():
        raise ApiError(415, f"send one Content-Type header, such as {JSON}")
    kind, options = parse_options_header(values[0])
    charset = options.get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8", b"us-ascii"):
        raise ApiError(415, f"the charset is {charset[:40].decode('latin-1')!r}; send UTF-8")
    return kind.decode("latin-1").lower(), options


async def parse_json(kind: TypeAdapter[T], data: bytes, limits: Limits) -> T:
    """Parses a value of this type. Raises `ApiError` for invalid JSON, and for other types."""
    _check_structure(data, limits)
    return await _in_thread(len(data), _parse_json, kind, data)


def parse_json_sync(kind: TypeAdapter[T], data: bytes, limits: Limits) -> T:
    """`parse_json` for functions that run in a thread."""
    _check_structure(data, limits)
    return _parse_json(kind, data)


def _check_structure(data: bytes, limits: Limits) -> None:
    """Raises `ApiError` if there are too many values.

    These characters are counted in strings too; no valid string has so many.
    """
    if sum(map(data.count, (b",", b"[", b"{", b":"))) > limits.json_values:
        message = f"the JSON has more than {limits.json_values} values"
        raise ApiError(400, message, code="too_long")


def _parse_json(kind: TypeAdapter[T], data: bytes) -> T:
    # RFC 8259 lets readers ignore the byte order mark of some editors and clients.
    data = data.removeprefix(codecs.BOM_UTF8)
    _check_json(data)
    try:
        return kind.validate_json(data)
    except ValidationError as error:
        raise as_bad_field(error) from error


def _check_json(data: bytes) -> None:
    """Raises `ApiError` for what is not JSON in UTF-8, and for what parsers interpret differently.

    pydantic accepts NaN, and two values of one name.
    """
    try:
        json.loads(
            data.decode(),
            object_pairs_hook=_check_names,
            parse_constant=_refuse_constant,
            parse_int=_check_digits,
            parse_float=_check_digits,
        )
    except UnicodeDecodeError as error:
        raise ApiError(400, f"not UTF-8 at byte {error.start}", code="bad_json") from error
    except json.JSONDecodeError as error:
        message = f"not JSON: {error.msg} at character {error.pos}"
        raise ApiError(400, message, code="bad_json") from error
    except RecursionError as error:
        raise ApiError(400, "the JSON is nested too deeply", code="bad_json") from error


def _check_names(pairs: list[tuple[str, Any]]) -> None:
    names = {name for name, _ in pairs}
    if len(names) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ApiError(400, f"the field {twice[:80]!r} is there twice", code="bad_json")


def _check_digits(number: str) -> None:
    if len(number) > _MAX_DIGITS:
        raise ApiError(400, f"a number has more than {_MAX_DIGITS} digits", code="bad_json")


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, f"{name} is not JSON", code="bad_json")


def _parse_urlencoded(data: bytes) -> dict[str, Any]:
    try:
        pairs = parse_qsl(
            data.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=bool(data),
            errors="strict",
            max_num_fields=_MAX_PARTS,
        )
    except ValueError as error:
        raise ApiError(400, f"not a form ({str(error)[:100]})", code="bad_form") from error
    fields = _Fields()
    for name, value in pairs:
        fields.add(name, value, bool(value))
    return fields.values


def _parse_multipart(data: bytes, boundary: bytes) -> dict[str, Any]:
    """Parses a form. Raises `ApiError` if it is malformed or incomplete."""
    if not boundary:
        raise ApiError(400, "the Content-Type of the form names no boundary", code="bad_form")
    form = _Multipart()
    try:
        parser = MultipartParser(boundary, form.callbacks)
        parser.write(data)
        parser.finalize()
    except FormParserError as error:
        raise ApiError(400, f"not a form ({str(error)[:100]})", code="bad_form") from error
    if not form.is_complete:
        raise ApiError(400, "the form ends before its last boundary", code="bad_form")
    return form.fields.values


class _Fields:
    """The fields of a form that have been parsed."""

    def __init__(self):
        self.values: dict[str, str | bytes] = {}
        self._names: set[str] = set()

    def add(self, name: str, value: str | bytes, is_filled: bool) -> None:
        """Adds a field if it was filled in. Raises `ApiError` for a second one of that name."""
        if name in self._names:
            raise ApiError(400, f"the field {name[:80]!r} is there twice", code="bad_form")
        self._names.add(name)
        if is_filled:
            self.values[name] = value


class _Multipart:
    """Collects the parts of a form, by the callbacks of `MultipartParser`."""

    def __init__(self):
        self.fields = _Fields()
        self.is_complete = False
        self._num_parts = 0
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value = bytearray(), bytearray()
        self._data = bytearray()

    @property
    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._part_begin,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_end": self._end,
        }

    def _part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise ApiError(400, f"the form has more than {_MAX_PARTS} fields", code="bad_form")
        self._headers = {}
        self._data = bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        name = bytes(self._name).lower()
        if name in self._headers:
            raise ApiError(400, "a header of the form is there twice", code="bad_form")
        self._headers[name] = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += memoryview(data)[start:end]

    def _part_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise ApiError(400, "a part of the form has no name", code="bad_form")
        name, value = _text(options[b"name"], "a name"), bytes(self._data)
        self._data = bytearray()
        # Without a chosen file, a browser sends an empty one without a name.
        is_filled = bool(value or options.get(b"filename"))
        is_file = b"filename" in options
        self.fields.add(name, value if is_file else _text(value, name[:80]), is_filled)

    def _end(self) -> None:
        self.is_complete = True


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"{what} is not UTF-8", code="bad_form") from error


async def _in_thread(num_bytes: int, function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function, in a thread if its input is large."""
    if num_bytes <= _INLINE_BYTES:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


# Models that bodies refer to, for the OpenAPI document.
_documented: dict[str, Any] = {}


def describe(model: type[BaseModel], *, forms: bool = False) -> dict[str, Any]:
    """The entry in the OpenAPI document for an endpoint that reads its body by `read_fields`."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    _documented.update(schema.pop("$defs", {}))
    kinds = (JSON, MULTIPART) if forms else (JSON,)
    body = {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}
    return {"requestBody": body}


def document(app: FastAPI) -> None:
    """Adds the models that bodies refer to, to the OpenAPI document of an application."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        found = generate()
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        for name, schema in _documented.items():
            schemas.setdefault(name, schema)
        return found

    app.openapi = openapi
