"""Stream video from a compiled causal denoiser.

import asd_rt

with asd_rt.open() as session:
    for block in session.generate("a red three moving right", seed=0):
        show(block.frames)  # uint8 [frames, rows, columns, 3]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asd_rt.errors import (
    AsdError,
    BackendError,
    CheckpointError,
    ConfigError,
    EngineError,
    MediaError,
    OutputError,
    PromptError,
)

if TYPE_CHECKING:
    from asd_rt.session import Session
    from asd_rt.session import open_session as open

__version__ = "0.1.0"
__all__ = [
    "AsdError",
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "MediaError",
    "OutputError",
    "PromptError",
    "Session",
    "__version__",
    "open",
]


def __getattr__(name: str) -> Any:
    """Load the session only when it is asked for: importing the package stays cheap."""
    if name in ("open", "Session"):
        from asd_rt import session

        return session.open_session if name == "open" else session.Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
