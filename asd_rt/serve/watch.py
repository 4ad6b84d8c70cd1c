"""The WebSocket: one watcher, one live video."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack
from time import monotonic
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from asd_rt.errors import AsdError
from asd_rt.serve.frames import to_jpeg
from asd_rt.serve.limits import Rate
from asd_rt.serve.live import LiveVideo
from asd_rt.serve.outbox import Outbox, Piece
from asd_rt.serve.protocol import SUBPROTOCOL, Message, MessageError, pack_block
from asd_rt.serve.service import Service

# Close codes: 1008 and 1013 of RFC 6455's registry, and two of ours.
UNFIT, FULL, SILENT, FAILED = 1008, 1013, 4408, 4500
CHECK_S = 1.0
_log = logging.getLogger(__name__)


class Ended(Exception):
    """The connection is to be closed with this code and reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


async def watch(socket: WebSocket) -> None:
    """Serve one connection from handshake to close."""
    service: Service = socket.app.state.service
    client = socket.client.host if socket.client else ""
    offered = socket.scope.get("subprotocols", ())
    await socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
    with (
        service.sockets.hold(client) as of_client,
        service.all_sockets.hold("") as of_all,
        service.metrics.sockets.track_inprogress(),
    ):
        if not (of_client and of_all):
            service.metrics.refused.labels("sockets").inc()
            whose = "from your address; close some" if of_all else "in all; try again in a minute"
            await _close(socket, FULL, f"too many connections {whose}")
            return
        watcher = Watcher(socket, service, client)
        try:
            await watcher.run()
        except Ended as end:
            await _close(socket, end.code, end.reason)
        except (WebSocketDisconnect, RuntimeError, OSError) as error:  # it has gone, at any point
            _log.debug("%s: gone (%s)", client, error)


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    try:
        await socket.close(code, reason[:120])
    except (RuntimeError, OSError, WebSocketDisconnect) as error:
        _log.debug("gone before it could be closed (%s)", error)


