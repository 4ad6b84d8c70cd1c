"""The Python interface: open an engine, then stream blocks of video from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from asd_rt.arguments import (
    check_can_decode,
    check_can_encode,
    check_renoise,
    check_start,
    default_frames,
    make_plan,
    prompt_tokens,
)
from asd_rt.backends.base import Engine, open_backend
from asd_rt.backends.shared import SharableEngine, SharedEngine
from asd_rt.block import Replay as Replay
from asd_rt.costs import CostModel
from asd_rt.decoding import Encoder, latent_size
from asd_rt.engines import best_engine
from asd_rt.errors import BackendError
from asd_rt.frame_loop import FrameLoop, Request
from asd_rt.manifest import REBUILD, Manifest, late_parts
from asd_rt.noise import check_seed
from asd_rt.plan import Plan, count_blocks
from asd_rt.request_checks import check_context, check_memory, latent_hw_of, noise_shape
from asd_rt.schedule import Schedule
from asd_rt.stream import Stream
from asd_rt.text_encoder import TextEncoder

FloatArray = NDArray[np.float32]


def open_session(
    engine: str | Path | None = None,
    threads: int | None = None,
    join: bool | None = None,
    device: str = "auto",
) -> Session:
    """Open an engine.

    Args:
        engine: path of an engine file; None = the best one in ./engines, else the packaged one.
        threads: of a CPU backend; None = usable cores.
        join: run a cache pass and the first pass of the next block as one; None = what is faster here.
        device: "cpu", "cuda" (or an error), or "auto": see `open_backend`.

    Raises:
        EngineError: no such engine, or it is damaged.
        BackendError: its backend is absent or cannot run here.
    """
    path = best_engine() if engine is None else engine
    return Session(open_backend(path, threads, device), join, threads)


class Session:
    """An opened engine. One video at a time; close it or use it in a `with`."""

    def __init__(
        self, engine: Engine, join: bool | None = None, threads: int | None = None
    ) -> None:
        """A session on `engine`; `join` and `threads` as in `open_session`.

        Raises:
            BackendError: joined passes are asked for, and the engine has none.
        """
        if join and not engine.denoiser.can_join:
            raise BackendError(f"{engine.path}: has no joined pass; build it again with: {REBUILD}")
        self._engine = engine
        self._asked_join = join
        self._threads = threads
        self._costs = CostModel()
        self._text: TextEncoder | None = None

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def manifest(self) -> Manifest:
        return self._engine.manifest

    @property
    def costs(self) -> CostModel:
        """What passes take on this machine, as far as it is known."""
        return self._costs

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the engine; may be called twice."""
        self._engine.close()
        self._text = None

    def sibling(self) -> Session:
        """Another session on this one's engine, for a video beside this one's.

        It has its own KV cache and shares weights and what is known of their speed. Both may be used in turns
        by one thread. Close it before this one.

        Raises:
            BackendError: the engine serves one video only.
        """
        if not isinstance(self._engine, SharableEngine):
            raise BackendError(
                f"{self._engine.path}: serves one video at a time; open an engine file"
            )
        other = Session(SharedEngine(self._engine), self._asked_join, self._threads)
        other._costs = self._costs
        return other

    def context(self, prompt: str) -> FloatArray:
        """Text embedding [1, tokens <= text_len, text_dim] of `prompt`.

        A UMT5 text encoder is opened when the first prompt comes that is not remembered from before
        (`asd_rt.prompt_cache`), and released after each prompt where its weights are larger than 1 GB.

        Raises:
            PromptError: the engine cannot read it, or has no text part.
            EngineError: the text encoder's files are absent or damaged.
            BackendError: a package that reads prompts is absent.
        """
        path, manifest = self._engine.path, self.manifest
        if not late_parts(manifest):
            return self._engine.encode_prompt(prompt_tokens(path, manifest, prompt))
        if self._text is None:
            self._text = TextEncoder(path, manifest, self._threads, engine=self._engine)
        return self._text.encode(prompt)

    def generate(
        self,
        prompt: str,
        seed: int = 0,
        frames: int | None = None,
        steps: int | None = None,
        first_steps: int | None = None,
        deadline_ms: float | None = None,
        start: NDArray[np.uint8] | None = None,
        refresh_every: int = 0,
    ) -> Stream:
        """Stream a video block by block; a block is handed out before its cache pass runs.

        Everything is checked before this returns; work begins with the first block asked for, but `start` is
        encoded at once.

        Args:
            prompt: what to show.
            seed: 0 .. 2**63 - 1; same seed and plan, same video.
            frames: latent frames, rounded up to blocks; None = 48, or what the cache holds; 0 = endless,
                for an engine with a window. A decoder that is 4 frames long makes 1 + 4 (n - 1) frames of n.
            steps: denoising steps of a block, 1..4; None = the manifest's.
            first_steps: steps of the first block; None = the manifest's, at least `steps`.
            deadline_ms: time that a block may take, its cache pass and decoding included. Blocks then get
                as many steps as fit, at most `steps` (None = 4) and `first_steps`; `Block.deadline` says
                how each kept it.
            start: what the video goes on from, uint8 [F, rows, columns, 3]: a clip, or a picture repeated;
                `asd_rt.video_reader` reads files. `frames` counts what comes after it.
            refresh_every: blocks after which the cache starts over from the first block, again and again, so
                that a long video does not drift; the picture jumps then. 0 = never.

        Returns:
            blocks with `frames` uint8 [frames, rows, columns, 3]; its `switch_prompt` changes the prompt.

        Raises:
            ConfigError, PromptError: impossible arguments.
            EngineError: the engine cannot encode a start.
        """
        check_can_decode(self._engine.path, self.manifest)
        context = self.context(prompt)
        initial = None if start is None else self.start_latents(start)
        return self.generate_from(
            context,
            seed,
            frames,
            steps,
            first_steps,
            deadline_ms=deadline_ms,
            initial=initial,
            refresh_every=refresh_every,
        )

    def generate_from(
        self,
        context: FloatArray,
        seed: int = 0,
        frames: int | None = None,
        steps: int | None = None,
        first_steps: int | None = None,
        latent_hw: tuple[int, int] | None = None,
        deadline_ms: float | None = None,
        initial: FloatArray | None = None,
        refresh_every: int = 0,
        plan: Plan | None = None,
    ) -> Stream:
        """As `generate`, from a text embedding instead of a prompt.

        Args:
            context: float32 [B, tokens <= text_len, text_dim].
            seed, frames, steps, first_steps, deadline_ms, refresh_every: as `generate`.
            latent_hw: latent (rows, columns), for an engine that fixes none.
            initial: clean latents that the video goes on from, float32 [B, whole blocks, C, h, w].
            plan: in place of `steps`, `first_steps` and `deadline_ms`.

        Returns:
            blocks; their `frames` are None where the engine has no decoder or B is not 1.
        """
        manifest = self.manifest
        size = manifest.cache.block_frames
        given = 0 if initial is None or initial.ndim != 5 else initial.shape[1]
        asked = default_frames(manifest, given) if frames is None else frames
        total = count_blocks(asked, size) * size
        if total:
            total += given
        check_context(manifest, context)
        if initial is not None and initial.ndim == 5 and latent_hw is None:
            latent_hw = (initial.shape[3], initial.shape[4])
        rows, columns = latent_hw_of(self._engine.path, manifest, latent_hw)
        shape = (context.shape[0], total, manifest.model.in_dim, rows, columns)
        if plan is None:
            plan = make_plan(manifest, steps, first_steps, deadline_ms, self._costs)
        request = Request(
            context=context,
            shape=shape,
            plan=plan,
            seed=check_seed(seed),
            initial=initial,
            refresh_every=refresh_every,
        )
        loop = self._loop(request, join=False)  # finds all that is wrong with the request
        check_memory(self._engine.path, manifest, request, bool(self._asked_join))
        decodes = "decoder" in manifest.parts and len(context) == 1
        return Stream(
            self._engine, request, loop, self._costs, self._asked_join, decodes, self.context
        )

    def start_latents(self, frames: NDArray[np.uint8]) -> FloatArray:
        """Latents that a video can begin with, from the frames of a clip or of a repeated picture.

        Args:
            frames: uint8 [F, rows, columns, 3]; F as `asd_rt.decoding.start_frame_count` says.

        Returns:
            latents, float32 [1, whole blocks, C, h, w].

        Raises:
            ConfigError: another number or size of frames.
            EngineError: the engine has no encoder part.
        """
        check_can_encode(self._engine.path, self.manifest)
        check_start(self.manifest, frames)
        return self.encode(frames)

    def encode(self, frames: NDArray[np.uint8]) -> FloatArray:
        """Latents of a whole video, or of a picture (one frame).

        Args:
            frames: uint8 [F, rows, columns, 3]; F is 1 + 4n for a codec that is 4 frames long.

        Returns:
            latents, float32 [1, latent frames, C, h, w], as the denoiser takes them.

        Raises:
            ConfigError: another number or size of frames than the codec takes, or it has none.
            EngineError: the engine has no encoder part.
        """
        from asd_rt.video import from_uint8

        given = from_uint8(frames)
        size = latent_size(self.manifest, *given.shape[3:])
        return Encoder(self._engine, size).encode(given)

    def replay(
        self,
        noise: FloatArray,
        context: FloatArray,
        initial: FloatArray | None = None,
        renoise: Mapping[tuple[int, int], FloatArray] | None = None,
        plan: Plan | None = None,
        seed: int = 0,
        dump_cache: bool = False,
    ) -> Replay:
        """One run with given noise, to compare engines and machines; passes are joined only if asked for.

        Args:
            noise: float32 [B, F, C, h, w], F a multiple of the block size.
            context: float32 [B, tokens <= text_len, text_dim].
            initial: clean latents [B, whole blocks, C, h, w] that only fill the cache.
            renoise: {(block, step): float32 [B, block_frames, C, h, w]}; what is missing comes from `seed`.
            plan: None = the manifest's.
            seed: of the noise that is not given.
            dump_cache: run the last cache pass too and return the cache.

        Raises:
            ConfigError: shapes that do not fit the engine.
        """
        shape = noise_shape(self._engine.path, self.manifest, noise)
        check_context(self.manifest, context)
        request = Request(
            context=context,
            shape=shape,
            plan=make_plan(self.manifest, None, None) if plan is None else plan,
            seed=check_seed(seed),
            noise=noise,
            renoise=renoise or {},
            initial=initial,
            commit_last=dump_cache,
        )
        loop = self._loop(request, bool(self._asked_join))
        check_renoise(request, self.manifest.cache.block_frames)
        check_memory(self._engine.path, self.manifest, request, bool(self._asked_join), dump_cache)
        blocks = list(loop)
        parts = [block.latents for block in blocks]
        if initial is not None:
            parts.insert(0, initial)
        latents = np.concatenate(parts, axis=1, dtype=np.float32)
        return Replay(latents, blocks, self._read_cache(loop) if dump_cache else {})

    def _read_cache(self, loop: FrameLoop) -> dict[str, FloatArray]:
        slots = loop.slots.slots_in_order()
        cache = {}
        for layer in range(self.manifest.model.num_layers):
            keys, values = self._engine.denoiser.read_cache(layer, slots)
            cache[f"kv_cache.layer{layer}.k"], cache[f"kv_cache.layer{layer}.v"] = keys, values
        return cache

    def _loop(self, request: Request, join: bool) -> FrameLoop:
        manifest = self.manifest
        schedule = Schedule(manifest.timestep_shift)
        return FrameLoop(
            self._engine.denoiser, manifest.cache, schedule, request, manifest.model.text_len, join
        )
