"""Who may come in, and which hosts need a token."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asd_rt.errors import ConfigError
from asd_rt.serve.access import Guard, access_of, is_loopback
from asd_rt.serve.metrics import Metrics

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_machine_needs_no_token(host: str) -> None:
    assert is_loopback(host)
    assert access_of(host, None, []).token is None


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.4", "example.org", "127.0.0.1.example.org", ""]
)
def test_any_other_host_needs_one(host: str) -> None:
    with pytest.raises(ConfigError, match="needs a token: set ASD_RT_TOKEN"):
        access_of(host, None, [])
    assert access_of(host, TOKEN, []).host_names is None


@pytest.mark.parametrize(
    "token", ["", "short", "x" * 129, "with space 1234567", "umläut-0123456789"]
)
def test_tokens_fit_into_a_header(token: str) -> None:
    with pytest.raises(ConfigError, match="16 to 128 letters"):
        access_of("127.0.0.1", token, [])


@pytest.mark.parametrize(
    "origin", ["https://example.org/", "example.org", "https://Example.org", "*", "ftp://x", ""]
)
def test_origins_are_as_browsers_send_them(origin: str) -> None:
    with pytest.raises(ConfigError, match=r"such as https://example\.org"):
        access_of("127.0.0.1", None, [origin])


def ask(origin: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer to a page of `origin`; https://friend.example is allowed."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    access = access_of("127.0.0.1", TOKEN, ["https://friend.example", "http://[::1]:3000"])
    sent: list[Any] = []
    told = {"host": "127.0.0.1:8000", "origin": origin} | headers
    scope = {
        "type": "http",
        "method": method,
        "path": "/v1/uploads",
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in told.items()],
    }

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(app, access, Metrics(1, 1))(scope, None, send))  # type: ignore[arg-type]
    found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], found


def test_an_allowed_page_may_ask_and_read() -> None:
    allowed, given = "https://friend.example", f"Bearer {TOKEN}"
    status, headers = ask(allowed, "OPTIONS", access_control_request_method="POST")
    assert status == 204 and "POST" in headers["access-control-allow-methods"]
    assert "authorization" in headers["access-control-allow-headers"]
    for authorization, expected in ((given, 200), ("", 401)):
        status, headers = ask(allowed, authorization=authorization)
        assert status == expected
        assert headers["access-control-allow-origin"] == allowed and headers["vary"] == "origin"


def test_any_other_page_may_not() -> None:
    foreign = "https://evil.example"
    for method in ("GET", "OPTIONS"):
        status, headers = ask(
            foreign,
            method,
            access_control_request_method="POST",
            authorization=f"Bearer {TOKEN}",
        )
        assert status == 403
        assert not [name for name in headers if name.startswith("access-control")]


def test_the_servers_own_page_needs_no_leave() -> None:
    status, headers = ask("http://127.0.0.1:8000", authorization=f"Bearer {TOKEN}")
    assert status == 200 and "access-control-allow-origin" not in headers
    assert ask("http://127.0.0.1:8000", "OPTIONS")[0] == 401