class Watcher:
    """One connection."""

    def __init__(self, socket: WebSocket, service: Service, client: str) -> None:
        self._socket, self._service, self._client = socket, service, client
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox()
        self._video: LiveVideo | None = None
        self._rate = Rate(service.limits.messages_per_s, service.limits.message_burst)
        self._broken = self._prompts = 0
        self._wanted: Message | None = None  # prompt to switch to; a newer one takes its place
        self._wants = asyncio.Event()
        self._opened = self._loop.time()

    async def run(self) -> None:
        """Until the client goes or has to.

        Raises:
            Ended: it has to go.
            WebSocketDisconnect: it has gone.
        """
        self._outbox.event(self._hello())
        works = (self._receive, self._send, self._switch_prompts, self._look_after)
        tasks = [self._loop.create_task(work()) for work in works]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._video is not None:
                self._video.close()
                self._service.worker.wake()

    def _hello(self) -> dict[str, Any]:
        service, manifest = self._service, self._service.session.manifest
        rows, columns = service.frame_hw
        return {
            "type": "hello",
            "engine": manifest.name,
            "width": columns,
            "height": rows,
            "fps": manifest.fps,
            "block_frames": manifest.cache.block_frames,
            "prompt_chars": service.limits.prompt_chars,
            "words": list((manifest.tokenizer or {}).get("words", {})),
            "starts_from_uploads": "encoder" in manifest.parts,
            "upload_bytes": service.limits.upload_bytes,
        }

    async def _look_after(self) -> None:
        """Close connections that ask for nothing or acknowledge nothing."""
        limits = self._service.limits
        while True:
            await asyncio.sleep(CHECK_S)
            now = self._loop.time()
            if self._video is None and now - self._opened > limits.start_s:
                raise Ended(SILENT, f"no start within {limits.start_s:g} s")
            since = self._outbox.unacknowledged_since
            if since is not None and now - since > limits.ack_s:
                raise Ended(SILENT, f"no block acknowledged for {limits.ack_s:g} s")

    # Out.

    async def _send(self) -> None:
        while True:
            found = await self._outbox.next(self._loop.time)
            if isinstance(found, Piece):
                jpegs = self._service.jpegs
                images = await self._loop.run_in_executor(jpegs, to_jpeg, found.frames)
                header = found.header | {
                    "dropped": self._outbox.dropped,
                    "on_their_way": self._outbox.on_their_way,
                    "age_ms": round((monotonic() - found.made_at) * 1e3, 3),
                }
                await self._socket.send_bytes(pack_block(header, images))
                self._service.metrics.sent.inc(len(images))
                continue
            await self._socket.send_json(found)
            if found.get("fatal"):
                raise Ended(FAILED, str(found["message"]))

    def _show(self, piece: Piece) -> None:
        lost = self._outbox.put(piece)
        if lost:
            self._service.metrics.dropped.inc(lost)

    def _from_worker(self, call: Callable[[Any], None]) -> Callable[[Any], None]:
        """`call` for the worker's thread: it runs in the event loop."""

        def later(found: Any) -> None:
            try:
                self._loop.call_soon_threadsafe(call, found)
            except RuntimeError as error:  # the loop has ended, and with it the connection
                _log.debug("too late: %s", error)

        return later

    # In.

    async def _receive(self) -> None:
        while True:
            received = await self._socket.receive()
            if received["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(received.get("code", 1005))
            if not self._rate.take(self._loop.time()):
                self._refused("rate")
                raise Ended(UNFIT, "too many messages")
            text = received.get("text")
            try:
                if text is None:
                    raise MessageError("a message must be text, found bytes")
                await self._obey(self._service.reader.message(text))
            except MessageError as error:
                self._complain(error.code, str(error))
            except AsdError as error:
                self._refuse("prompt", str(error))

    def _complain(self, code: str, message: str) -> None:
        self._refuse(code, message)
        self._broken += 1
        if self._broken > self._service.limits.broken_messages:
            raise Ended(UNFIT, "too many messages that are wrong")

    def _refuse(self, code: str, message: str) -> None:
        self._refused(code)
        self._outbox.event({"type": "error", "code": code, "message": message})

    def _refused(self, reason: str) -> None:
        self._service.metrics.refused.labels(reason).inc()

    async def _obey(self, message: Message) -> None:
        if message.type == "start":
            await self._start(message)
            return
        video = self._video
        if video is None:
            raise MessageError(f"{message.type}: comes before start", "order")
        if message.type == "ack":
            self._outbox.ack(message.block, self._loop.time())
            return
        if message.type == "prompt":
            self._wanted = message
            self._wants.set()
            return
        if message.type in ("pause", "resume"):
            self._outbox.forget()
        if message.type == "set":
            video.change(message.settings, message.given)
        elif message.type == "reset":
            video.reset(message.settings.seed)
        else:
            {
                "pause": video.pause,
                "resume": video.resume,
                "record": video.record,
                "save": video.save,
            }[message.type]()
        self._service.worker.wake()

    async def _switch_prompts(self) -> None:
        """Beside the messages, for a text encoder may take seconds, and acknowledgements must not wait."""
        while True:
            await self._wants.wait()
            self._wants.clear()
            wanted, self._wanted = self._wanted, None
            if wanted is None or self._video is None:
                continue
            try:
                context = await self._context(wanted.prompt)
            except AsdError as error:
                self._refuse("prompt", str(error))
                continue
            self._prompts += 1
            self._video.switch(context, self._prompts, wanted.recache)
            told = {"type": "prompt", "prompt": wanted.prompt, "prompt_id": self._prompts}
            self._outbox.event(told)
            self._service.worker.wake()

    async def _context(self, prompt: str) -> Any:
        service = self._service
        return await self._loop.run_in_executor(service.prompts, service.context, prompt)

    async def _start(self, message: Message) -> None:
        service = self._service
        if self._video is not None:
            raise MessageError("start: was sent already; send prompt, set or reset", "order")
        start = None if message.upload is None else service.uploads.get(message.upload)
        context = await self._context(message.prompt)
        held = ExitStack()
        if not held.enter_context(service.watchers.hold(self._client)):
            self._refused("client_sessions")
            most = service.limits.client_sessions
            raise Ended(FULL, f"your address has {most} live videos already; close one")
        place = service.take()
        if place is None:
            held.close()
            self._refused("full")
            most = service.pool.plan.sessions
            raise Ended(FULL, f"all {most} places are taken; try again in a minute")
        service.metrics.sessions.inc()
        release = self._from_worker(lambda _: held.close())

        def ended() -> None:  # only then it counts no longer: closing may take a block's time
            service.give(place)
            release(None)

        self._video = LiveVideo(
            session=place,
            pool=service.pool.plan,
            context=context,
            settings=message.settings,
            start=start,
            show=self._from_worker(self._show),
            tell=self._from_worker(self._outbox.event),
            ended=ended,
            save=service.clips.from_frames,
            record_bytes=service.limits.record_bytes,
            metrics=service.metrics,
        )
        self._outbox.event({"type": "started", "prompt": message.prompt, "prompt_id": 0})
        service.worker.add(self._video)
