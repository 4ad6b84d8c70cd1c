"""Pictures and clips that a video is to start from: decoded in a process of their own, and held in memory."""

from __future__ import annotations

import asyncio
import json
import sys

import numpy as np
from numpy.typing import NDArray

from asd_rt.decoding import start_frame_count
from asd_rt.errors import AsdError
from asd_rt.manifest import Manifest
from asd_rt.serve import upload_process
from asd_rt.serve.ids import Ids
from asd_rt.serve.limits import Limits
from asd_rt.serve.protocol import MessageError
from asd_rt.video_reader import most_blocks

GRACE_S = 2.0  # beyond the process's own limit of CPU time, until it is killed
MOST_AT_ONCE, MOST_WAITING = 2, 4

Frames = NDArray[np.uint8]


class UploadsFull(AsdError):
    """As many uploads wait as may."""


class Uploads:
    """Decoded uploads by id; used by the event loop only."""

    def __init__(
        self, manifest: Manifest, frame_hw: tuple[int, int], limits: Limits, ids: Ids
    ) -> None:
        """Uploads for videos by the engine of `manifest`, with frames of `frame_hw` (rows, columns)."""
        self._manifest, self._frame_hw, self._limits, self._ids = manifest, frame_hw, limits, ids
        self._kept: dict[str, Frames] = {}
        self._room = asyncio.Semaphore(MOST_AT_ONCE)
        self._busy = 0

    def get(self, upload: str) -> Frames:
        """Frames to start from, uint8 [frames, rows, columns, 3]: as many as whole blocks have.

        Raises:
            MessageError: there is no such upload (any more).
        """
        found = self._kept.get(upload)
        if found is None:
            raise MessageError("upload: is not there (any more); send the file again", "upload")
        return found

    async def add(self, data: bytes) -> tuple[str, int]:
        """Decode a file.

        Returns:
            (its id, frames that a video will start from).

        Raises:
            MessageError: it cannot be used.
            UploadsFull: as many wait as may.
        """
        if "encoder" not in self._manifest.parts:
            raise MessageError(
                "upload: this engine has no encoder, so it starts from none", "upload"
            )
        if self._busy >= MOST_AT_ONCE + MOST_WAITING:
            raise UploadsFull("upload: too many are being decoded; try again in a few seconds")
        self._busy += 1
        try:
            async with self._room:
                decoded = await self._decode(data)
        finally:
            self._busy -= 1
        frames = fitted_count(self._manifest, decoded)
        name = self._ids.new()
        self._kept[name] = frames
        while len(self._kept) > self._limits.uploads_kept:
            del self._kept[next(iter(self._kept))]
        return name, len(frames)

    async def _decode(self, data: bytes) -> Frames:
        limits, (rows, columns) = self._limits, self._frame_hw
        asked = {
            "rows": rows,
            "columns": columns,
            "frames": limits.upload_frames,
            "pixels": limits.upload_pixels,
            "seconds": limits.upload_s,
            "memory": limits.upload_memory,
            "bytes": limits.upload_bytes,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", upload_process.__file__, json.dumps(asked)),  # -I: nothing from the environment
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(data), limits.upload_s + GRACE_S)
        except TimeoutError as error:
            raise MessageError(
                f"upload: took more than {limits.upload_s} s to decode", "upload"
            ) from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        size = 3 * rows * columns
        if process.returncode == upload_process.REFUSED:
            raise MessageError(f"upload: {err.decode(errors='replace')[:200]}", "upload")
        if process.returncode or len(out) < 4 + size or (len(out) - 4) % size:
            raise MessageError("upload: takes more time or memory to decode than it may", "upload")
        return np.frombuffer(out, np.uint8, offset=4).reshape(-1, rows, columns, 3)


def fitted_count(manifest: Manifest, frames: Frames) -> Frames:
    """The last of `frames` that are whole blocks, and not more than the first new block can see.

    Where they are fewer than a block, the last one is repeated.
    """
    blocks, most = 1, len(frames)
    while blocks < most_blocks(manifest) and start_frame_count(manifest, blocks + 1) <= most:
        blocks += 1
    wanted = start_frame_count(manifest, blocks)
    if most >= wanted:
        return frames[most - wanted :]
    return np.concatenate([frames, frames[-1:].repeat(wanted - most, axis=0)])
