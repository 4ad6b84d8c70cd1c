"""Checkpoints of several processes: folders that each writes its part of, whole or not there.

RUN/<stage>/step_00000120/ holds the files of torch.distributed.checkpoint and mark.json, which names them and
their sizes. It is written under another name and renamed when it is complete; the one before it stays until
the next. Any number of processes can read it, one without torchrun too.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from asd_rt.errors import CheckpointError
from train.parallel import Parallel

# Saving and reading without other processes is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")
MARK = "mark.json"
FORMAT_VERSION = 1
KEPT = 2
# What torch raises for files that are absent, cut short or overwritten, and for disks without room.
BROKEN = (CheckpointException, OSError, RuntimeError, ValueError, KeyError, EOFError)


def folders(root: Path) -> list[Path]:
    """Complete checkpoints below `root`, oldest first."""
    return sorted(p for p in root.glob("step_*") if p.suffix != ".tmp" and p.is_dir())


def save_sharded(
    root: Path, fingerprint: str, step: int, state: dict[str, Any], parallel: Parallel
) -> None:
    """Write the state after `step` steps, and remove all but the newest checkpoints.

    Args:
        root: folder of the stage's checkpoints.
        fingerprint: of configuration and seed.
        step: steps done.
        state: nested dictionaries of tensors; plain tensors are equal in all processes that have them.
        parallel: all processes must call this.

    Raises:
        CheckpointError: it cannot be written; the checkpoints before it are as they were.
    """
    final = root / f"step_{step:08d}"
    temporary = final.with_suffix(".tmp")
    problem = None
    try:
        if parallel.first:
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
        parallel.wait()
        dcp.save(state, storage_writer=FileSystemWriter(temporary), no_dist=parallel.mesh is None)
        if parallel.first:
            files = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
            mark = {
                "format_version": FORMAT_VERSION,
                "fingerprint": fingerprint,
                "step": step,
                "files": files,
            }
            (temporary / MARK).write_text(json.dumps(mark, indent=1) + "\n")
            shutil.rmtree(final, ignore_errors=True)  # of the same step, which is done again
            os.replace(temporary, final)
            for old in folders(root)[:-KEPT]:
                shutil.rmtree(old)
    except BROKEN as error:
        problem = error
    finally:
        if parallel.first:
            shutil.rmtree(temporary, ignore_errors=True)
    if problem is not None:
        kept = folders(root)
        intact = f"{kept[-1]} is intact" if kept else "there is none before it"
        raise CheckpointError(
            f"{final}: cannot be saved ({_cause(problem)}); {intact}"
        ) from problem


def read_mark(folder: Path) -> dict[str, Any]:
    """mark.json of a checkpoint whose files are all there.

    Raises:
        CheckpointError: one is absent or cut short.
    """
    try:
        mark: dict[str, Any] = json.loads((folder / MARK).read_text())
        if mark["format_version"] != FORMAT_VERSION:
            raise ValueError(f"version {mark['format_version']}, expected {FORMAT_VERSION}")
        for name, size in mark["files"].items():
            found = (folder / name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found} bytes, expected {size}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error
    return mark


def load_sharded(folder: Path, state: dict[str, Any]) -> None:
    """Read a checkpoint into the tensors of `state`, which may be some of it, and in other shards.

    Raises:
        CheckpointError: it is damaged, or holds other tensors.
    """
    try:
        # Every process reads what it needs by itself, so one of several can read too.
        dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    except BROKEN as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: BaseException) -> CheckpointError:
    others = [p for p in folders(folder.parent) if p < folder]
    cure = f"remove it to go on from {others[-1].name}" if others else "remove it to start over"
    return CheckpointError(f"{folder}: is no whole checkpoint ({_cause(error)}); {cure}")


def _cause(error: BaseException) -> str:
    """The first line of what went wrong in the first process where something did."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    # What torch's writer of archives says when the system takes less than it was given.
    return (
        "a file could not be written whole; is the disk full?" if "unexpected pos" in text else text
    )
