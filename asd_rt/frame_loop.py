"""The frame loop: noise and a prompt in, blocks of latents out, one at a time.

Per block: make room in the KV cache, denoise by plan, hand the block out, and only when the consumer comes
back for more, write the clean block into the cache (the pass at t = 0). Frames first, bookkeeping after.
That pass and the first one of the next block may run as one (`join`): neither reads what the other writes
but what a mask hides or shows, so the result is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from asd_rt.costs import Kind
from asd_rt.deadline import BlockReport
from asd_rt.errors import ConfigError
from asd_rt.kv_cache import FrameSlots
from asd_rt.noise import NoiseAhead
from asd_rt.plan import Plan
from asd_rt.schedule import Schedule, Step, add_noise, flow_to_x0

if TYPE_CHECKING:
    from asd_rt.backends.base import Denoiser
    from asd_rt.config import CacheConfig

FloatArray = NDArray[np.float32]
CLEAN_TIMESTEP = 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """One video to generate.

    Attributes:
        context: text embedding, float32 [B, tokens <= text_len, text_dim].
        shape: of the whole video's latents, initial frames included: (B, F, C, h, w); F is a multiple of
            the block size.
        plan: denoising steps of each generated block.
        seed: of all noise that is not given.
        noise: None or float32 of `shape`; frames under `initial` are not used.
        renoise: {(block, step): float32 [B, block_frames, C, h, w]}: fresh noise after step `step` of
            block `block`; what is missing is drawn from `seed`. Blocks count from the first initial one.
        initial: None or clean latents [B, whole blocks, C, h, w] that only fill the cache.
        commit_last: run the last block's cache pass too (to read the cache, or to go on from it).
    """

    context: FloatArray
    shape: tuple[int, int, int, int, int]
    plan: Plan
    seed: int = 0
    noise: FloatArray | None = None
    renoise: Mapping[tuple[int, int], FloatArray] = field(default_factory=dict)
    initial: FloatArray | None = None
    commit_last: bool = False


@dataclass(slots=True)
class Block:
    """One generated block.

    Attributes:
        index: counted from the first block of the video, initial ones included.
        first_frame: absolute index of its first latent frame.
        latents: clean latents, float32 [B, block_frames, C, h, w].
        steps: denoising passes that made it.
        pass_ms: duration of each denoising pass.
        joined: the first of them was also the cache pass of the block before.
        started_ms, ready_ms: when its denoising began and ended, since the loop began.
        cache_ms: duration of its cache pass; None until the consumer asked for the next block, and where that
            pass was joined with the next block's first.
        deadline: how it kept its deadline; None where there is none.
        frames: decoded video, uint8 [frames, rows, columns, 3]; None where nothing decodes.
        decode_ms: duration of decoding; None where nothing decodes.
    """

    index: int
    first_frame: int
    latents: FloatArray
    steps: int
    pass_ms: list[float]
    started_ms: float
    ready_ms: float
    joined: bool = False
    cache_ms: float | None = None
    deadline: BlockReport | None = None
    frames: NDArray[np.uint8] | None = None
    decode_ms: float | None = None

    @property
    def denoise_ms(self) -> float:
        """From the start of the block until its latents were there."""
        return self.ready_ms - self.started_ms

    @property
    def block_ms(self) -> float:
        """The whole block: denoising, cache pass and decoding, of those that ran."""
        return self.denoise_ms + (self.cache_ms or 0.0) + (self.decode_ms or 0.0)


class FrameLoop:
    """One video being generated; iterate over it to get its blocks.

    Attributes:
        slots: bookkeeping of the KV cache, to read the cache by.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        cache: CacheConfig,
        schedule: Schedule,
        request: Request,
        text_len: int,
        join: bool = False,
    ) -> None:
        """Check the request; nothing is computed before the first block is asked for.

        Args:
            denoiser: of an opened engine.
            cache: its geometry.
            schedule: of the noise.
            request: the video.
            text_len: tokens of a context that the network takes.
            join: run a cache pass and the first pass behind it as one; the denoiser must be able to.

        Raises:
            ConfigError: shapes that do not fit each other or the cache.
            BackendError: the denoiser cannot serve these sizes.
        """
        _check(request, cache.block_frames)
        self._denoiser = denoiser
        self._schedule = schedule
        self._request = request
        self._context = pad_context(request.context, text_len)
        self._join = join
        self.slots = FrameSlots(cache, request.shape[1])
        batch, frames, *rest = request.shape
        size = cache.block_frames
        first = 0 if request.initial is None else request.initial.shape[1] // size
        shape = (batch, size, *rest)
        self._ahead = NoiseAhead(shape, request.seed, first, frames // size - 1)

    def __iter__(self) -> Iterator[Block]:
        request, denoiser, slots = self._request, self._denoiser, self.slots
        batch, total_frames, _, rows, columns = request.shape
        begin = perf_counter()
        room = slots.block_frames if self._join else 0  # for a block ahead
        denoiser.prepare(batch, (rows, columns), slots.capacity_frames + room)
        denoiser.set_prompt(self._context)
        initial_blocks = self._fill_cache(request.initial)
        last = total_frames // slots.block_frames - 1
        due: FloatArray | None = None  # the block whose cache pass is still to come
        for index in range(initial_blocks, last + 1):
            started_ms = _ms_since(begin)
            if due is None:
                denoiser.move(slots.begin_block())
                past = slots.past_frames
            else:
                past = slots.past_frames + slots.block_frames - len(slots.leaving_slots())
            number = index - initial_blocks
            request.plan.begin(number, past, due is not None)
            latents, pass_ms = self._denoise(index, request.plan.steps_of(number), due)
            block = Block(
                index=index,
                first_frame=slots.committed_frames,
                latents=latents,
                steps=len(pass_ms),
                pass_ms=pass_ms,
                started_ms=started_ms,
                ready_ms=_ms_since(begin),
                joined=due is not None,
            )
            yield block
            due = latents if self._join and index < last else None
            if due is None and (index < last or request.commit_last):
                cache_begin, past = perf_counter(), slots.past_frames
                self._commit(latents)
                block.cache_ms = _ms_since(cache_begin)
                request.plan.observe("cache", past, block.cache_ms)

    def _fill_cache(self, initial: FloatArray | None) -> int:
        """Cache passes over given clean frames; returns how many blocks they are."""
        if initial is None:
            return 0
        size = self.slots.block_frames
        blocks: int = initial.shape[1] // size
        for index in range(blocks):
            self._denoiser.move(self.slots.begin_block())
            self._commit(initial[:, index * size : (index + 1) * size])
        return blocks

    def _denoise(
        self, index: int, count: int, due: FloatArray | None
    ) -> tuple[FloatArray, list[float]]:
        """x0 of block `index` after `count` steps, and each pass's duration in ms.

        `due` is the block before where its cache pass is to be joined with the first of these.
        """
        plan, slots = self._request.plan, self.slots
        steps, noise = self._schedule.steps(count), self._noise(index, count)
        x = x0 = noise[0]
        pass_ms = []
        for i, step in enumerate(steps):
            if i:
                x = add_noise(x0, noise[i], step.sigma)
            kind: Kind = "pass"
            begin = perf_counter()
            if due is None or i:
                flow = self._pass(x, step)
            else:
                kind, flow = "joined", self._joined_pass(due, x, step)
            pass_ms.append(_ms_since(begin))
            plan.observe(kind, slots.past_frames, pass_ms[-1])
            x0 = flow_to_x0(flow, x, step.sigma)
        return x0, pass_ms

    def _pass(self, x: FloatArray, step: Step) -> FloatArray:
        slots = self.slots
        return self._denoiser.denoise(x, step.timestep, slots.block_range(), slots.past_frames)

    def _joined_pass(self, due: FloatArray, x: FloatArray, step: Step) -> FloatArray:
        """Write the block `due` into the cache and denoise `x`, the block after it, in one pass."""
        slots = self.slots
        start = slots.committed_frames
        both = range(start, start + 2 * slots.block_frames)
        flow = self._denoiser.denoise_joined(
            due, x, step.timestep, both, slots.past_frames, slots.leaving_slots()
        )
        slots.commit()
        self._denoiser.move(slots.begin_block())
        return flow

    def _commit(self, clean: FloatArray) -> None:
        """The pass at t = 0 that overwrites the block's slots with keys and values of the clean result."""
        self._denoiser.denoise(
            clean, CLEAN_TIMESTEP, self.slots.block_range(), self.slots.past_frames
        )
        self.slots.commit()

    def _noise(self, index: int, count: int) -> list[FloatArray]:
        """Noise of block `index` before each of its `count` steps: what was given, the rest drawn."""
        request, size = self._request, self.slots.block_frames
        given = [request.renoise.get((index, step)) for step in range(count - 1)]
        first = None
        if request.noise is not None:
            first = request.noise[:, index * size : (index + 1) * size]
        found = dict(enumerate([first, *given]))
        found |= self._ahead.draw(index, [step for step, noise in found.items() if noise is None])
        return [noise for noise in found.values() if noise is not None]


def pad_context(context: FloatArray, text_len: int) -> FloatArray:
    """`context` [B, tokens, text_dim] zero-padded to [B, text_len, text_dim].

    Raises:
        ConfigError: more tokens than the network takes.
    """
    tokens = context.shape[1]
    if tokens > text_len:
        raise ConfigError(f"context has {tokens} tokens, this engine takes at most {text_len}")
    return np.pad(context.astype(np.float32, copy=False), ((0, 0), (0, text_len - tokens), (0, 0)))


def _check(request: Request, block_frames: int) -> None:
    """Shapes of a request fit each other; which engine takes them is the session's question."""
    batch, frames, *rest = request.shape
    if frames < 1 or frames % block_frames:
        raise ConfigError(
            f"{frames} latent frames are not a whole number of blocks of {block_frames}"
        )
    if request.context.ndim != 3 or request.context.shape[0] != batch:
        raise ConfigError(
            f"context must be [{batch}, tokens, text_dim], found {list(request.context.shape)}"
        )
    if request.noise is not None and request.noise.shape != request.shape:
        raise ConfigError(f"noise must be {list(request.shape)}, found {list(request.noise.shape)}")
    initial = request.initial
    if initial is not None:
        given = initial.shape[1] if initial.ndim == 5 else 0
        if (
            initial.shape != (batch, given, *rest)
            or given % block_frames
            or not 0 < given <= frames
        ):
            raise ConfigError(
                f"initial must be [{batch}, whole blocks of {block_frames} up to {frames}, "
                f"{', '.join(map(str, rest))}], found {list(initial.shape)}"
            )
    expected = (batch, block_frames, *rest)
    for (block, step), noise in request.renoise.items():
        if noise.shape != expected:
            raise ConfigError(
                f"renoise.block{block}.step{step} must be {list(expected)}, found {list(noise.shape)}"
            )


def _ms_since(begin: float) -> float:
    return (perf_counter() - begin) * 1e3
