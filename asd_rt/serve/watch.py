"""The WebSocket: one watcher, one live video."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from asd_rt.errors import AsdError
from asd_rt.serve.frames import to_jpeg
from asd_rt.serve.limits import Rate
from asd_rt.serve.live import LiveVideo
from asd_rt.serve.outbox import Outbox, Piece
from asd_rt.serve.protocol import SUBPROTOCOL, Message, MessageError, pack_block
from asd_rt.serve.seats import NoRoom, Seat
from asd_rt.serve.service import Service

# Close codes: 1008, 1009 and 1013 of RFC 6455's registry, and three of ours.
UNFIT, LARGE, FULL, SILENT, TAKEN, FAILED = 1008, 1009, 1013, 4408, 4409, 4500
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
        except (Lost, WebSocketDisconnect, RuntimeError, OSError) as error:  # gone, at any point
            _log.debug("%s: gone (%s)", client, error)


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    try:
        await socket.close(code, reason[:120])
    except (RuntimeError, OSError, WebSocketDisconnect) as error:
        _log.debug("gone before it could be closed (%s)", error)


class Lost(Exception):
    """The client has gone without a word."""


class Watcher:
    """One connection."""

    def __init__(self, socket: WebSocket, service: Service, client: str) -> None:
        self._socket, self._service, self._client = socket, service, client
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox()
        self._seat: Seat | None = None
        self._rate = Rate(service.limits.messages_per_s, service.limits.message_burst)
        self._broken = 0
        self._wanted: Message | None = None  # prompt to switch to; a newer one takes its place
        self._wants = asyncio.Event()
        self._opened = self._loop.time()
        self._starts = False  # a start is being obeyed, which may have to wait for the text encoder

    async def run(self) -> None:
        """Until the client goes or has to.

        Raises:
            Ended: it has to go.
            WebSocketDisconnect: it has said goodbye.
            Lost, RuntimeError, OSError: it has gone without a word, and may come back.
        """
        self._outbox.event(self._hello())
        works = (self._receive, self._send, self._switch_prompts, self._look_after)
        tasks = [self._loop.create_task(work()) for work in works]
        lost = True
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:  # what came in says more than what could not be sent
                if task in done:
                    task.result()
        except (Ended, WebSocketDisconnect):
            lost = False
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            seat, seats = self._seat, self._service.seats
            if seat is not None and seat.watcher is self:
                (seats.leave if lost else seats.end)(seat)

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
            "keep_s": service.limits.keep_s,
        }

    async def _look_after(self) -> None:
        """Close connections that ask for nothing or acknowledge nothing."""
        limits = self._service.limits
        while True:
            await asyncio.sleep(CHECK_S)
            now = self._loop.time()
            seat = self._seat
            if seat is not None and seat.watcher is not self:
                raise Ended(TAKEN, "the video goes on in another connection")
            if seat is None and not self._starts and now - self._opened > limits.start_s:
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
                await self._put(self._socket.send_bytes(pack_block(header, images)))
                self._service.metrics.sent.inc(len(images))
                continue
            await self._put(self._socket.send_json(found))
            if found.get("fatal"):
                raise Ended(FAILED, str(found["message"]))

    async def _put(self, sending: Awaitable[None]) -> None:
        try:
            await sending
        except WebSocketDisconnect as error:  # of sending: no goodbye
            raise Lost from error

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
        most = self._service.limits.message_bytes
        while True:
            received = await self._socket.receive()
            if received["type"] == "websocket.disconnect":
                if "reason" in received:  # uvicorn has one from a close frame only
                    raise WebSocketDisconnect(received.get("code", 1005))
                raise Lost
            if not self._rate.take(self._loop.time()):
                self._refused("rate")
                raise Ended(UNFIT, "too many messages")
            text = received.get("text")
            if len(text or "") > most:  # whatever server is in front
                raise Ended(LARGE, f"a message of more than {most} bytes")
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
        if message.type in ("start", "continue"):
            if self._seat is not None:
                raise MessageError(
                    f"{message.type}: a video runs already; send prompt, set or reset", "order"
                )
            if message.type == "start":
                began, self._starts = self._loop.time(), True
                try:
                    await self._start(message)
                finally:  # where it is refused, what it took is not the client's time
                    self._starts = False
                    self._opened += self._loop.time() - began
            else:
                self._go_on(message.session)
            return
        seat = self._seat
        if seat is None or seat.video is None:
            raise MessageError(f"{message.type}: comes before start", "order")
        if seat.watcher is not self:
            return  # it goes on elsewhere
        video = seat.video
        if message.type == "ack":
            self._outbox.ack(message.block, self._loop.time())
            return
        if message.type == "prompt":
            self._wanted = message
            self._wants.set()
            return
        if message.type in ("pause", "resume"):
            seat.paused = message.type == "pause"
            self._outbox.forget()
        if message.type in ("record", "save"):
            seat.recording = message.type == "record"
        if message.type == "set":
            video.change(message.settings, message.given)
        elif message.type == "reset":
            seat.paused = False
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
            seat = self._seat
            if wanted is None or seat is None or seat.video is None:
                continue
            try:
                context = await self._context(wanted.prompt)
            except AsdError as error:
                self._refuse("prompt", str(error))
                continue
            seat.prompts += 1
            seat.prompt = wanted.prompt
            seat.video.switch(context, seat.prompts, wanted.recache)
            self._outbox.event({"type": "prompt", "prompt": seat.prompt, "prompt_id": seat.prompts})
            self._service.worker.wake()

    async def _context(self, prompt: str) -> Any:
        service = self._service
        return await self._loop.run_in_executor(service.prompts, service.context, prompt)

    async def _start(self, message: Message) -> None:
        service = self._service
        start = None if message.upload is None else service.uploads.get(message.upload)
        context = await self._context(message.prompt)
        try:
            seat, place, left = await service.seats.claim(self._client, self, self._outbox)
        except NoRoom as error:
            self._refused(error.reason)
            raise Ended(FULL, str(error)) from error
        leave = self._from_worker(lambda _: left())

        def ended() -> None:  # only then it counts no longer: closing may take a block's time
            service.give(place)
            leave(None)

        seat.prompt = message.prompt
        seat.video = LiveVideo(
            session=place,
            pool=service.pool.plan,
            context=context,
            settings=message.settings,
            start=start,
            show=self._from_worker(seat.show),
            tell=self._from_worker(seat.tell),
            ended=ended,
            save=service.clips.from_frames,
            record_bytes=service.limits.record_bytes,
            metrics=service.metrics,
        )
        self._seat = seat
        self._outbox.event(
            {"type": "started", "prompt": message.prompt, "prompt_id": 0, "session": seat.id}
        )
        service.worker.add(seat.video)

    def _go_on(self, session: str) -> None:
        """With a video whose connection is lost, or that another connection has.

        Raises:
            MessageError: there is none of this id (any more).
        """
        seat = self._service.seats.go_on(session, self, self._outbox)
        if seat is None:
            elsewhere = self._service.ids.elsewhere(session)
            why = "the replica that made it has gone" if elsewhere else "it was kept too long"
            raise MessageError(
                f"continue: there is no such video; {why}, or it has ended", "session"
            )
        self._seat = seat
        told = {"type": "continued", "prompt": seat.prompt, "prompt_id": seat.prompts}
        told |= {"session": seat.id, "recording": seat.recording, "recorded": seat.recorded}
        self._outbox.event(told)
