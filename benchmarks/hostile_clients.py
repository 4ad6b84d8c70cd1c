"""Broken and hostile clients of `asd-rt serve`, for a server on this machine; each says what it got."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cache

from websockets.exceptions import ConnectionClosed, InvalidStatus

from benchmarks.serving_client import PROMPTS, Server, open_socket

ADDRESS = "127.0.0.2"  # not the good watcher's: limits are by address
ANSWER_S = 25.0
START = json.dumps({"type": "start", "prompt": PROMPTS[0], "fps": 24})
Hostile = Callable[[Server], Awaitable[str]]


async def _until_closed(link: object, most_s: float = ANSWER_S) -> str:
    """Read a socket until it is closed."""
    found, events = "", []
    try:
        async with asyncio.timeout(most_s):
            while True:
                message = await link.recv()  # type: ignore[attr-defined]
                if isinstance(message, str):
                    event = json.loads(message)
                    events.append(event.get("code", event["type"]))
    except ConnectionClosed as error:
        close = error.rcvd
        found = f"closed {close.code} {close.reason}".strip() if close else "connection cut"
    except TimeoutError:
        found = "left open"
    return f"{events[-1]}, {found}" if events else found


async def _request(
    server: Server,
    head: str,
    body: bytes = b"",
    host: str = "",
    length: int | None = None,
    headers: str = "",
) -> str:
    """One HTTP request; the answer's status and its error's message."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", server.port, local_addr=(ADDRESS, 0)
    )
    size = len(body) if length is None else length
    lines = f"{head} HTTP/1.1\r\nHost: {host or f'127.0.0.1:{server.port}'}\r\n{headers}"
    try:
        writer.write(f"{lines}Content-Length: {size}\r\nConnection: close\r\n\r\n".encode() + body)
        answer = await asyncio.wait_for(reader.read(), ANSWER_S)
    except (ConnectionError, TimeoutError) as error:
        return type(error).__name__
    finally:
        writer.close()
    top, _, content = answer.partition(b"\r\n\r\n")
    status = top.split(b" ")[1].decode() if b" " in top else "nothing"
    try:
        return f"{status} {json.loads(content)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return status


@cache
def png(width: int, height: int, rows: int) -> bytes:
    """A PNG that says width x height and holds `rows` rows of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(rows)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


async def garbage_frames(server: Server) -> str:
    """Random bytes where WebSocket frames should be."""
    link = await open_socket(server, ADDRESS)
    link.transport.write(random.randbytes(4096))
    return await _until_closed(link)


async def half_open(server: Server) -> str:
    """A connection without a byte."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", server.port, local_addr=(ADDRESS, 0)
    )
    try:
        return "cut" if not await asyncio.wait_for(reader.read(), ANSWER_S) else "an answer"
    except ConnectionError:
        return "cut"
    except TimeoutError:
        return "left open"
    finally:
        writer.close()


async def silent_socket(server: Server) -> str:
    """A WebSocket that asks for nothing."""
    return await _until_closed(await open_socket(server, ADDRESS))


async def huge_prompt(server: Server) -> str:
    """A prompt of 10 MB."""
    link = await open_socket(server, ADDRESS)
    text = json.dumps({"type": "start", "prompt": "a" * 10_000_000})
    with suppress(ConnectionClosed):
        await link.send(text)
    return await _until_closed(link)


async def zip_bomb(server: Server) -> str:
    """A picture of 50000 x 50000 pixels in a few bytes."""
    return await _request(server, "POST /v1/uploads", png(50_000, 50_000, 16))


async def deep_picture(server: Server) -> str:
    """A picture of 48 MB in 48 kB, within the limit of pixels: it is taken."""
    return await _request(server, "POST /v1/uploads", png(4096, 4096, 4096))


async def no_pixels(server: Server) -> str:
    """A picture of 0 x 0 pixels."""
    return await _request(server, "POST /v1/uploads", png(0, 0, 0))


async def torn_picture(server: Server) -> str:
    """Random bytes behind a picture's first ones."""
    return await _request(server, "POST /v1/uploads", png(8, 8, 8)[:33] + os.urandom(2000))


async def large_upload(server: Server) -> str:
    """An upload of 50 MB."""
    return await _request(server, "POST /v1/uploads", bytes(50_000_000))


async def slow_body(server: Server) -> str:
    """A body of which one byte comes."""
    return await _request(server, "POST /v1/videos", b"{", length=100)


