"""What a client may ask for and hold, and the two counters that see to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic


@dataclass(frozen=True)
class Limits:
    """Limits of the server; the command's flags set the first three.

    Attributes:
        sessions: live videos at once; None = as many as memory allows, at most 8.
        client_sessions: live videos of one client address.
        clip_frames: latent frames of a clip.
        prompt_chars: characters of a prompt.
        message_bytes: of a control message.
        messages_per_s, message_burst: control messages of one connection, acknowledgements included.
        broken_messages: that a connection may send before it is closed.
        connections: open at once, of all kinds.
        client_sockets: WebSockets of one client address.
        start_s: from a connection's opening to its first request, and to a WebSocket's `start`.
        ack_s: that a client may leave blocks without an acknowledgement.
        keep_s: that a live video waits for a client whose connection is lost.
        upload_bytes, upload_frames, upload_pixels: of a picture or clip to start from; pixels of a frame.
        upload_s, upload_memory: time (seconds) and memory (bytes) of the process that decodes it.
        uploads_kept: decoded, in the order they came; the oldest go.
        record_bytes: raw frames of a recording.
        clip_raw_bytes: raw frames of a clip, until it is encoded.
        clips_queued, clips_kept, clip_bytes: clips waiting, finished ones, and bytes of those together.
    """

    sessions: int | None = None
    client_sessions: int = 4
    clip_frames: int = 480
    prompt_chars: int = 500
    message_bytes: int = 16 << 10
    messages_per_s: float = 50.0
    message_burst: int = 100
    broken_messages: int = 20
    connections: int = 256
    client_sockets: int = 64
    start_s: float = 15.0
    ack_s: float = 30.0
    keep_s: float = 30.0
    upload_bytes: int = 8 << 20
    upload_frames: int = 48
    upload_pixels: int = 16 << 20
    upload_s: int = 10
    upload_memory: int = 1 << 30
    uploads_kept: int = 8
    record_bytes: int = 64 << 20
    clip_raw_bytes: int = 1 << 30
    clips_queued: int = 16
    clips_kept: int = 32
    clip_bytes: int = 128 << 20


class Rate:
    """A token bucket: `burst` at once, then `per_s` a second."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s, self._burst = per_s, float(burst)
        self._left, self._at = float(burst), monotonic()

    def take(self, now: float | None = None) -> bool:
        """Whether one more is within the rate; `now` in seconds of the monotonic clock."""
        now = monotonic() if now is None else now
        self._left = min(self._burst, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class PerClient:
    """Counts what each client address holds."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: Counter[str] = Counter()

    @contextmanager
    def hold(self, client: str) -> Iterator[bool]:
        """Hold one more while the block runs; gives False, and counts nothing, where that is too many."""
        if self._held[client] >= self._most:
            yield False
            return
        self._held[client] += 1
        try:
            yield True
        finally:
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]
