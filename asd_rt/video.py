"""From decoded frames to a video: bytes, sizes, and where a video may be written."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asd_rt.errors import BackendError, ConfigError, OutputError
from asd_rt.video_file import FileWriter
from asd_rt.video_writers import (
    FRAME_NAME,
    FolderWriter,
    PipeWriter,
    VideoWriter,
    temporary_path,
)

SUFFIXES = (".mp4", ".gif")
KINDS = "a file that ends in .mp4 or .gif, a folder (for PNG files), or - (y4m on stdout)"
PROBE_BYTES = 1 << 16


def to_uint8(frames: NDArray[np.float32], scale: int = 1) -> NDArray[np.uint8]:
    """Decoded frames as pixels, each enlarged to `scale` x `scale`.

    Args:
        frames: float32 [1, F, 3, H, W] in -1..1; what lies outside is clipped.
        scale: whole number >= 1.

    Returns:
        uint8 [F, H * scale, W * scale, 3], contiguous.

    Raises:
        BackendError: another shape, or values that are not finite.
    """
    if frames.ndim != 5 or frames.shape[0] != 1 or frames.shape[2] != 3:
        raise BackendError(f"decoded frames must be [1, F, 3, H, W], found {list(frames.shape)}")
    low, high = frames.min(), frames.max()
    if not (np.isfinite(low) and np.isfinite(high)):  # nan is the minimum of all that holds one
        raise BackendError(
            "the decoder gave values that are not finite (inf or nan); build the engine again with "
            "--precision fp32"
        )
    levels = frames[0] + np.float32(1)
    levels *= np.float32(127.5)
    np.rint(levels, out=levels)
    if low < -1 or high > 1:
        np.clip(levels, 0, 255, out=levels)
    return enlarge(np.ascontiguousarray(np.moveaxis(levels.astype(np.uint8), 1, -1)), scale)


def from_uint8(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels uint8 [F, H, W, 3] as an encoder takes them: float32 [1, F, 3, H, W] in -1..1.

    Raises:
        ConfigError: another type or shape.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not pixels.size:
        raise ConfigError(
            f"frames must be uint8 [F, H, W, 3], found {pixels.dtype} {list(pixels.shape)}"
        )
    frames = np.moveaxis(pixels, 3, 1).astype(np.float32)[None]
    frames /= np.float32(127.5)
    frames -= np.float32(1)
    return frames


def enlarge(pixels: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """Every pixel of uint8 [F, H, W, 3] as a square of `scale` x `scale` pixels."""
    return pixels if scale == 1 else pixels.repeat(scale, axis=1).repeat(scale, axis=2)


def check_output(out: str | Path) -> None:
    """Find out before any work whether a video can be written to `out`.

    Raises:
        OutputError: an unknown suffix, a folder that is absent, read-only or full, something in the
            way, or a terminal that y4m would be poured into.
    """
    if str(out) == "-":
        if sys.stdout.isatty():
            raise OutputError(
                "--out -: would pour binary video into the terminal; pipe it: "
                "asd-rt run --out - | mpv -"
            )
        return
    path = _target(out)
    if path.suffix.lower() in SUFFIXES:
        if path.exists() and not path.is_file():
            raise OutputError(
                f"{out}: exists and is not a file; choose another --out, or remove it"
            )
    elif path.suffix and not path.is_dir() and not str(out).endswith("/"):
        raise OutputError(f"{out}: unknown kind of video {path.suffix!r}; --out takes {KINDS}")
    else:
        _check_folder(out, path)
    _check_parent(out, path.parent)


def open_writer(out: str | Path, fps: float) -> VideoWriter:
    """A writer for `out`, which `check_output` accepts; use it as a context manager.

    Args:
        out: ends in .mp4 or .gif, or is a folder for PNG files, or "-" for y4m on stdout.
        fps: frames a second.

    Raises:
        OutputError: as `check_output`; `write` and the end of the context raise it as well.
    """
    check_output(out)
    if str(out) == "-":
        return PipeWriter(fps)
    path = _target(out)
    suffix = path.suffix.lower()
    return FileWriter(path, fps, suffix[1:]) if suffix in SUFFIXES else FolderWriter(path)


def _target(out: str | Path) -> Path:
    """Where the video goes in the end: a link is followed, not replaced."""
    if not str(out):
        raise OutputError(f"--out is empty; it takes {KINDS}")
    path = Path(out).expanduser()
    return path.resolve() if path.is_symlink() or path.name in ("", "..") else path


def _check_folder(out: str | Path, path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputError(f"{out}: exists and is not a folder; --out takes {KINDS}")
    try:
        strangers = sorted(n for n in os.listdir(path) if not re.fullmatch(FRAME_NAME, n))
    except OSError as error:
        raise OutputError(
            f"{out}: cannot be read ({error.strerror}); choose another --out"
        ) from error
    if strangers:
        raise OutputError(
            f"{out}: holds other things than frames of an earlier run ({strangers[0]}); choose a "
            "new or an empty folder, or a file that ends in .mp4 or .gif"
        )


def _check_parent(out: str | Path, parent: Path) -> None:
    """Write and remove a small file: the only sure test for permissions, quota and space."""
    if not parent.exists():
        raise OutputError(f"{out}: folder {parent} does not exist; make it: mkdir -p {parent}")
    if not parent.is_dir():
        raise OutputError(f"{out}: {parent} is not a folder; choose another --out")
    probe = temporary_path(parent / "probe")
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
    except OSError as error:
        raise OutputError(
            f"{out}: cannot be written in folder {parent} ({error.strerror}); free some space, "
            "make the folder writable or choose another --out"
        ) from error
    finally:
        _remove_quietly(probe)


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # on a read-only folder nothing was made that could be removed
