"""The ASGI application: routes, the socket, and the guard before them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute

from asd_rt.serve.access import Access, Guard
from asd_rt.serve.http import routes
from asd_rt.serve.service import Service
from asd_rt.serve.watch import watch


def make_app(service: Service, access: Access) -> Starlette:
    """The application over `service`, which it closes when the server stops."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.close()

    app = Starlette(
        routes=[*routes(), WebSocketRoute("/v1/live", watch)],
        middleware=[Middleware(Guard, access=access, metrics=service.metrics)],
        lifespan=lifespan,
    )
    app.state.service = service
    return app
