"""A video that is being generated: blocks come out, and new prompts go in."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from asd_rt.backends.overlap import OverlappingEngine
from asd_rt.costs import CostModel
from asd_rt.deadline import DeadlinePlan
from asd_rt.decoding import Decoder
from asd_rt.frame_loop import Block, FrameLoop, Request
from asd_rt.joining import joining_is_faster
from asd_rt.warm_up import learn_costs

if TYPE_CHECKING:
    from asd_rt.backends.base import Engine

FloatArray = NDArray[np.float32]


class Stream(Iterator[Block]):
    """The blocks of one video, in order; made by a session's `generate`.

    Work is done by the thread that asks for a block, and only then. Use one thread at a time.

    Attributes:
        start_frames: what the video begins with, decoded, uint8 [frames, rows, columns, 3]; None before the
            first block is there, and where nothing was given to begin with or nothing decodes.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        loop: FrameLoop,
        costs: CostModel,
        join: bool | None,
        decodes: bool,
        context_of: Callable[[str], FloatArray],
    ) -> None:
        """A stream of `request`, which `loop` runs.

        Args:
            engine: opened.
            request: the video.
            loop: of that request, not begun.
            costs: what is known of the engine on this machine, for deadlines.
            join: as in `open_session`.
            decodes: decode the blocks.
            context_of: text embedding of a prompt.
        """
        self._engine, self._request, self._loop = engine, request, loop
        self._costs, self._join, self._decodes = costs, join, decodes
        self._context_of = context_of
        self.start_frames: NDArray[np.uint8] | None = None
        self._blocks = self._run()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Block:
        return next(self._blocks)

    def close(self) -> None:
        """End the video; may be called twice."""
        self._blocks.close()

    def switch_prompt(self, prompt: str | FloatArray, recache: bool = False) -> None:
        """Show another prompt from the next block on; of several before a block, the last one counts.

        Nothing changes where it fails.

        Args:
            prompt: what to show, or its embedding, float32 [B, tokens <= text_len, text_dim].
            recache: compute what is remembered of the video anew under the new prompt, with a cache pass for
                each block in the window; without, frames that were made under the old one stay as they are.

        Raises:
            PromptError: the engine cannot read the prompt.
            ConfigError: an embedding of another shape.
        """
        context = self._context_of(prompt) if isinstance(prompt, str) else prompt
        self._loop.switch_prompt(context, recache)

    def _run(self) -> Generator[Block, None, None]:
        """Decode blocks as they come, and settle with the plan what they took.

        What is not known yet of this machine is measured first.
        """
        from asd_rt.video import to_uint8

        request, join = self._request, self._join
        plan = request.plan
        decoder = Decoder(self._engine, request.shape[3:]) if self._decodes else None
        if join is None:
            join = joining_is_faster(self._engine, request.shape)
        unknown = self._costs.share("joined" if join else "pass", 0) is None
        if unknown and isinstance(plan, DeadlinePlan):
            learn_costs(self._engine, self._costs, request.shape, join, decoder)
            if decoder is not None:
                decoder.reset()
        if decoder is not None and request.initial is not None:
            # A codec that remembers must have seen them, to go on from them.
            self.start_frames = to_uint8(decoder.decode(request.initial), 1)
        self._loop.join = join
        if decoder is not None and isinstance(self._engine, OverlappingEngine):
            self._loop.queue = self._engine.block_queue(decoder)
        before: Block | None = None
        for number, block in enumerate(self._loop):
            if decoder is not None and block.frames is None:
                begin = perf_counter()
                block.frames = to_uint8(decoder.decode(block.latents), 1)
                block.decode_ms = (perf_counter() - begin) * 1e3
            if block.decode_ms is not None:
                plan.observe("decode", 0, block.decode_ms)
            between_ms = (block.switch_ms or 0.0) + (0.0 if before is None else before.behind_ms)
            plan.finish(number, between_ms + block.denoise_ms + (block.decode_ms or 0.0))
            block.deadline = plan.report(number)
            yield block
            before = block
