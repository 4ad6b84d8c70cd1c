"""The frame loop: noise and a prompt in, blocks of latents out, one at a time.

Per block: make room in the KV cache, denoise by plan, hand the block out, and only when the consumer comes
back for more, write the clean block into the cache (the pass at t = 0). Frames first, bookkeeping after.
That pass and the first one of the next block may run as one (`join`): neither reads what the other writes
but what a mask hides or shows, so the result is the same. On a card it runs while the block is decoded
(`queue`): it is on its way when the frames are handed out. Between two blocks the prompt may change, and the
cache may be computed anew (`asd_rt.steering`).
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from asd_rt.block import Block as Block
from asd_rt.costs import Kind
from asd_rt.deadline import DeadlinePlan
from asd_rt.errors import ConfigError
from asd_rt.kv_cache import FrameSlots
from asd_rt.noise import NoiseAhead
from asd_rt.request import Request as Request
from asd_rt.request import check_request
from asd_rt.request import pad_context as pad_context
from asd_rt.schedule import CLEAN_TIMESTEP, Schedule, Step, add_noise, flow_to_x0
from asd_rt.steering import CleanBlocks, Switch, check_refresh

if TYPE_CHECKING:
    from asd_rt.backends.base import Denoiser
    from asd_rt.backends.overlap import BlockQueue
    from asd_rt.config import CacheConfig

FloatArray = NDArray[np.float32]
NOTHING: FloatArray = np.empty(0, np.float32)


class FrameLoop:
    """One video being generated; iterate over it to get its blocks.

    Attributes:
        slots: bookkeeping of the KV cache, to read the cache by.
        join: run a cache pass and the first pass behind it as one; may be set before the first block.
        queue: where blocks are queued whole, decoding included, instead; may be set before the first block.
    """

    queue: BlockQueue | None = None

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
        check_request(request, cache.block_frames)
        check_refresh(request.refresh_every, cache)
        self._denoiser = denoiser
        self._schedule = schedule
        self._request = request
        self._text_len = text_len
        self._context = pad_context(request.context, text_len)
        self.join = join
        self._cache = cache
        given = 0 if request.initial is None else request.initial.shape[1]
        self.slots = FrameSlots(cache, request.shape[1], given)
        self._before = 0  # frames before the first one that `slots` counts
        self._clean = CleanBlocks(cache.block_frames)
        self._stale = False  # the first of them shows another prompt than the present one
        self._anew = False  # the next block begins a new video
        self._switches: deque[Switch] = deque()  # a queue, because another thread may fill it
        batch, frames, *rest = request.shape
        size = cache.block_frames
        self._first = given // size
        self._last = frames // size - 1 if frames else sys.maxsize
        self._ahead = NoiseAhead((batch, size, *rest), request.seed, self._first, self._last)

    def switch_prompt(self, context: FloatArray, recache: bool = False) -> None:
        """The next block, and all after it, show another prompt; of several before a block, the last counts.

        Args:
            context: text embedding, float32 [B, tokens <= text_len, text_dim].
            recache: compute the cached frames anew under it, so that nothing of the old prompt is left but
                what the frames show.

        Raises:
            ConfigError: another shape.
        """
        batch, _, width = self._request.context.shape
        if context.ndim != 3 or (context.shape[0], context.shape[2]) != (batch, width):
            raise ConfigError(
                f"context must be [{batch}, tokens, {width}], found {list(context.shape)}"
            )
        self._switches.append(Switch(pad_context(context, self._text_len), recache))

    def __iter__(self) -> Iterator[Block]:
        request, denoiser, slots = self._request, self._denoiser, self.slots
        batch, _, _, rows, columns = request.shape
        begin = perf_counter()
        room = slots.block_frames if self.join else 0  # for a block ahead
        denoiser.prepare(batch, (rows, columns), slots.capacity_frames + room)
        denoiser.set_prompt(self._context)
        size = slots.block_frames
        given = [] if request.initial is None else np.split(request.initial, self._first, axis=1)
        self._fill_cache(given)
        due: Block | None = None  # whose cache pass is still to come
        before: tuple[Block, int] | None = None  # the last block and the past of its passes
        index = self._first
        while index <= self._last:
            due, switch_ms = self._turn(index - self._first, due)
            started_ms = _ms_since(begin)
            slots = self.slots
            if due is None:
                denoiser.move(slots.begin_block())
                past = slots.past_frames
            else:
                past = slots.past_frames + size - len(slots.leaving_slots())
            number = index - self._first
            request.plan.begin(number, past, due is not None, self._anew)
            count = self._steps_of(number)
            joined = (
                size if due is not None else 0
            )  # frames that the first pass takes up on the way
            block = Block(
                index=index,
                first_frame=self._before + slots.committed_frames + joined,
                latents=NOTHING,
                steps=count,
                pass_ms=[],
                started_ms=started_ms,
                ready_ms=started_ms,
                joined=due is not None,
                switch_ms=switch_ms,
            )
            if self.queue is None:
                block.latents, block.pass_ms = self._denoise(index, count, due)
                block.ready_ms = _ms_since(begin)
                yield block
                due = block
            else:
                self._run_queued(self.queue, block, before)
                before = block, past
                yield block
            index += 1
        if due is not None and request.commit_last:
            self._commit_block(due)

    def _run_queued(
        self, queue: BlockQueue, block: Block, before: tuple[Block, int] | None
    ) -> None:
        """Queue passes, decoding and cache pass of `block`, and fill in what came out and what it took."""
        from asd_rt.video import to_uint8

        plan, slots = self._request.plan, self.slots
        steps, noise = self._schedule.steps(block.steps), self._noise(block.index, block.steps)
        commits = block.index < self._last or self._request.commit_last
        made = queue.run(noise, steps, slots.block_range(), slots.past_frames, commits)
        if before is not None and made.before is not None:
            earlier, past = before
            earlier.cache_ms, earlier.hidden_ms = made.before.ms, made.before.hidden_ms
            plan.observe("cache", past, made.before.ms)
        for ms in made.pass_ms:
            plan.observe("pass", slots.past_frames, ms)
        block.latents, block.pass_ms = made.latents, made.pass_ms
        block.ready_ms = block.started_ms + made.denoise_ms
        begin = perf_counter()
        block.frames = to_uint8(made.frames)
        block.decode_ms = made.decode_ms + _ms_since(begin)
        if commits:
            self._keep(made.latents)

    def _steps_of(self, number: int) -> int:
        """Steps of a block; the first of a new video has as many as any first one, or what fits."""
        plan, anew = self._request.plan, self._anew
        self._anew = False
        return plan.steps_of(0 if anew and not isinstance(plan, DeadlinePlan) else number)

    def _turn(self, number: int, due: Block | None) -> tuple[Block | None, float | None]:
        """What comes between two blocks: a cache pass of its own, a new prompt, a refresh.

        Args:
            number: of the block to come, counted from the first generated one.
            due: the block before.

        Returns:
            the block whose cache pass is to be joined with the next pass, and ms of a change; None without.
        """
        switch = None
        while self._switches:
            switch = self._switches.popleft()
        every = self._request.refresh_every
        refreshes = bool(every and number and number % every == 0)
        anew = refreshes or (switch is not None and switch.recache)
        if due is not None and not anew:
            if self.join and switch is None:
                return due, None
            self._commit_block(due)
        if switch is None and not refreshes:
            return None, None
        if self.queue is not None:
            self.queue.settle()  # a cache pass is no part of the change
        begin = perf_counter()
        if switch is not None:
            self._denoiser.set_prompt(switch.context)
            self._stale = due is not None or len(self._clean) > 0
        if due is not None and anew:
            self._keep(due.latents)
        if refreshes:
            self._refresh()
        elif anew:
            self._recache()
        if self.queue is not None:
            self.queue.settle()
        switch_ms = _ms_since(begin)
        self._request.plan.charge(switch_ms)
        return None, switch_ms

    def _refresh(self) -> None:
        """Start the cache over with the first block, or with nothing where that shows another prompt."""
        kept = [] if self._stale else [self._clean[0]]
        self._stale, self._anew = False, not kept
        shown = self._before + self.slots.committed_frames
        self.slots = FrameSlots(self._cache, self._request.shape[1])
        self._clean = CleanBlocks(self._cache.block_frames)
        self._fill_cache(kept)
        self._before = shown - self.slots.committed_frames

    def _recache(self) -> None:
        """Compute the keys and values of all frames that the next block sees, from their clean latents."""
        slots = self.slots
        slots.begin_block()  # whose copies are not needed
        for refill in slots.refill():
            clean = self._clean[refill.frames.start // slots.block_frames]
            self._denoiser.denoise(clean, CLEAN_TIMESTEP, refill.frames, refill.past_frames)
            self._denoiser.move(refill.moves)

    def _fill_cache(self, blocks: list[FloatArray]) -> None:
        """Cache passes over given clean blocks."""
        for clean in blocks:
            self._denoiser.move(self.slots.begin_block())
            self._commit(clean)

    def _commit_block(self, block: Block) -> None:
        """The cache pass of a generated block, by itself."""
        begin, past = perf_counter(), self.slots.past_frames
        self._commit(block.latents)
        block.cache_ms = _ms_since(begin)
        self._request.plan.observe("cache", past, block.cache_ms)

    def _denoise(self, index: int, count: int, due: Block | None) -> tuple[FloatArray, list[float]]:
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
                kind, flow = "joined", self._joined_pass(due.latents, x, step)
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
        self._keep(due)
        self._denoiser.move(slots.begin_block())
        return flow

    def _commit(self, clean: FloatArray) -> None:
        """The pass at t = 0 that overwrites the block's slots with keys and values of the clean result."""
        self._denoiser.denoise(
            clean, CLEAN_TIMESTEP, self.slots.block_range(), self.slots.past_frames
        )
        self._keep(clean)

    def _keep(self, clean: FloatArray) -> None:
        """The current block is in the cache, or will be once that is computed anew."""
        slots = self.slots
        block = slots.committed_frames // slots.block_frames
        slots.commit()
        self._clean.add(block, clean, slots.frames_in_order())

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


def _ms_since(begin: float) -> float:
    return (perf_counter() - begin) * 1e3
