"""Which replica a request names, and what a connection is told whose replica has died."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'asd-rt[ray]'")

from asd_rt.serve.replicas import GONE, PIN_HEADER, Doorman, pin_of


def scope(path: str, query: str = "", kind: str = "http") -> dict[str, Any]:
    return {"type": kind, "path": path, "query_string": query.encode(), "headers": []}


@pytest.mark.parametrize(
    ("path", "query", "pin"),
    [
        ("/v1/videos/ab12.token", "", "ab12"),
        ("/v1/videos/ab12.token/content", "near=other.x", "ab12"),
        ("/v1/videos/token", "", ""),
        ("/v1/videos", "", ""),
        ("/v1/live", "near=ab12.token", "ab12"),
        ("/v1/live", "near=a%0d%0ab.token", ""),
        ("/v1/live", "near=%C3%A4.token", ""),
        ("/v1/live", "near=", ""),
        ("/", "", ""),
    ],
)
def test_what_a_request_names(path: str, query: str, pin: str) -> None:
    assert pin_of(scope(path, query)) == pin


def through(messages: list[dict[str, Any]], received: list[dict[str, Any]], **given: Any) -> Any:
    """What a server sees of an application that sends `messages` and reads as many as it is given."""
    sent, seen = [], {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope)
        for message in messages:
            await send(message)
        for _ in received:
            await receive()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return received.pop(0)

    asyncio.run(Doorman(app)(given["scope"], receive, send))
    return sent, seen


ACCEPT = {"type": "websocket.accept"}


def test_a_connection_with_nobody_behind_it_is_told_why() -> None:
    sent, _ = through([ACCEPT], [], scope=scope("/v1/live", kind="websocket"))
    assert sent[1:] == [{"type": "websocket.close", "code": 1012, "reason": GONE}]


def test_one_that_has_ended_is_left_alone() -> None:
    close = {"type": "websocket.close", "code": 1013}
    live = scope("/v1/live", kind="websocket")
    assert through([ACCEPT, close], [], scope=live)[0] == [ACCEPT, close]
    gone = {"type": "websocket.disconnect", "code": 1001}
    assert through([ACCEPT], [gone], scope=live)[0] == [ACCEPT]
    assert through([close], [], scope=live)[0] == [close], "refused before it was open"


def test_clients_cannot_pin_by_the_header() -> None:
    asked = scope("/v1/live", "near=ab12.x")
    asked["headers"] = [(PIN_HEADER.upper(), b"other"), (b"host", b"h")]
    _, seen = through([], [], scope=asked)
    assert seen["headers"] == [(b"host", b"h"), (PIN_HEADER, b"ab12")]
