"""Callers of requests: keys, tenants, refusals, and redaction of logs."""

import base64
import hashlib
import logging

import pytest
from small import ask, echo, open_socket

from csm_jax.errors import InputError
from csm_jax.serve.admission import rate_limits
from csm_jax.serve.admission.api_keys import parse_keys, read_keys
from csm_jax.serve.admission.caller import INTERNAL, Caller
from csm_jax.serve.admission.rate_limits import RateLimits
from csm_jax.serve.middleware import redaction
from csm_jax.serve.middleware.authentication import (
    AuthenticationMiddleware,
    is_open,
)

LINES = ("sk-first", "sk-second tenant=acme weight=2.5", "sk-third tenant=acme weight=2.5")


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(rate_limits, "monotonic", lambda: now[0])
    return now


def guarded(lines=LINES, per_minute: int = 0) -> AuthenticationMiddleware:
    return AuthenticationMiddleware(echo, parse_keys(lines), RateLimits(per_minute, 0))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_an_owner_is_the_digest_of_the_key_or_the_tenant():
    app = guarded()
    digest = hashlib.sha256(b"sk-first").hexdigest()[:32]
    first = ask(app, headers=bearer("sk-first")).json()["caller"]
    assert first == {"owner": digest, "share": digest, "weight": 1.0}
    for key in ("sk-second", "sk-third"):
        caller = ask(app, headers=bearer(key)).json()["caller"]
        assert caller == {"owner": "acme", "share": "acme", "weight": 2.5}


def test_without_keys_a_share_is_an_address_or_its_network():
    app = guarded(())
    for client, share in {
        "192.0.2.1": "192.0.2.1",
        "::ffff:192.0.2.1": "192.0.2.1",
        "2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64",
        "2001:db8:1:2::ffff": "2001:db8:1:2::/64",
    }.items():
        caller = ask(app, client=client).json()["caller"]
        assert caller == {"owner": "", "share": share, "weight": 1.0}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a", "a"], "given twice"),
        (["a", "a tenant=x"], "given twice"),
        (["a colour=red"], "not tenant=NAME or weight=NUMBER"),
        (["a tenant"], "not tenant=NAME"),
        (["a tenant="], "not tenant=NAME"),
        (["a tenant=x tenant=y"], "not tenant=NAME"),
        (["a # mine"], "not tenant=NAME"),
        (["tenant=x"], "is missing before its options"),
        (["a\tb"], "printable"),
        (["a\u00a0"], "printable"),
        (["\ufeffa"], "printable"),
        (["caf\u00e9"], "printable"),
        (["a tenant=Acme"], "a-z"),
        (["a tenant=../x"], "a-z"),
        ([f"a tenant={hashlib.sha256(b'b').hexdigest()[:32]}", "b"], "up to 31"),
        (["a weight=0"], "a weight is"),
        (["a weight=nan"], "a weight is"),
        (["a weight=1e9"], "a weight is"),
        (["a weight=-1"], "a weight is"),
        (["a tenant=x weight=1", "b tenant=x weight=2"], "two weights"),
    ],
)
def test_an_invalid_line_of_a_keys_file_is_refused(lines, message):
    with pytest.raises(InputError, match=message) as raised:
        parse_keys(lines)
    assert "\n" not in str(raised.value)


def test_errors_do_not_contain_the_key():
    for line in ("sk-hidden colour=red", "sk-hidden sk-hidden", "sk-hidden\u00e9"):
        with pytest.raises(InputError) as raised:
            parse_keys([line])
        assert "hidden" not in str(raised.value)


def test_a_keys_file_may_have_comments_and_a_byte_order_mark():
    text = "\ufeffsk-first tenant=a\r\n\n  # sk-old\n  sk-second  \n"
    assert read_keys(text) == ["sk-first tenant=a", "sk-second"]


def test_wrong_keys_from_one_address_are_limited(clock):
    app = guarded()
    statuses = [ask(app, headers=bearer(f"guess-{i}")).status_code for i in range(1500)]
    assert statuses[0] == 401
    assert statuses.count(401) <= 10
    assert set(statuses[10:]) == {429}
    # It affects neither other addresses nor valid keys from the same one.
    assert ask(app, headers=bearer("guess"), client="10.0.0.2").status_code == 401
    assert ask(app, headers=bearer("sk-first")).status_code == 200
    assert ask(app, headers=bearer("guess")).headers["retry-after"] == "6"
    clock[0] = 60.0
    assert ask(app, headers=bearer("guess")).status_code == 401


def test_two_credentials_get_401():
    app = guarded()
    both = {"Authorization": "Bearer sk-first", "X-API-Key": "sk-second"}
    assert ask(app, headers=both).status_code == 401
    twice = [("X-API-Key", "sk-first"), ("X-API-Key", "sk-first")]
    assert ask(app, headers=twice).status_code == 401
    # A proxy's own password beside the key is not an API key.
    basic = {"Authorization": "Basic eDp5", "X-API-Key": "sk-first"}
    assert ask(app, headers=basic).status_code == 200


def url64(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    ("subprotocols", "status", "chosen"),
    [
        (("csm", "csm-key." + url64("sk-first")), 101, "csm"),
        (("csm-key." + url64("sk-first"), "csm"), 101, "csm"),
        (("realtime", "openai-insecure-api-key.sk-first"), 101, "realtime"),
        (("csm-key." + url64("sk-first"),), 101, None),
        (("csm", "csm-key." + url64("sk-firs")), 401, None),
        (("csm", "csm-key.sk-first"), 401, None),
        (("csm", "csm-key.!" + url64("sk-first")), 401, None),
        (("csm",), 401, None),
    ],
)
def test_a_browser_sends_its_key_as_a_subprotocol(subprotocols, status, chosen):
    opened = open_socket(guarded(), subprotocols=subprotocols)
    assert (opened.status, opened.subprotocol) == (status, chosen)


