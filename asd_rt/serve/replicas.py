"""Several servers behind one address, by Ray Serve; each replica has an engine and all that is made with it.

What a replica holds has an id that names the replica. Requests with such an id, in the path or as
`?near=ID`, go there; others go where the fewest connections are. A replica that dies takes its videos with
it: their clients are told, and find room in the others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from urllib.request import urlopen

from ray import serve
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asd_rt.errors import ConfigError
from asd_rt.manifest import read_manifest
from asd_rt.serve.access import Access
from asd_rt.serve.app import make_app
from asd_rt.serve.ids import replica_of
from asd_rt.serve.limits import Limits
from asd_rt.serve.opening import open_shared
from asd_rt.serve.pool import plan_pool
from asd_rt.serve.service import Service

NAME = "asd-rt"
# Ray's proxies hand this header's value on to routers. Nothing here is a multiplexed model, so it is free.
PIN_HEADER = b"serve_multiplexed_model_id"
RESTARTS = 1012  # of RFC 6455's registry: service restart
GONE = "the replica that made this video has gone; a new video begins elsewhere"
STOP_S = 5.0
PROBES = 8
# Ray's proxies read it when they start.
CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "asd_rt.serve.replicas.doormen"


@dataclass(frozen=True)
class Replica:
    """What each replica serves.

    Attributes:
        engine: path of the engine's file, the same on every machine.
        access: who may come in.
        limits: of each replica; a client's are counted by each replica for itself.
        sessions: live videos of each at once; None = as many as half of the memory allows, at most 8.
        latent_hw: of an engine that fixes no size.
        threads: of each; None = as many as usable cores.
        workers: videos that each makes side by side; None = what suits the engine.
    """

    engine: Path
    access: Access
    limits: Limits = field(default_factory=Limits)
    sessions: int | None = None
    latent_hw: tuple[int, int] | None = None
    threads: int | None = None
    workers: int | None = None

    def open(self, name: str) -> Service:
        """The engine being served by the replica `name`, warm; in its process.

        Raises:
            AsdError: the engine cannot be opened, or so many sessions do not fit.
        """
        manifest = read_manifest(self.engine)
        plan = plan_pool(self.engine, manifest, self.sessions, self.latent_hw)
        session, workers = open_shared(
            self.engine, manifest, plan.sessions, self.threads, self.workers
        )
        service = Service(session, plan, self.limits, name, workers)
        service.start()
        return service


class Server:
    """One replica in its process, as Ray sees it."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._service = replica.open(serve.get_replica_context().replica_id.unique_id)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return make_app(self._service, self._replica.access)

    def check_health(self) -> None:
        """Ray replaces a replica that raises here.

        Raises:
            RuntimeError: the engine's thread has ended.
        """
        if not self._service.worker.is_alive:
            raise RuntimeError("the engine's thread has ended")


class Pinning(RequestRouter):  # type: ignore[misc]
    """Sends a request to the replica that it names, and others to that with the fewest open ones.

    Who names a replica that is not there (any more) is answered by another, which says so.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, the first ones first."""
        wanted = pending_request.metadata.multiplexed_model_id if pending_request else ""
        for replica in candidate_replicas:
            if wanted and replica.replica_id.unique_id == wanted:
                return [[replica]]
        return [candidate_replicas]


class Doorman:
    """What Ray's proxies do for requests of ours: say where they belong, and why a connection ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = [pair for pair in scope["headers"] if pair[0].lower() != PIN_HEADER]
        pin = pin_of(scope)
        if pin:
            headers.append((PIN_HEADER, pin.encode()))
        scope = {**scope, "headers": headers}
        if scope["type"] == "http":
            await self._app(scope, receive, send)
            return
        open_ = False

        async def watched(message: Message) -> None:
            nonlocal open_
            open_ = message["type"] == "websocket.accept" or (
                open_ and message["type"] != "websocket.close"
            )
            await send(message)

        async def receiving() -> Message:
            nonlocal open_
            message = await receive()
            open_ = open_ and message["type"] != "websocket.disconnect"
            return message

        await self._app(scope, receiving, watched)
        if open_:  # neither side has closed it: there is nobody behind it any more
            await send({"type": "websocket.close", "code": RESTARTS, "reason": GONE})


def pin_of(scope: Scope) -> str:
    """The replica that a request names: by an id in its path, else by `?near=ID`; "" = none."""
    parts = [part for part in scope["path"].split("/") if part]
    if len(parts) >= 3 and parts[:2] == ["v1", "videos"]:
        return ascii_only(replica_of(parts[2]))
    near = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("near", [""])
    return ascii_only(replica_of(near[0]))


def ascii_only(name: str) -> str:
    """`name`, or "" where it cannot be a replica's."""
    return name if name.isascii() and name.isalnum() else ""


def start(
    replica: Replica,
    replicas: int,
    host: str,
    port: int,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> None:
    """Serve from `replicas` copies of `replica`, on the Ray cluster that `ray.init` has joined or begun.

    Returns when all are ready.

    Args:
        replica: what each serves.
        replicas: how many; Ray starts another for each that dies.
        host, port: that the proxy of every machine listens on.
        cpus, gpus: that Ray counts for each, to find machines with room.

    Raises:
        ConfigError: the proxies do not do what they are for; see `CALLBACK`.
        RuntimeError: Ray cannot start them.
    """
    serve.start(
        proxy_location="EveryNode",
        http_options=HTTPOptions(host=host, port=port, request_timeout_s=None),
    )
    deployment = serve.deployment(
        serve.ingress()(Server),
        name=NAME,
        num_replicas=replicas,
        max_ongoing_requests=replica.limits.connections,
        graceful_shutdown_timeout_s=STOP_S,
        health_check_period_s=2.0,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        request_router_config=RequestRouterConfig(request_router_class=Pinning),
    )
    serve.run(deployment.bind(replica), name=NAME, route_prefix="/")
    check_pinning(host, port)


def check_pinning(host: str, port: int) -> None:
    """Ask a replica for its name, and then that very one again.

    Raises:
        ConfigError: the proxy does not send requests where they belong.
    """
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{reached}]" if ":" in reached else f"http://{reached}"
    wanted = name = None
    for near in ("", *["?near={}."] * PROBES):
        with urlopen(f"{url}:{port}/readyz{near.format(wanted)}", timeout=30) as answer:
            name = json.load(answer)["replica"]
        wanted = wanted or name
        if name != wanted:
            raise ConfigError(
                f"Ray's proxy at {host}:{port} does not pin requests to replicas; start Ray with "
                f"{CALLBACK_VARIABLE}={CALLBACK} in its environment"
            )


def doormen() -> list[Middleware]:
    """What Ray's proxies put before requests, if their environment names this function."""
    return [Middleware(Doorman)]


def stop() -> None:
    """End the replicas; other applications of the cluster go on."""
    if NAME in serve.status().applications:
        serve.delete(NAME)


def status() -> dict[str, Any]:
    """How many replicas are in which state, by Ray's names for them."""
    found = serve.status().applications.get(NAME)
    if found is None:
        return {}
    return {
        state.name: n
        for one in found.deployments.values()
        for state, n in one.replica_states.items()
    }
