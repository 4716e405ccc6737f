"""Generated and mutated requests: the server responds to all, and continues."""

import asyncio
import contextlib
import json
import random

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from serving import PRESETS, SMALL, serve

from csm_jax.serve.settings import Limits, Settings

# Speech is short for any request.
SHORT = Limits(text_characters=200, speech_ms=1000.0, turns=4)


@pytest.fixture(scope="module")
def target(model):
    with serve(model, Settings(**SMALL, limits=SHORT), warm=True) as running:
        yield running
        running.wait_until_idle()


def check_operations(target, mode: schemathesis.GenerationMode, max_examples: int) -> None:
    """Calls every operation of the OpenAPI document so often; none may respond with 5xx."""
    document = schemathesis.openapi.from_url(f"{target.url}/openapi.json")
    seen = []
    for result in document.get_all_operations():
        operation = result.ok()

        @given(operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=max_examples,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def call(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=[not_a_server_error], timeout=60)

        # An operation without fields has no invalid requests.
        with contextlib.suppress(Unsatisfiable):
            call()
            seen.append(f"{operation.method.upper()} {operation.path}")
    assert {"POST /generate", "POST /v1/audio/speech", "POST /v1/batches"} <= set(seen)


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_requests_generated_from_the_openapi_document_cause_no_server_error(target, mode):
    check_operations(target, mode, max_examples=4)


@pytest.mark.long
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_many_generated_requests_cause_no_server_error(target, mode):
    check_operations(target, mode, max_examples=40)


RECORDING = (PRESETS[0] / "rms.flac").read_bytes()[:4000]
SPEECH = {"model": "csm-1b", "input": "one", "voice": "slt", "max_audio_length_ms": 240}
SCENE = {"scene": [{"text": "one", "speaker_id": 0}], "context": [], "max_audio_length_ms": 240}
CHAT = {"messages": [{"role": "user", "content": "one"}], "max_audio_length_ms": 240}
SHORTLY = {"text": "one", "max_audio_length_ms": 240}
# The originals: path, JSON, and whether they are also sent as forms.
REQUESTS = [
    ("/generate", SHORTLY | {"speaker": 0, "streaming": True, "temperature": 0.9}, True),
    ("/v1/audio/speech", SPEECH | {"response_format": "mp3", "speed": 1.5}, False),
    ("/v1/audio/speech", SPEECH | {"stream_format": "sse", "top_k": 5}, False),
    ("/v1/inference/sesame/csm-1b", SHORTLY | {"preset_voice": "slt", "min_p": 0.1}, True),
    ("/v1/text-to-speech/slt/with-timestamps", SHORTLY | {"voice_settings": {"speed": 1}}, False),
    ("/fal-ai/csm-1b", SCENE, False),
    ("/v1/chat/completions", CHAT, False),
    ("/queue/fal-ai/csm-1b", SCENE | {"seed": 1}, False),
    ("/v1/audio/voices", {"name": "a", "speaker": 0, "text": "one", "audio": "AAAA"}, True),
    ("/v1/batches", {"input_file_id": "file-x", "endpoint": "/v1/audio/speech"}, True),
]
ODD = [None, True, -1, 0, 2**63, -(2**63), 1e308, -1e-308, "", " ", "a" * 300, "\u0000", "\ud800"]
ODD += ["../../etc/passwd", "http://169.254.169.254/", "data:audio/wav;base64,AAAA", [], {}, [[]]]
ODD += [{"$ref": "#"}, "1e9999", "\u202e\U0001f600", "<script>", "'; DROP TABLE batches; --"]


def mutate(value, source: random.Random):
    """The JSON with one odd value."""
    if isinstance(value, dict) and value and source.random() < 0.8:
        name = source.choice(sorted(value))
        changed = dict(value)
        match source.randrange(4):
            case 0:
                del changed[name]
            case 1:
                changed[str(source.choice(ODD))] = changed.pop(name)
            case _:
                changed[name] = mutate(changed[name], source)
        return changed
    if isinstance(value, list) and value and source.random() < 0.8:
        return [mutate(each, source) for each in value] * source.choice([1, 1, 0, 9])
    return source.choice(ODD)


def damage(data: bytes, source: random.Random) -> bytes:
    """The bytes with some changed, removed or inserted."""
    data = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(data) + 1)
        data[at : at + source.randrange(4)] = source.randbytes(source.randrange(4))
    return bytes(data)


def make(source: random.Random) -> dict:
    """Arguments of a mutated request."""
    path, fields, has_form = source.choice(REQUESTS)
    for _ in range(source.randint(0, 2)):
        if isinstance(fields, dict):
            fields = mutate(fields, source)
    headers = {"X-Request-Id": source.choice(["a", "\t", "x" * 99])}
    if has_form and source.random() < 0.4 and isinstance(fields, dict):
        head = "--x\r\nContent-Disposition: form-data; name="
        texts = [f'{head}"{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()]
        body = "".join(texts).encode("utf-8", "replace")
        file = f'{head}"audio"; filename="a"\r\n\r\n'.encode() + damage(RECORDING, source)
        body += file + b"\r\n--x--\r\n"
        headers["Content-Type"] = "multipart/form-data; boundary=x"
    else:
        body = json.dumps(fields).encode()
        headers["Content-Type"] = "application/json"
    if source.random() < 0.3:
        body = damage(body, source)
    if source.random() < 0.05:
        headers["Content-Type"] = source.choice(["", "a/b", "multipart/form-data", "\xe4"])
    headers = {name: value.encode("latin-1") for name, value in headers.items()}
    return {"url": path, "content": body, "headers": headers}


async def throw(url: str, count: int, seed: int) -> list[tuple[int, dict]]:
    """Sends so many requests, some at a time, and returns their statuses."""
    source = random.Random(seed)
    limit = asyncio.Semaphore(16)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def one(arguments: dict) -> tuple[int, dict]:
            async with limit:
                try:
                    return (await client.post(**arguments)).status_code, arguments
                except (httpx.LocalProtocolError, UnicodeEncodeError):
                    return 0, arguments  # httpx refuses to send it

        return await asyncio.gather(*(one(make(source)) for _ in range(count)))


def check_mutated(target, count: int) -> None:
    responses = asyncio.run(throw(target.url, count, seed=count))
    # 429 and 503 are responses of a full queue.
    failures = [response for response in responses if response[0] >= 500]
    assert not failures, failures[:3]
    statuses = [status for status, _ in responses]
    assert statuses.count(200) > count / 20  # some are valid, so that speech is generated too
    assert statuses.count(400) > count / 4
    target.wait_until_idle(seconds=60)
    response = target.post("/generate", json=SHORTLY)
    assert response.status_code == 200


def test_mutated_requests_cause_no_server_error(target):
    check_mutated(target, 600)


@pytest.mark.long
def test_ten_thousand_mutated_requests_cause_no_server_error(target):
    check_mutated(target, 10_000)