def test_a_key_in_the_query_is_accepted_for_websockets_only():
    assert open_socket(guarded(), query="api_key=sk-first").status == 101
    assert ask(guarded(), "/v1/models?api_key=sk-first").status_code == 401


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics", "/files/a-B_1.wav"])
def test_open_paths_need_no_key(path):
    assert is_open(path)


@pytest.mark.parametrize(
    "path",
    [
        *("//healthz", "/healthz/", "/healthz/..", "/./healthz", "/healthz\n", "/HEALTHZ", ""),
        *("/files/../v1/models", "/files/..", "/files//x", "/files/.x", "/files/a\n", "/filesx"),
        *("/files/a\\..\\b", "/files/a b", "http://localhost/healthz", "/page/../v1/models"),
        *("/page/..", "/healthz;x", "/files/\u0661", "/v1/models", "/files/a\x00"),
    ],
)
def test_other_spellings_of_open_paths_need_a_key(path):
    assert not is_open(path)


@pytest.mark.parametrize(
    ("text", "hidden", "kept"),
    [
        ("GET /v1/realtime?api_key=sk-1 [accepted]", "sk-1", "[accepted]"),
        ("/a?x=1&API-KEY=sk-1&y=2", "sk-1", "y=2"),
        ("/a?api%5Fkey=sk-1", "sk-1", "/a?"),
        ("/a?%61ccess_token=sk-1 done", "sk-1", "done"),
        ("/a?a=b;token=sk-1", "sk-1", "a=b"),
        ("/a?X-Amz-Signature=sk-1", "sk-1", "/a"),
        ("/a?api_key=b)c;sk-1 done", "sk-1", "done"),
        ("/a?x=1&api_key=b'c]#sk-1&y=2", "sk-1", "y=2"),
        ("< Authorization: Bearer sk-1", "sk-1", "Authorization"),
        ("[(b'authorization', b'Bearer sk-1')]", "sk-1", "authorization"),
        ("< xi-api-key: sk-1", "sk-1", "xi-api-key"),
        ("< Sec-WebSocket-Protocol: csm, csm-key.c2s", "c2s", "Sec-WebSocket"),
        ("subprotocols ['realtime', 'openai-insecure-api-key.sk-1']", "sk-1", "realtime"),
    ],
)
def test_credentials_are_redacted(text, hidden, kept):
    redacted = redaction.redact(text)
    assert hidden not in redacted
    assert kept in redacted
    assert redaction.REDACTED in redacted


def test_other_query_parameters_are_not_redacted():
    text = "GET /v1/models?limit=5&order=asc 200 {'path': '/a?b=c'}"
    assert redaction.redact(text) == text


def test_the_filter_redacts_arguments_and_tracebacks(caplog):
    redaction.install()
    logger = logging.getLogger("uvicorn.error")
    with caplog.at_level(logging.INFO, "uvicorn.error"):
        logger.info('%s - "WebSocket %s" [accepted]', "1.2.3.4", "/v1/realtime?api_key=sk-1")
        try:
            raise ValueError("bad address /a?token=sk-2")
        except ValueError:
            logger.exception("failed at %s", "/b?key=sk-3")
    assert "sk-" not in caplog.text
    assert "1.2.3.4" in caplog.text
    assert "ValueError: bad address" in caplog.text


def test_utterances_and_lines_count_as_requests(clock):
    limits = RateLimits(requests_per_minute=10, speech_seconds_per_minute=0)
    limits.count(Caller(share="a"))
    limits.count_more(Caller(share="a"), 29)  # a scene of 30 lines, admitted as one request
    with pytest.raises(Exception, match="requests and utterances a minute; wait 126 s"):
        limits.count(Caller(share="a"))
    limits.count(Caller(share="b"))
    clock[0] = 127.0
    limits.count(Caller(share="a"))


def test_a_caller_over_its_speech_limit_is_refused(clock):
    limits = RateLimits(0, speech_seconds_per_minute=60)
    caller = Caller("a", "a")
    limits.check_speech(caller)
    limits.charge_speech(caller, 90.0)
    with pytest.raises(Exception, match="60 seconds of speech a minute; wait 30 s") as raised:
        limits.check_speech(caller)
    assert (raised.value.status, raised.value.retry_after) == (429, 30)
    limits.check_speech(Caller("b", "b"))
    clock[0] = 30.0
    limits.check_speech(caller)
    limits.charge_speech(INTERNAL, 1e9)
    limits.check_speech(INTERNAL)


def test_many_new_callers_do_not_erase_a_debt(clock, monkeypatch):
    """Even if many addresses follow; and the memory stays limited."""
    monkeypatch.setattr(rate_limits, "MAX_CALLERS", 20)
    limits = RateLimits(0, speech_seconds_per_minute=60)
    limits.charge_speech(Caller("a", "a"), 6000.0)
    for number in range(1000):
        limits.charge_speech(Caller("", f"10.0.{number}"), 1.0)
    assert len(limits._seconds._buckets) == 20
    with pytest.raises(Exception, match="seconds of speech"):
        limits.check_speech(Caller("a", "a"))
