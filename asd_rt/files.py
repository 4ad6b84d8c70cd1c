"""Writing result files: find out early whether it can be done, then whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asd_rt.errors import OutputError


def cache_folder() -> Path | None:
    """Where things are remembered between runs: $ASD_RT_CACHE, else asd-rt in the user's cache folder.

    Returns:
        a folder that exists, or None where none can be made.
    """
    own, user = os.environ.get("ASD_RT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else (Path(user) if user else Path.home() / ".cache") / "asd-rt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder


def check_writable(path: str | Path, flag: str) -> None:
    """Check before any work that a file can be written to `path`; `flag` names it in the error.

    Raises:
        OutputError: its folder is absent, read-only or full, or `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"{flag} {path}: is a folder; name a file in it")
    parent = target.parent
    if not parent.is_dir():
        raise OutputError(
            f"{flag} {path}: folder {parent} does not exist; make it: mkdir -p {parent}"
        )
    _probe(parent, f"{flag} {path}")


def make_folder(path: Path, flag: str = "--out") -> None:
    """Make the folder `path` that `flag` names, and check that results can be written there.

    Raises:
        OutputError: they cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{flag} {path}: cannot be made ({error.strerror}); choose another folder"
        ) from error
    _probe(path, f"{flag} {path}")


def _probe(folder: Path, told: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        raise OutputError(
            f"{told}: folder {folder} cannot be written ({error.strerror}); choose another place"
        ) from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path` when the block ends well.

    Raises:
        OutputError: it cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
