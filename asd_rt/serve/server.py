"""The server process: uvicorn, with limits on what happens before a request is complete."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from asd_rt.errors import ConfigError
from asd_rt.serve.access import Access
from asd_rt.serve.app import make_app
from asd_rt.serve.limits import Limits
from asd_rt.serve.service import Service

PING_S = 10.0  # between pings, and for an answer to one
STOP_S = 5  # for open connections to end


class PunctualProtocol(H11Protocol):
    """uvicorn's HTTP, but a connection that has sent no whole request in time is closed."""

    start_s = Limits.start_s
    _alarm: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._alarm = self.loop.call_later(self.start_s, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._disarm()  # another protocol takes over, and nothing may keep this one
        super().handle_websocket_upgrade(event)

    def _disarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()

    def _check(self) -> None:
        cycle: object | None = self.cycle
        if cycle is None:
            self.transport.abort()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 = a free one.

    Raises:
        ConfigError: the address is not this machine's, or taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot be listened on ({error.strerror}); choose another --port"
        ) from error
    listener.listen(128)
    listener.set_inheritable(True)
    return listener


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's log says something; a refused handshake is our answer, and no error."""
    return "without completing handshake" not in record.getMessage()


def make_server(service: Service, access: Access) -> uvicorn.Server:
    """A server over `service`; run it with a socket of `bind`."""
    limits = service.limits
    logging.getLogger("uvicorn.error").addFilter(_is_news)

    class Protocol(PunctualProtocol):
        start_s = limits.start_s

    settings: dict[str, Any] = {
        "loop": "asyncio",  # whatever else is installed
        "http": Protocol,
        "ws": "websockets-sansio",
        "ws_max_size": limits.message_bytes,
        "ws_ping_interval": PING_S,
        "ws_ping_timeout": PING_S,
        "ws_per_message_deflate": False,  # pictures are small already, and bombs are not
        "limit_concurrency": limits.connections,
        "timeout_graceful_shutdown": STOP_S,
        "proxy_headers": False,
        "server_header": False,
        "access_log": False,
        "log_config": None,
        "lifespan": "on",
    }
    return uvicorn.Server(uvicorn.Config(make_app(service, access), **settings))
