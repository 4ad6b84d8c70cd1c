"""A progress bar on stderr; nothing where stderr is not a terminal."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType
from typing import TextIO

_WIDTH = 24


class Progress:
    """`label [######......] 3/16, 5 s left`, drawn over itself; cleared at the end of its `with`.

    Of 0, which is no end, it says `label 3`.
    """

    def __init__(self, label: str, total: int, stream: TextIO | None = None) -> None:
        self._label, self._total, self._done = label, total, 0
        self._stream = sys.stderr if stream is None else stream
        self._shown = self._stream.isatty()
        self._begin = monotonic()

    def advance(self, note: str = "") -> None:
        """One more of `total` is done; `note` follows the bar."""
        self._done += 1
        if not self._shown:
            return
        if not self._total:
            self._show(f"{self._label} {self._done} {note}")
            return
        filled = _WIDTH * self._done // max(self._total, self._done)
        left = (monotonic() - self._begin) / self._done * (self._total - self._done)
        bar = "#" * filled + "." * (_WIDTH - filled)
        count = f"{self._done}/{self._total}"
        self._show(f"{self._label} [{bar}] {count}, {left:.0f} s left {note}")

    def _show(self, line: str) -> None:
        self._stream.write(f"\r\x1b[K{line}")
        self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown and self._done:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