async def nan_deadline(server: Server) -> str:
    """A deadline that is not a number."""
    link = await open_socket(server, ADDRESS)
    await link.send(f'{START[:-1]}, "deadline_ms": NaN}}')
    found = json.loads(await link.recv())
    await link.close()
    return f"{found['type']}: {found['message']}"


async def nonsense(server: Server) -> str:
    """Messages that are no JSON, or ask for what there is not."""
    link = await open_socket(server, ADDRESS)
    bad = ["", "{", "[" * 10_000, "null", '{"type": "fly"}', '{"type": "start"}', b"\0\1"]
    bad += [
        '{"type": "start", "prompt": "\u202e\\u0000", "seed": -1}',
        '{"type": "ack", "block": 1}',
    ]
    with suppress(ConnectionClosed):
        for i in range(40):
            await link.send(bad[i % len(bad)])
    return await _until_closed(link)


async def flood(server: Server) -> str:
    """A thousand messages at once."""
    link = await open_socket(server, ADDRESS)
    with suppress(ConnectionClosed):
        await link.send(START)
        for _ in range(1000):
            await link.send('{"type": "prompt", "prompt": "a red three"}')
    return await _until_closed(link)


async def reconnect_storm(server: Server) -> str:
    """Connects, starts and goes, twenty times."""
    ends: list[str] = []
    for _ in range(20):
        link = await open_socket(server, ADDRESS)
        await link.send(START)
        await link.close()
        ends.append(str(link.close_code))
    return "closed " + ", ".join(f"{code}: {ends.count(code)}" for code in sorted(set(ends)))


async def slow_reader(server: Server) -> str:
    """Starts and acknowledges nothing for three seconds."""
    link = await open_socket(server, ADDRESS)
    await link.send(START)
    blocks, end = 0, asyncio.get_running_loop().time() + 3
    try:
        while (left := end - asyncio.get_running_loop().time()) > 0:
            blocks += isinstance(await asyncio.wait_for(link.recv(), left), bytes)
    except TimeoutError:
        pass
    except ConnectionClosed as error:
        return f"closed {error.rcvd.code} {error.rcvd.reason}" if error.rcvd else "cut"
    await link.close()
    return f"{blocks} blocks"


async def vanishing(server: Server) -> str:
    """Starts, and is cut off in the middle of a block."""
    link = await open_socket(server, ADDRESS)
    await link.send(START)
    await asyncio.sleep(random.uniform(0, 0.1))
    raw = link.transport.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    link.transport.abort()
    return "gone"


async def greedy(server: Server) -> str:
    """Wants ten live videos."""
    links, ends = [], []
    for _ in range(10):
        link = await open_socket(server, ADDRESS)
        links.append(link)
        await link.send(START)
    for link in links:
        ends.append(await _until_closed(link, 0.5))
        await link.close()
    refused = [end for end in ends if "1013" in end]
    return f"{len(refused)} of 10 refused: {refused[0]}" if refused else "none refused"


async def foreign_page(server: Server) -> str:
    """A page of another site."""
    try:
        await open_socket(server, ADDRESS, origin="https://evil.example")
    except InvalidStatus as error:
        return f"{error.response.status_code}"
    return "let in"


async def foreign_name(server: Server) -> str:
    """Another host's name, as after DNS rebinding."""
    return await _request(server, "GET /readyz", host="evil.example")


async def path_walker(server: Server) -> str:
    """Paths that climb out of a folder."""
    paths = ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/videos/..%2f..%2fetc%2fpasswd")
    found = {await _request(server, f"GET {path}") for path in paths}
    return "; ".join(sorted(found))


KINDS: tuple[Hostile, ...] = (
    garbage_frames,
    half_open,
    silent_socket,
    huge_prompt,
    zip_bomb,
    deep_picture,
    no_pixels,
    torn_picture,
    large_upload,
    slow_body,
    nan_deadline,
    nonsense,
    flood,
    reconnect_storm,
    slow_reader,
    vanishing,
    greedy,
    foreign_page,
    foreign_name,
    path_walker,
)
SLOW = {half_open, silent_socket, slow_body}  # take as long as the server waits


async def attack(server: Server, kind: Hostile) -> str:
    """What a client of this kind gets; never raises because of the server."""
    try:
        return await asyncio.wait_for(kind(server), 2 * ANSWER_S)
    except InvalidStatus as error:
        return f"handshake refused: {error.response.status_code}"
    except (ConnectionClosed, OSError, EOFError, TimeoutError) as error:
        return type(error).__name__
