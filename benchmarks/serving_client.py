"""A server process of `asd-rt serve`, and a well-behaved watcher of it, for benchmarks and tests."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from time import perf_counter
from typing import Any, Protocol

from websockets.asyncio.client import ClientConnection, connect

from asd_rt.serve.protocol import unpack_block

PROMPTS = ("a red three moving right", "a blue seven moving left")
START_S, STOP_S, MOST_S = 60.0, 30.0, 900.0


@dataclass
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[str] | None = None

    @property
    def live_url(self) -> str:
        return self.url.replace("http", "ws", 1) + "/v1/live"

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str) -> bytes:
        """The body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            found: bytes = answer.read()
        return found

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        values = re.findall(rf"^{name}(?:{{.*}})? (.+)$", self.get("/metrics").decode(), re.M)
        return sum(map(float, values))


@contextmanager
def running(*flags: str, token: str | None = None) -> Iterator[Server]:
    """`asd-rt serve` on a free port of this machine, stopped at the end of the block.

    Raises:
        RuntimeError: it does not start.
    """
    environment = dict(os.environ) | ({} if token is None else {"ASD_RT_TOKEN": token})
    command = [sys.executable, "-m", "asd_rt", "serve", "--port", "0", *flags]
    with started(command, environment) as server:
        yield server


@contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[Server]:
    """A server by a command that prints its address first, stopped at the end of the block.

    Raises:
        RuntimeError: it does not start.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("http://"):
            problem = process.stderr.read() if process.stderr else ""
            raise RuntimeError(f"the server did not start: {line}{problem}")
        yield Server(line.split()[0], process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@dataclass
class Watched:
    """What a watcher saw.

    Attributes:
        first_ms: from `start` to the first block.
        arrivals: seconds since `start` at which each block came.
        headers: of the blocks.
        frames: received.
        events: that are not blocks.
    """

    first_ms: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    headers: list[dict[str, Any]] = field(default_factory=list)
    frames: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def fps(self) -> float:
        """Frames a second behind the first block."""
        took = self.arrivals[-1] - self.arrivals[0] if self.arrivals else 0.0
        first = len(self.headers[0]["sizes"]) if self.headers else 0
        return (self.frames - first) / took if took else 0.0

    @property
    def dropped(self) -> int:
        """Frames that the server left out for this watcher."""
        return int(self.headers[-1]["dropped"]) if self.headers else 0


async def open_socket(
    server: Server, address: str = "127.0.0.1", near: str = "", **more: Any
) -> ClientConnection:
    """A WebSocket from a local address, its `hello` read; `near`: an id of what it is to be with."""
    socket = await connect(
        server.live_url + (f"?near={near}" if near else ""),
        local_addr=(address, 0),
        max_size=None,
        compression=None,
        **more,
    )
    await socket.recv()
    return socket


class WatcherProcess:
    """A watcher in a process of its own, so that it is not slowed by what the others do in this one."""

    def __init__(self, server: Server, **settings: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        self._receiver, sender = context.Pipe(duplex=False)
        arguments = (server.url, self._stop, sender, settings)
        self._process = context.Process(target=_watch_until, args=arguments, daemon=True)
        self._process.start()

    def stop(self) -> Watched:
        """End it; what it saw.

        Raises:
            RuntimeError: it has failed.
        """
        self._stop.set()
        found = self._receiver.recv() if self._receiver.poll(START_S) else None
        self._process.join(STOP_S)
        if not isinstance(found, Watched):
            raise RuntimeError(f"the watcher failed: {found}")
        return found


def _watch_until(url: str, stop: Event, sender: Connection, settings: dict[str, Any]) -> None:
    try:
        sender.send(asyncio.run(watch(Server(url), MOST_S, stop, **settings)))
    except Exception as error:  # whatever it is, the other process has to know
        sender.send(repr(error))
        raise


class Stop(Protocol):
    """An event of any kind."""

    def is_set(self) -> bool: ...


async def watch(
    server: Server,
    seconds: float,
    stop: Stop | None = None,
    ack_delay_s: float = 0.0,
    **settings: Any,
) -> Watched:
    """Watch a video for a while, or until `stop`, acknowledging each block `ack_delay_s` after it came."""
    seen = Watched()
    async with await open_socket(server) as socket:
        begin = perf_counter()
        await socket.send(json.dumps({"type": "start", "prompt": PROMPTS[0]} | settings))
        while perf_counter() - begin < seconds and not (stop and stop.is_set()):
            try:
                found = await asyncio.wait_for(socket.recv(), 1.0)
            except TimeoutError:
                continue
            if isinstance(found, str):
                seen.events.append(json.loads(found))
                continue
            now = perf_counter() - begin
            header, images = unpack_block(found)
            seen.first_ms = seen.first_ms or now * 1e3
            seen.arrivals.append(now)
            seen.headers.append(header)
            seen.frames += len(images)
            if ack_delay_s:
                await asyncio.sleep(ack_delay_s)
            await socket.send(json.dumps({"type": "ack", "block": header["block"]}))
    return seen
