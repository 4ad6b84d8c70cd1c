"""`asd-rt serve`: live video in a browser, and clips over HTTP."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from asd_rt.commands.common import Outcome, Problems, add_engine, find_engine
from asd_rt.errors import BackendError
from asd_rt.steering import check_refresh

if TYPE_CHECKING:
    from socket import socket

    from asd_rt.serve.access import Access
    from asd_rt.serve.service import Service

HELP = "serve live video to browsers, and clips over HTTP"
EXAMPLES = """examples:
  asd-rt serve                                    # then open http://127.0.0.1:8000
  asd-rt serve --engine engines/asd_fp32.onnx --port 9000 --sessions 4
  ASD_RT_TOKEN=... asd-rt serve --host 0.0.0.0    # then open http://HOST:8000/#token=...
  curl -X POST http://127.0.0.1:8000/v1/videos -d '{"prompt": "a red three moving right"}'

Only this machine can reach it unless --host says otherwise, which needs a token in ASD_RT_TOKEN.
/healthz, /readyz and /metrics are for machines; docs/serve.md describes all requests and limits.
"""
NEEDED = ("starlette", "uvicorn", "websockets", "prometheus_client", "PIL")
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `serve`."""
    add_engine(parser)
    parser.add_argument(
        "--host", default=DEFAULT_HOST, metavar="ADDRESS", help=f"default: {DEFAULT_HOST}"
    )
    parser.add_argument(
        "--port", metavar="N", help=f"0 = a free one, which is printed (default: {DEFAULT_PORT})"
    )
    parser.add_argument(
        "--sessions",
        metavar="N",
        help="live videos at once (default: as many as fit into half of the memory, at most 8)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        help="videos made side by side, which share the threads (default: one a core for a small network on "
        "the CPU; else they take turns)",
    )
    parser.add_argument(
        "--client-sessions",
        metavar="N",
        help="live videos of one client address (default: 4)",
    )
    parser.add_argument("--clip-frames", metavar="N", help="latent frames of a clip (default: 480)")
    parser.add_argument(
        "--latent-size", metavar="HxW", help="latent size, for an engine that fixes none"
    )
    parser.add_argument(
        "--refresh-every",
        metavar="N",
        help="a live video starts over from its first block every N blocks, against drift (default: never)",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a page from there may use this server, such as https://example.org; may be given again",
    )
    parser.set_defaults(json=False)


def execute(args: argparse.Namespace) -> Outcome:
    """Open the engine, warm it up, serve until interrupted.

    Raises:
        AsdError: anything the user can mend.
    """
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        raise BackendError(
            f"serve needs {', '.join(absent)}, which cannot be imported; install: pip install 'asd-rt[serve]'"
        )
    from asd_rt.serve.access import TOKEN_VARIABLE, access_of
    from asd_rt.serve.limits import Limits
    from asd_rt.serve.opening import open_shared
    from asd_rt.serve.pool import plan_pool
    from asd_rt.serve.server import bind
    from asd_rt.serve.service import Service

    problems, defaults = Problems(), Limits()
    threads = problems.integer("--threads", args.threads, 1)
    port = problems.integer("--port", args.port, 0, 65535)
    sessions = problems.integer("--sessions", args.sessions, 1, 1000)
    workers = problems.integer("--workers", args.workers, 1, 1000)
    per_client = problems.integer("--client-sessions", args.client_sessions, 1, 1000)
    clip_frames = problems.integer("--clip-frames", args.clip_frames, 1, 100_000)
    size = problems.latent_size("--latent-size", args.latent_size)
    refresh_every = problems.integer("--refresh-every", args.refresh_every, 1)
    access: Access | None = None
    with problems.collect():
        access = access_of(args.host, os.environ.get(TOKEN_VARIABLE) or None, args.allow_origin)
    found = find_engine(problems, args.engine)
    if found:
        with problems.collect():
            every = check_refresh(refresh_every or 0, found[1].cache)
            plan = replace(plan_pool(*found, sessions, size), refresh_every=every)
    problems.raise_any()
    path, manifest = found  # type: ignore[misc]
    limits = Limits(
        client_sessions=per_client or defaults.client_sessions,
        clip_frames=clip_frames or defaults.clip_frames,
    )
    with ExitStack() as opened:
        listener = opened.enter_context(bind(args.host, DEFAULT_PORT if port is None else port))
        session, side_by_side = open_shared(
            path, manifest, plan.sessions, threads, workers, args.device
        )
        opened.enter_context(session)
        service = Service(session, plan, limits, workers=side_by_side)
        service.start()
        host, bound = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{bound}  {path}, {plan.sessions} live videos at once", flush=True)  # noqa: T201
        serve(service, access, listener)
    return Outcome({}, "stopped")


def serve(service: Service, access: Access, listener: socket) -> None:
    """Serve until a signal comes."""
    from asd_rt.serve.server import make_server

    try:
        make_server(service, access).run(sockets=[listener])
    except KeyboardInterrupt:
        return  # it has stopped in good order, and says so as every program does
