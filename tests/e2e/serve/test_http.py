"""Clips, uploads, health and metrics over HTTP, against the real server."""

from __future__ import annotations

import json
import socket
import time
from io import BytesIO
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import av
import pytest
from PIL import Image

from benchmarks.serving_client import Server


def call(
    server: Server, path: str, body: Any = None, method: str | None = None, **headers: str
) -> tuple[int, Any]:
    """Status and document of an answer."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = Request(server.url + path, data, headers, method=method)
    try:
        with urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def finished(server: Server, clip: str) -> dict[str, Any]:
    while True:
        status, found = call(server, f"/v1/videos/{clip}")
        assert status == 200
        if found["status"] in ("done", "failed", "cancelled"):
            return found
        time.sleep(0.05)


def test_a_clip_from_asking_to_download(server: Server) -> None:
    body = {"prompt": "a red three", "frames": 10, "seed": 3, "steps": 1, "fps": 12}
    status, asked = call(server, "/v1/videos", body)
    assert status == 202
    assert asked["prompt"] == "a red three"
    done = finished(server, asked["id"])
    assert done["status"] == "done"
    assert done["frames"] == 12, "whole blocks"
    content = server.get(f"/v1/videos/{asked['id']}/content")
    assert len(content) == done["bytes"]
    with av.open(BytesIO(content)) as video:
        assert video.streams.video[0].average_rate == 12
        assert sum(1 for _ in video.decode(video=0)) == 12
    assert call(server, f"/v1/videos/{asked['id']}", method="DELETE")[0] == 200
    assert call(server, f"/v1/videos/{asked['id']}")[0] == 404


def test_a_clip_that_is_not_wanted_any_more(server: Server) -> None:
    _, long = call(server, "/v1/videos", {"prompt": "a red three", "frames": 480, "steps": 4})
    status, found = call(server, f"/v1/videos/{long['id']}/content")
    assert (status, found["error"]["code"]) == (409, "unfinished")
    status, found = call(server, f"/v1/videos/{long['id']}", method="DELETE")
    assert (status, found["status"]) == (200, "cancelled")
    _, short = call(server, "/v1/videos", {"prompt": "a red three", "frames": 3})
    assert finished(server, short["id"])["status"] == "done", "it makes room at once"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "a red elephant"}, "unknown word elephant"),
        ({"prompt": "x" * 501}, "501 characters"),
        ({"prompt": "a red three", "frames": 481}, "from 1 to 480, found 481"),
        ({"prompt": "a red three", "deadline_ms": 0}, "deadline_ms must be a number"),
        ({"prompt": "a red three", "out": "/etc/passwd"}, "unknown out"),
        (b'{"prompt": "a red three", "fps": Infinity}', "no JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "comes twice"),
        (b"\xff\xfe", "JSON object"),
    ],
)
def test_a_wrong_request_is_answered_in_one_line(server: Server, body: Any, said: str) -> None:
    status, found = call(server, "/v1/videos", body)
    assert status == 422
    assert said in found["error"]["message"]
    assert "\n" not in found["error"]["message"]


@pytest.mark.parametrize(("path", "size"), [("/v1/videos", 20_000), ("/v1/uploads", 30_000_000)])
def test_bodies_have_a_limit_and_their_sender_hears_of_it(
    server: Server, path: str, size: int
) -> None:
    status, found = call(server, path, bytes(size))
    assert status == 413
    assert "a body of more than" in found["error"]["message"]


def test_who_asks_first_sends_no_large_body(server: Server) -> None:
    head = (
        f"POST /v1/uploads HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        "Content-Length: 30000000\r\nExpect: 100-continue\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as link:
        link.sendall(head.encode())
        assert link.recv(4096).startswith(b"HTTP/1.1 413 ")


def picture(kind: str, **more: Any) -> bytes:
    file = BytesIO()
    Image.new("RGB", (64, 40), "green").save(file, kind, **more)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_pictures_are_taken(server: Server, kind: str) -> None:
    status, found = call(server, "/v1/uploads", picture(kind))
    assert (status, found["frames"]) == (201, 3)


def test_of_a_clip_whole_blocks_are_taken(server: Server) -> None:
    _, asked = call(server, "/v1/videos", {"prompt": "a red three", "frames": 9})
    finished(server, asked["id"])
    content = server.get(f"/v1/videos/{asked['id']}/content")
    assert call(server, "/v1/uploads", content)[1]["frames"] == 9


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"#EXTM3U\nfile:///etc/passwd\n", "is no PNG"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "is no PNG"),
        (picture("PNG")[:60], "no picture that can be read"),
        (b"", "is no PNG"),
    ],
)
def test_other_uploads_are_refused(server: Server, data: bytes, said: str) -> None:
    status, found = call(server, "/v1/uploads", data)
    assert status == 422
    assert said in found["error"]["message"]


def test_health_and_metrics(server: Server) -> None:
    assert call(server, "/healthz") == (200, {"alive": True})
    status, ready = call(server, "/readyz")
    assert status == 200
    assert ready["ready"] and ready["places"] == 5
    text = server.get("/metrics").decode()
    for name in ("asd_rt_block_seconds_bucket", "asd_rt_deadline_missed_total", "asd_rt_sessions"):
        assert f"\n{name}" in text
    assert server.metric("asd_rt_resident_bytes") > 10_000_000


def test_pages_from_elsewhere_and_other_names_are_refused(server: Server) -> None:
    assert call(server, "/readyz", Origin="https://evil.example")[0] == 403
    assert call(server, "/readyz", Origin="null")[0] == 403
    assert call(server, "/readyz", Origin=server.url)[0] == 200
    assert call(server, "/readyz", Host="evil.example")[0] == 421
    assert call(server, "/readyz", Host=f"localhost:{server.port}")[0] == 200
