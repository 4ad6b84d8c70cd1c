"""What the frame loop costs beside engine calls: time outside of them, and bytes copied for a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np

from asd_rt.backends.ort_codec import OrtCodecStream
from asd_rt.kv_cache import Move
from asd_rt.session import Session

BLOCKS = 6, 100  # at least and at most, after the window is full
ENOUGH_S = 1.0


class _Watch:
    """Seconds inside engine calls (passes and steps of the codec), and bytes moved inside the cache."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.engine_s = 0.0
        self.moved_bytes = 0
        self.passes = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        engine: Any = self.session.engine
        denoiser = engine.denoiser
        run, move, step = denoiser._run, denoiser.move, OrtCodecStream.step

        def timed(function: Any, *args: Any, **named: Any) -> Any:
            begin = perf_counter()
            result = function(*args, **named)
            self.engine_s += perf_counter() - begin
            return result

        def counted(moves: Sequence[Move]) -> None:
            rows = sum(m.frames for m in moves) * denoiser._frame_tokens
            self.moved_bytes += sum(rows * b[0, 0].nbytes for b in denoiser._cache.values())
            move(moves)

        def one_pass(*args: Any) -> None:
            self.passes += 1
            timed(run, *args)

        denoiser._run, denoiser.move = one_pass, counted
        timed_step: Any = lambda *args: timed(step, *args)  # noqa: E731 (becomes a method)
        OrtCodecStream.step = timed_step  # type: ignore[method-assign]
        try:
            yield
        finally:
            del denoiser._run, denoiser.move
            OrtCodecStream.step = step  # type: ignore[method-assign]


def measure(session: Session) -> dict[str, float]:
    """Videos of one step a block, on an ONNX engine with a window; blocks behind a full window count.

    Returns:
        `block_ms`; `outside_ms` and `outside` (share) of a block's time that is not in engine calls;
        `moved` bytes inside the cache for a block, as a share of its new keys and values.
    """
    manifest = session.manifest
    cache, model = manifest.cache, manifest.model
    size = cache.block_frames
    full = cache.window_frames // size + 1
    context = np.zeros((1, model.text_len, model.text_dim), np.float32)
    for _ in range(2):  # the first time binds and compiles
        watch = _Watch(session)
        stream = session.generate_from(context, 0, (full + BLOCKS[1]) * size, 1, 1)
        for _ in range(full):
            next(stream)
        begin, total, blocks = perf_counter(), 0.0, 0
        with watch.watching():
            while blocks < BLOCKS[0] or (blocks < BLOCKS[1] and total < ENOUGH_S):
                next(stream)
                blocks += 1
                total = perf_counter() - begin
        stream.close()
    rows, columns = manifest.latent_hw or (0, 0)
    tokens = size * rows * columns // 4
    width = next(iter(session.engine.denoiser._cache.values())).itemsize
    new = 2 * model.num_layers * tokens * model.dim * width
    outside = total - watch.engine_s
    return {
        "block_ms": 1e3 * total / blocks,
        "outside_ms": 1e3 * outside / blocks,
        "outside": outside / total,
        "passes": watch.passes / blocks,
        "moved": watch.moved_bytes / blocks / new,
    }
