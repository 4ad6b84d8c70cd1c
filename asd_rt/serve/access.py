"""Who may come in: host names, origins and the token, checked before anything else of a request."""

from __future__ import annotations

import hmac
import ipaddress
import re
from dataclasses import dataclass

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asd_rt.errors import ConfigError
from asd_rt.serve.metrics import Metrics

TOKEN_VARIABLE = "ASD_RT_TOKEN"
TOKEN_PREFIX = (
    "token."  # of the subprotocol by which a browser sends it: it can set no header there
)
OPEN_PATHS = frozenset(
    {"/", "/app.js", "/player.js", "/style.css", "/favicon.svg", "/healthz", "/readyz"}
)
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
SECURITY_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
ANSWERED_FIRST = {
    "access-control-allow-methods": "GET, POST, DELETE",
    "access-control-allow-headers": "authorization, content-type",
    "access-control-max-age": "600",
}
_TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,128}")
_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:]+\](:[0-9]{1,5})?")
_PORT = re.compile(r":[0-9]{1,5}$")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Access:
    """Who may come in.

    Attributes:
        token: None = no token is needed.
        host_names: that a request may name in its Host header; None = any.
        origins: of pages beside the server's own that may use it.
    """

    token: str | None
    host_names: frozenset[str] | None
    origins: frozenset[str]


def access_of(host: str, token: str | None, origins: list[str]) -> Access:
    """Access to a server at `host`.

    Raises:
        ConfigError: a host that others can reach and no token, a token that is too short or of other
            characters than a header takes, or an origin that no browser sends.
    """
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--allow-origin {origin}: expected a scheme, a host in lower case and perhaps a port, such "
                "as https://example.org or http://localhost:3000"
            )
    local = is_loopback(host)
    if token is None and not local:
        raise ConfigError(
            f"--host {host}: others can reach it, so it needs a token: set {TOKEN_VARIABLE}, such as to the "
            "output of: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    if token is not None and not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"{TOKEN_VARIABLE}: a token has 16 to 128 letters, digits and . _ ~ -, found {len(token)} "
            "characters"
        )
    return Access(token, LOCAL_NAMES | {host} if local else None, frozenset(origins))


class Guard:
    """Lets in what `access` allows; anything else gets 401, 403 or 421 and one line of reason."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self._app, self._access, self._metrics = app, access, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        refused = self._refusal(scope, headers)
        origin = headers.get("origin", "")
        send = _with_headers(send, origin if origin in self._access.origins else "")
        # A browser asks whether another page may send a request, and sends no token with the question.
        if _is_preflight(scope, headers) and (refused is None or refused[1] == "token"):
            await Response(status_code=204, headers=ANSWERED_FIRST)(scope, receive, send)
            return
        if refused is None:
            await self._app(scope, receive, send)
            return
        status, reason, message = refused
        self._metrics.refused.labels(reason).inc()
        answer = JSONResponse({"error": {"code": reason, "message": message}}, status)
        await answer(scope, receive, send)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        access, host = self._access, headers.get("host", "")
        name = _PORT.sub("", host).lower()
        if access.host_names is not None and name not in access.host_names:
            return 421, "host", "this server is not known by that name"
        origin = headers.get("origin")
        if origin is not None and origin not in access.origins:
            own = {f"http://{host}", f"https://{host}"}
            if origin not in own:
                return 403, "origin", "pages from elsewhere may not use this server; --allow-origin"
        if access.token is None or scope["path"] in OPEN_PATHS:
            return None
        if not _same(_offered(scope, headers), access.token):
            return (
                401,
                "token",
                "needs the header Authorization: Bearer TOKEN, with the server's token",
            )
        return None


def _offered(scope: Scope, headers: dict[str, str]) -> str:
    kind, _, token = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return token.strip()
    for protocol in scope.get("subprotocols", ()):
        if protocol.startswith(TOKEN_PREFIX):
            return str(protocol[len(TOKEN_PREFIX) :])
    return ""


def _same(offered: str, token: str) -> bool:
    """Compares in constant time."""
    return hmac.compare_digest(offered.encode(errors="replace"), token.encode())


def _is_preflight(scope: Scope, headers: dict[str, str]) -> bool:
    asked = "access-control-request-method" in headers
    return asked and scope["type"] == "http" and scope["method"] == "OPTIONS"


def _with_headers(send: Send, origin: str) -> Send:
    """Adds headers to answers, also those by which a page of another `origin` may read them ("" = none)."""
    added = list(SECURITY_HEADERS)
    if origin:
        added += [(b"access-control-allow-origin", origin.encode()), (b"vary", b"origin")]

    async def wrapped(message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            message["headers"] = [*message.get("headers", ()), *added]
        await send(message)

    return wrapped
