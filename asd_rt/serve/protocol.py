"""What goes over the WebSocket: control messages in, as strict JSON; events and blocks of frames out.

A block is one binary message: 4 bytes, big-endian, the length of a JSON header; the header; then the frames'
JPEG files, whose sizes the header gives.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from asd_rt.deadline import MAX_DEADLINE_MS
from asd_rt.errors import AsdError
from asd_rt.noise import MAX_SEED
from asd_rt.schedule import MAX_STEPS
from asd_rt.serve.ids import ID_CHARS

SUBPROTOCOL = "asd-rt"
MIN_FPS, MAX_FPS = 1.0, 120.0
_HEADER = struct.Struct(">I")


class MessageError(AsdError):
    """A message, or the body of a request, that is not what the protocol says; `code` is for programs."""

    def __init__(self, message: str, code: str = "message") -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Settings:
    """How a video is generated; None = the engine's default, and for `fps` that of the engine's video."""

    seed: int | None = None
    steps: int | None = None
    first_steps: int | None = None
    deadline_ms: float | None = None
    fps: float | None = None


@dataclass(frozen=True)
class Message:
    """A control message.

    Attributes:
        type: of TYPES.
        prompt: of `start` and `prompt`.
        settings: of `start`, `set` and `reset`.
        given: names of the settings that the message has; a `deadline_ms` of null takes the deadline away.
        upload: of `start`: what the video starts from.
        session: of `continue`: which live video to go on with.
        block: of `ack`: the newest block that is on the screen.
        recache: of `prompt`: compute the cached frames anew under it.
    """

    type: str
    prompt: str = ""
    settings: Settings = field(default_factory=Settings)
    given: frozenset[str] = frozenset()
    upload: str | None = None
    session: str = ""
    block: int = 0
    recache: bool = False


Check = Callable[[str, Any], Any]


def _whole(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        _refuse(name, f"a whole number from {low} to {high}", value)

    return check


def _number(low: float, high: float, optional: bool = False) -> Check:
    def check(name: str, value: Any) -> float | None:
        if optional and value is None:
            return None
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if good and low <= value <= high:  # of integers too that no float holds
            return float(value)
        _refuse(name, f"a number from {low:g} to {high:.0f}{' or null' * optional}", value)

    return check


def _text(most: int) -> Check:
    def check(name: str, value: Any) -> str:
        if isinstance(value, str) and value.strip() and len(value) <= most:
            return value
        found = f"{len(value)} characters" if isinstance(value, str) else value
        _refuse(name, f"a text of 1 to {most} characters", found)

    return check


def _truth(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    _refuse(name, "true or false", value)


SETTINGS: dict[str, Check] = {
    "seed": _whole(0, MAX_SEED),
    "steps": _whole(1, MAX_STEPS),
    "first_steps": _whole(1, MAX_STEPS),
    "deadline_ms": _number(0.001, MAX_DEADLINE_MS, optional=True),
    "fps": _number(MIN_FPS, MAX_FPS),
}
# type -> (fields that must be there, fields that may be)
TYPES: dict[str, tuple[set[str], set[str]]] = {
    "start": ({"prompt"}, {*SETTINGS, "upload"}),
    "continue": ({"session"}, set()),
    "prompt": ({"prompt"}, {"recache"}),
    "set": (set(), {"steps", "deadline_ms", "fps"}),
    "pause": (set(), set()),
    "resume": (set(), set()),
    "reset": (set(), {"seed"}),
    "record": (set(), set()),
    "save": (set(), set()),
    "ack": ({"block"}, set()),
}


class Reader:
    """Reads control messages and the bodies of requests."""

    def __init__(self, prompt_chars: int, clip_frames: int) -> None:
        self._checks = SETTINGS | {
            "prompt": _text(prompt_chars),
            "upload": _text(ID_CHARS),
            "session": _text(ID_CHARS),
            "block": _whole(0, 2**53),
            "recache": _truth,
            "frames": _whole(1, clip_frames),
        }

    def message(self, text: str) -> Message:
        """A control message.

        Raises:
            MessageError: it is no JSON object, or has another form than TYPES say.
        """
        fields = parse_object(text)
        kind = fields.pop("type", None)
        if not isinstance(kind, str) or kind not in TYPES:
            _refuse("type", f"one of {', '.join(TYPES)}", kind)
        values = self._fields(kind, fields, *TYPES[kind])
        settings = {name: values[name] for name in SETTINGS if name in values}
        return Message(
            type=kind,
            prompt=values.get("prompt", ""),
            settings=Settings(**settings),
            given=frozenset(settings),
            upload=values.get("upload"),
            session=values.get("session", ""),
            block=values.get("block", 0),
            recache=values.get("recache", False),
        )

    def clip(self, text: str) -> tuple[str, int | None, Settings]:
        """The body of a request for a clip: prompt, latent frames and settings.

        Raises:
            MessageError: as for a message.
        """
        values = self._fields("clip", parse_object(text), {"prompt"}, {*SETTINGS, "frames"})
        settings = {name: values[name] for name in SETTINGS if name in values}
        return values["prompt"], values.get("frames"), Settings(**settings)

    def _fields(
        self, kind: str, fields: dict[str, Any], needed: set[str], allowed: set[str]
    ) -> dict[str, Any]:
        missing, unknown = needed - fields.keys(), fields.keys() - needed - allowed
        if missing:
            raise MessageError(f"{kind}: {', '.join(sorted(missing))} is missing")
        if unknown:
            names = ", ".join(sorted(needed | allowed)) or "nothing"
            raise MessageError(f"{kind}: unknown {_short(sorted(unknown)[0])}; it takes {names}")
        return {name: self._checks[name](name, value) for name, value in fields.items()}


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object, without NaN and infinities, and with each name once.

    Raises:
        MessageError: anything else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name comes twice")
        return dict(pairs)

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        found = json.loads(text, object_pairs_hook=once, parse_constant=constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        detail = str(error) or type(error).__name__
        raise MessageError(f"a message must be a JSON object ({_short(detail)})") from error
    if not isinstance(found, dict):
        _refuse("a message", "a JSON object", found)
    return found


def pack_block(header: dict[str, Any], images: list[bytes]) -> bytes:
    """A block as one binary message; `sizes` of the images is added to the header."""
    text = json.dumps(header | {"sizes": [len(image) for image in images]}).encode()
    return b"".join([_HEADER.pack(len(text)), text, *images])


def unpack_block(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The header and images of `pack_block`."""
    (size,) = _HEADER.unpack_from(data)
    begin = _HEADER.size + size
    header = json.loads(data[_HEADER.size : begin])
    images = []
    for length in header["sizes"]:
        images.append(data[begin : begin + length])
        begin += length
    return header, images


def _refuse(name: str, expected: str, found: object) -> NoReturn:
    shown = found if isinstance(found, str) else type(found).__name__
    if isinstance(found, int | float | None):
        shown = str(found)
    raise MessageError(f"{name} must be {expected}, found {_short(shown)}")


def _short(text: str, most: int = 60) -> str:
    """What a client sent, safe to send back and to log: printable, on one line, and short."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return shown if len(shown) <= most else shown[:most] + "..."
