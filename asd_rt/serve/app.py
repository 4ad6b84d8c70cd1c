"""The ASGI application: routes, the socket, and the guard before them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute

from asd_rt.machine import give_back_memory
from asd_rt.serve.access import Access, Guard
from asd_rt.serve.http import routes
from asd_rt.serve.service import Service
from asd_rt.serve.watch import watch

TIDY_S = 5.0


async def _tidy() -> None:
    """Give back, every few seconds, what bursts of requests have left; it takes a millisecond or two."""
    while True:
        await asyncio.sleep(TIDY_S)
        await asyncio.to_thread(give_back_memory)


def make_app(service: Service, access: Access) -> Starlette:
    """The application over `service`, which it closes when the server stops."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        tidying = asyncio.create_task(_tidy())
        yield
        tidying.cancel()
        service.close()

    app = Starlette(
        routes=[*routes(), WebSocketRoute("/v1/live", watch)],
        middleware=[Middleware(Guard, access=access, metrics=service.metrics)],
        lifespan=lifespan,
    )
    app.state.service = service
    return app
