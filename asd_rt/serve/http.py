"""The HTTP side: the page, clips, uploads, health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from asd_rt.arguments import default_frames, make_plan
from asd_rt.errors import AsdError, ConfigError
from asd_rt.kv_cache import FrameSlots
from asd_rt.serve.clips import ClipsFull
from asd_rt.serve.protocol import MessageError
from asd_rt.serve.service import Service
from asd_rt.serve.uploads import UploadsFull

BODY_S = 15.0  # for a whole body to arrive
DISCARDED_BYTES = 64 << 20  # read of a body that is too large, so that its sender hears so
PAGE = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/player.js": ("player.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
RETRY = {"retry-after": "10"}
Handler = Callable[[Request], Awaitable[Response]]


class BodyError(AsdError):
    """A request's body is too large or too slow; `status` is the answer's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def routes() -> list[Route]:
    """All HTTP routes. Files of the page are read once, here: no path of a request opens a file."""
    folder = files("asd_rt.serve") / "static"
    page = [
        Route(path, _static((folder / name).read_bytes(), kind))
        for path, (name, kind) in PAGE.items()
    ]
    return [
        *page,
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/metrics", metrics),
        Route("/v1/videos", _answering(ask_clip), methods=["POST"]),
        Route("/v1/videos/{clip}", _answering(clip_status), methods=["GET"]),
        Route("/v1/videos/{clip}", _answering(clip_remove), methods=["DELETE"]),
        Route("/v1/videos/{clip}/content", _answering(clip_content), methods=["GET"]),
        Route("/v1/uploads", _answering(upload), methods=["POST"]),
    ]


def _static(content: bytes, kind: str) -> Handler:
    async def answer(request: Request) -> Response:
        return Response(content, media_type=kind)

    return answer


def _answering(handler: Handler) -> Handler:
    """Errors of ours become answers: one line, and a code for programs."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except BodyError as error:
            return _error(request, error.status, "body", str(error))
        except (ClipsFull, UploadsFull) as error:
            return _error(request, 503, "full", str(error), RETRY)
        except MessageError as error:
            return _error(request, 422, error.code, str(error))
        except AsdError as error:
            return _error(request, 422, "prompt", str(error))
        except ClientDisconnect:
            return Response(status_code=400)

    return answer


def _error(
    request: Request, status: int, code: str, message: str, headers: dict[str, str] | None = None
) -> Response:
    _service(request).metrics.refused.labels(code).inc()
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def healthz(request: Request) -> Response:
    """200 while the engine's thread runs or is about to, else 500."""
    service = _service(request)
    broken = service.readiness.warm and not service.worker.is_alive
    return JSONResponse({"alive": not broken}, 500 if broken else 200)


async def readyz(request: Request) -> Response:
    """200 when videos can be asked for, else 503; and how many places are free."""
    service = _service(request)
    ready = service.readiness.warm and service.worker.is_alive
    document = {
        "ready": ready,
        "places": service.pool.plan.sessions,
        "free": service.pool.free + len(service.seats.lost),  # which give way
    } | ({"replica": service.ids.replica} if service.ids.replica else {})
    return JSONResponse(document, 200 if ready else 503)


async def metrics(request: Request) -> Response:
    """Counters in Prometheus' text format."""
    return Response(
        _service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


async def ask_clip(request: Request) -> Response:
    """Queue a clip: 202 and its id."""
    service = _service(request)
    body = await _body(request, service.limits.message_bytes)
    prompt, frames, settings = service.reader.clip(body.decode("utf-8", "replace"))
    manifest = service.session.manifest
    latent_frames = frames or min(default_frames(manifest), service.limits.clip_frames)
    # Does it fit together, and into the cache and the memory for raw frames?
    make_plan(manifest, settings.steps, settings.first_steps, settings.deadline_ms)
    try:
        FrameSlots(manifest.cache, latent_frames)
    except ConfigError as error:
        raise MessageError(f"frames: {error}") from error
    service.check_clip(latent_frames)
    loop = asyncio.get_running_loop()
    context = await loop.run_in_executor(service.prompts, service.context, prompt)
    clip = service.clips.ask(prompt, context, latent_frames, settings)
    service.worker.wake()
    where = f"/v1/videos/{clip.id}"
    return JSONResponse(clip.to_json(), 202, {"location": where})


async def clip_status(request: Request) -> Response:
    """How far a clip is."""
    clip = _service(request).clips.get(request.path_params["clip"])
    return _absent(request) if clip is None else JSONResponse(clip.to_json())


async def clip_remove(request: Request) -> Response:
    """Cancel or forget a clip."""
    clip = _service(request).clips.remove(request.path_params["clip"])
    return _absent(request) if clip is None else JSONResponse(clip.to_json())


async def clip_content(request: Request) -> Response:
    """A finished clip as .mp4."""
    clip = _service(request).clips.get(request.path_params["clip"])
    if clip is None:
        return _absent(request)
    if clip.status != "done":
        return _error(request, 409, "unfinished", f"the clip is {clip.status}")
    headers = {"content-disposition": 'attachment; filename="asd-rt.mp4"'}
    return Response(clip.mp4, media_type="video/mp4", headers=headers)


async def upload(request: Request) -> Response:
    """Decode a picture or clip to start from: 201 and its id."""
    service = _service(request)
    data = await _body(request, service.limits.upload_bytes)
    name, count = await service.uploads.add(data)
    return JSONResponse({"id": name, "frames": count}, 201)


def _absent(request: Request) -> Response:
    return _error(request, 404, "absent", "there is no such clip (any more)")


async def _body(request: Request, most: int) -> bytes:
    """A request's body.

    Raises:
        BodyError: it is longer than `most` bytes, or takes too long to arrive.
    """
    too_large = BodyError(413, f"a body of more than {most} bytes")
    told = request.headers.get("content-length", "")
    refused = told.isdecimal() and int(told) > most
    if refused and "expect" in request.headers:
        raise too_large  # it waits to hear this before it sends
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                refused = refused or size > most
                if size > DISCARDED_BYTES:
                    break
                if refused:
                    parts.clear()
                else:
                    parts.append(part)
    except TimeoutError as error:
        if not refused:
            raise BodyError(408, f"the body took more than {BODY_S:g} s to arrive") from error
    if refused:
        raise too_large
    return b"".join(parts)
