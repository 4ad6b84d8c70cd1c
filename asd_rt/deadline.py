"""Deadline plans: as many denoising steps as fit into the time that a block has."""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass

from asd_rt.costs import NETWORK, CostModel, Kind, Price
from asd_rt.errors import ConfigError
from asd_rt.schedule import MAX_STEPS, check_steps

__all__ = ["MAX_DEADLINE_MS", "BlockReport", "CostModel", "DeadlinePlan", "Kind", "check_deadline"]

MAX_DEADLINE_MS = 86_400_000.0  # a day
MARGIN = 0.85  # share of the budget that more steps must fit into
PATIENCE = 3  # blocks in a row that must have had room for more steps
HISTORY = 64  # blocks whose reports are kept
_log = logging.getLogger(__name__)


def check_deadline(deadline_ms: float) -> float:
    """`deadline_ms` as a float.

    Raises:
        ConfigError: it is no number above 0 and up to a day.
    """
    number = isinstance(deadline_ms, int | float) and not isinstance(deadline_ms, bool)
    if number and 0 < deadline_ms <= MAX_DEADLINE_MS:
        return float(deadline_ms)
    raise ConfigError(
        f"deadline-ms must be a number above 0 and at most {MAX_DEADLINE_MS:.0f} (a day), found "
        f"{deadline_ms!r}; give the milliseconds that a block may take, such as 40"
    )


@dataclass(frozen=True, slots=True)
class BlockReport:
    """How one block kept its deadline.

    Attributes:
        block: counted from the first generated one.
        steps: denoising steps that it got.
        budget_ms: time that it had.
        planned_ms: time that it was expected to take; None when nothing was known yet.
        taken_ms: time that it took.
        fits: False when even one step was expected to take longer than the budget.
    """

    block: int
    steps: int
    budget_ms: float
    planned_ms: float | None
    taken_ms: float
    fits: bool

    @property
    def slack_ms(self) -> float:
        """Time that was left; negative when the block came late."""
        return self.budget_ms - self.taken_ms

    @property
    def missed(self) -> bool:
        """Whether the block came late."""
        return self.taken_ms > self.budget_ms


