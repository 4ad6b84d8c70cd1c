"""Embeddings of prompts encoded before, on disk: a text encoder of gigabytes need not be loaded again."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asd_rt.errors import OutputError
from asd_rt.files import cache_folder, replacing

MAX_BYTES = 256 << 20  # 16,000 tokens of 4096 numbers: several hundred prompts
_log = logging.getLogger(__name__)

FloatArray = NDArray[np.float32]


class PromptCache:
    """Files `KEY.npy` in the folder `prompts` of the cache; those not used for longest make room.

    Without a cache folder, or where it cannot be written, nothing is remembered: that costs time only.
    """

    def __init__(self, engine_key: str, max_bytes: int = MAX_BYTES) -> None:
        """A cache for what `engine_key` stands for: encoder, tokenizer and all that changes their result."""
        folder = cache_folder()
        self._folder = None if folder is None else folder / "prompts"
        self._engine_key, self._max_bytes = engine_key, max_bytes

    def _path(self, folder: Path, cleaned: str) -> Path:
        key = hashlib.sha256(f"{self._engine_key}\n{cleaned}".encode()).hexdigest()
        return folder / f"{key}.npy"

    def get(self, cleaned: str) -> FloatArray | None:
        """The embedding [1, tokens, text_dim] of a cleaned prompt, None where it is not known."""
        if self._folder is None:
            return None
        path = self._path(self._folder, cleaned)
        try:
            context = np.load(path, allow_pickle=False)
            os.utime(path)
        except (OSError, ValueError, EOFError):  # absent, or damaged: then it is encoded again
            return None
        good = context.ndim == 3 and context.dtype == np.float32 and np.isfinite(context).all()
        return context if good else None

    def put(self, cleaned: str, context: FloatArray) -> None:
        """Remember the embedding of a cleaned prompt."""
        if self._folder is None or context.nbytes > self._max_bytes:
            return
        path = self._path(self._folder, cleaned)
        try:
            path.parent.mkdir(exist_ok=True)
            self._make_room(path.parent, context.nbytes)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, context)
        except (OSError, OutputError) as error:  # a full disk must not cost the embedding
            _log.info("%s: not remembered (%s)", path, error)

    def _make_room(self, folder: Path, needed: int) -> None:
        """Delete the files that were not used for longest until `needed` bytes fit."""
        known = sorted((stat.st_mtime, stat.st_size, path) for path, stat in _files(folder))
        total = sum(size for _, size, _ in known)
        for _, size, path in known:
            if total + needed <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder.glob("*.npy"):
        try:
            found.append((path, path.stat()))
        except FileNotFoundError:  # another process made room
            continue
    return found