class DeadlinePlan:
    """The most steps that fit into the deadline, block by block.

    The first block has `first_steps` deadlines, because nothing is due before it: that is its share of
    First-Frame Enhancement. A later block gets fewer steps as soon as they would not fit or have come late,
    and more only after three blocks in a row had room for them in 85 % of the budget: then as many as all
    three had room for.

    Per block: `begin`, `steps_of`, `observe` for each piece of work, `finish`; then `report` tells.
    """

    __slots__ = (
        "_block",
        "_cache_ms",
        "_cache_past",
        "_calm",
        "_charged_ms",
        "_fits",
        "_joined",
        "_level",
        "_passes_ms",
        "_past_frames",
        "_planned_ms",
        "_reports",
        "_rooms",
        "_spent_ms",
        "_steps",
        "_warned",
        "costs",
        "deadline_ms",
        "first_steps",
        "steps",
    )

    def __init__(
        self,
        *,
        deadline_ms: float,
        steps: int = MAX_STEPS,
        first_steps: int = MAX_STEPS,
        costs: CostModel | None = None,
    ) -> None:
        """A plan for one video after another.

        Args:
            deadline_ms: time that a later block may take, its cache pass and decoding included.
            steps: the most that a later block may get.
            first_steps: the most that the first block may get, and the deadlines it has.
            costs: what is known of this engine on this machine; shared by its videos. None = nothing.

        Raises:
            ConfigError: no possible deadline, or steps not in 1..4.
        """
        self.deadline_ms = check_deadline(deadline_ms)
        self.steps = check_steps(steps, "steps")
        self.first_steps = check_steps(first_steps, "first-steps")
        self.costs = CostModel() if costs is None else costs
        self._restart()

    def _restart(self) -> None:
        self._block: int | None = None
        self._past_frames = self._cache_past = 0
        self._joined = False
        self._level: int | None = None  # steps of later blocks; None until costs are known
        self._rooms: deque[int] = deque(maxlen=PATIENCE)  # steps that the last blocks had room for
        self._reports: dict[int, BlockReport] = {}
        self._warned, self._calm = False, 0
        self._clear()

    def _clear(self) -> None:
        """Nothing has been done yet for the next block."""
        self._spent_ms = self._passes_ms = self._charged_ms = 0.0
        self._cache_ms: float | None = None

    def budget_ms(self, block: int) -> float:
        """Time that `block` has."""
        return self.deadline_ms * (self.first_steps if block == 0 else 1)

    def begin(self, block: int, past_frames: int, joined: bool = False, anew: bool = False) -> None:
        """Plan a block. Block 0 begins a video.

        Args:
            block: counted from the first generated one.
            past_frames: that its passes attend to besides itself.
            joined: its first pass is also the cache pass of the block before. Otherwise that pass may have
                been observed already: then what it took counts, else what it is expected to take.
            anew: it begins a new video; without a deadline it gets as many steps as a first block.
        """
        if block == 0:
            self._restart()
        self._cache_past, self._past_frames = self._past_frames, past_frames
        self._block, self._joined = block, joined
        self._fits, self._planned_ms = True, None
        share = self._price()
        if share is None:
            self._steps = self.first_steps if block == 0 else 1
            return
        budget_ms = self.budget_ms(block)
        price = share.times(self.costs.load)
        if self._cache_ms is not None and block and not joined:
            price = price._replace(cache=self._cache_ms)
        left_ms = budget_ms - self._charged_ms
        self._fits = price.of(1) <= left_ms
        if block == 0:
            self._steps = max(1, price.most(left_ms, self.first_steps))
        elif anew and self.deadline_ms >= MAX_DEADLINE_MS:
            self._steps = self.first_steps
        else:
            self._steps = self._settle(price, budget_ms)
            if self._charged_ms:  # that says nothing about the blocks to come
                self._steps = min(self._steps, max(1, price.most(left_ms, self.steps)))
        self._planned_ms = price.of(self._steps) + self._charged_ms
        if not self._charged_ms:
            self._warn(price.of(1), budget_ms)

    def _settle(self, price: Price, budget_ms: float) -> int:
        """Steps of a later block: down at once, up with patience."""
        room = max(1, price.most(MARGIN * budget_ms, self.steps))
        fitting = max(1, price.most(budget_ms, self.steps))
        level = self._level
        if level is None:
            level = room
        elif fitting < level:
            level = fitting
            self._rooms.clear()
        elif len(self._rooms) == PATIENCE and min(room, *self._rooms) > level:
            level = min(room, *self._rooms)
            self._rooms.clear()
        self._level = level
        return level

    def steps_of(self, block: int) -> int:
        """Denoising steps of `block`, which was begun last.

        Raises:
            ValueError: another one was.
        """
        self._check(block)
        return self._steps

    def observe(self, kind: Kind, past_frames: int, ms: float) -> None:
        """A piece of work took `ms`; it counts towards the block that is not finished yet.

        Args:
            kind: "pass", "cache", "joined" or "decode".
            past_frames: that the pass attended to; for "joined" what `begin` was given; 0 for "decode".
            ms: duration.
        """
        self.costs.observe(kind, past_frames, ms)
        self._spent_ms += ms
        if kind == "cache":
            self._cache_ms = ms
        if kind in NETWORK:
            self._passes_ms += ms

    def charge(self, ms: float) -> None:
        """Other work took `ms` of the next block's time: a new prompt, or a cache that was computed anew.

        No cache pass is due any more. That block gets fewer steps where it must; later ones are planned as if
        nothing had been, and a miss counts against none of them.
        """
        self._charged_ms += ms
        self._spent_ms += ms
        if self._cache_ms is None:
            self._cache_ms = 0.0

    def finish(self, block: int, taken_ms: float) -> None:
        """The block is out.

        Args:
            block: which was begun last.
            taken_ms: all it took, with the cache or joined pass before it and with decoding; not what its
                consumer did.

        Raises:
            ValueError: another block was begun last.
        """
        self._check(block)
        report = BlockReport(
            block, self._steps, self.budget_ms(block), self._planned_ms, taken_ms, self._fits
        )
        self._reports[block] = report
        self._reports.pop(block - HISTORY, None)
        if block:  # the first block's rest holds what only a first block does
            self.costs.observe("rest", 0, (taken_ms - self._spent_ms) / self._steps)
            if not self._charged_ms:
                self._rooms.append(self._room(report))
            if report.missed and not self._charged_ms and self._level is not None:
                self._level = max(1, self._level - 1)  # harder evidence than an estimate
        self._block = None
        self._clear()

    def _room(self, report: BlockReport) -> int:
        """Steps that the block had room for, by what it took itself: the load still knows blocks before."""
        price = self._price()
        if report.missed or price is None:
            return 0
        factor = self._passes_ms / (price.cache + report.steps * price.step)
        return price.times(factor).most(MARGIN * report.budget_ms, self.steps)

    def report(self, block: int) -> BlockReport:
        """How `block` kept its deadline; the last 64 blocks are kept.

        Raises:
            KeyError: it is not finished, or too long ago.
        """
        return self._reports[block]

    def _price(self) -> Price | None:
        """What the block begun last costs at load 1; None when no pass is known."""
        share = self.costs.share
        cache = share("cache", self._cache_past)
        both = share("joined", self._past_frames)
        # All passes are the same network over as many tokens or twice as many: one stands for another.
        one = share("pass", self._past_frames) or cache or both
        if one is None:
            return None
        cache = cache or one
        if self._joined:
            both = both or one + cache
            # At one step "pass" is not measured. What was found once must not rule out a second step for
            # ever: from time to time one is tried as if a pass cost half of both.
            one = both / 2 if self.costs.is_doubtful(self._past_frames) else min(one, both)
            cache = both - one
        rest = share("rest", 0) or 0.0
        return Price(cache if self._block else 0.0, one, rest, share("decode", 0) or 0.0)

    def _check(self, block: int) -> None:
        if block != self._block:
            raise ValueError(f"block {block} is not the one begun last ({self._block})")

    def _warn(self, needed_ms: float, budget_ms: float) -> None:
        """Say once that even one step does not fit; again only after three blocks in a row have fitted."""
        if self._fits:
            self._calm += 1
            self._warned = self._warned and self._calm < PATIENCE
            return
        self._calm = 0
        if not self._warned:
            self._warned = True
            _log.warning(
                "block %d needs about %.1f ms even with one step, its budget is %.1f ms: it comes late, and "
                "the video goes on; allow --deadline-ms %d, or stop what else runs on this machine",
                self._block,
                needed_ms,
                budget_ms,
                math.ceil(needed_ms if self._block else needed_ms / self.first_steps),
            )
