"""What each kind of work costs on this machine, learned from what it took.

A duration is a share times a speed. Shares say what kinds of work cost beside each other, by cache length:
they belong to engine and machine and hardly change. The speed is the machine's at this moment, the same for
all work. Telling them apart is what lets two slow passes at one cache length warn all others.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from threading import Lock
from typing import Literal, NamedTuple

Kind = Literal["pass", "cache", "joined", "decode", "rest"]
# The network's passes tell the speed. Decoding and the rest are short: their spread is mostly their own.
NETWORK: tuple[Kind, ...] = ("pass", "cache", "joined")

RECENT = 4  # passes that the speed is taken from
LENGTHS = 64  # cache lengths kept per kind: a video without a window meets a new one every block
SURE = 32  # comparisons after which a share is as sure as it gets
GROWTH = 0.4  # logarithm of what a new cache length may cost beside the length next to it
DOUBT = 8  # passes of other kinds, for each comparison, after which a single one is due
LEAST_RATE, LEAST_CLIP = 0.05, 0.15  # of a sure share's correction; its logarithm at most


@dataclass(slots=True)
class _Share:
    """Logarithm of what one kind of work costs at one cache length, and how often it was compared."""

    log: float
    compared: int


class _Observed(NamedTuple):
    """A pass and what it took, as a logarithm."""

    share: _Share
    log_ms: float

    @property
    def log_speed(self) -> float:
        return self.log_ms - self.share.log


class CostModel:
    """Durations in ms by kind of work and by how many past frames it attends to.

    Kinds: "pass" (one denoising pass), "cache" (a cache pass), "joined" (a cache pass and the next block's
    first pass in one), "decode" and "rest" (what a loop does between, per step), both at 0 past frames.

    Shares are learned by comparing each pass with the one before it, since both ran at about one speed: where
    the durations are further apart than the shares, both shares give way, the less sure one more. The step is
    bounded, so a hiccup or the edge of a stall counts no more than any other comparison, and they even out.

    A base duration per kind, such as a median, would drift in a long stall, and then the kinds measured in it
    would part from those that are not (at one step a block joined passes are measured, single ones are not).
    Here a stall, however long, leaves the shares alone, and a machine that has become slower or faster for
    good is no other case: only the speed changes, for all work at once.

    Safe to use from several threads.
    """

    __slots__ = ("_lock", "_recent", "_shares", "_since_single")

    def __init__(self) -> None:
        self._lock = Lock()
        self._shares: dict[Kind, dict[int, _Share]] = {}
        self._recent: deque[_Observed] = deque(maxlen=RECENT)
        self._since_single = 0

    @property
    def load(self) -> float:
        """Duration by share at present: the second largest of the last 4 passes; 1 before there are two.

        One slow pass is a hiccup, two are noticed, and after four quick ones none is remembered.
        """
        with self._lock:
            speeds = sorted(observed.log_speed for observed in self._recent)
        return math.exp(speeds[-2]) if len(speeds) > 1 else 1.0

    def share(self, kind: Kind, past_frames: int) -> float | None:
        """What the work costs beside other work: milliseconds at load 1. None when the kind is unknown.

        The nearest known cache length stands for one that is not known.
        """
        with self._lock:
            known = self._nearest(kind, past_frames)
            return None if known is None else math.exp(known.log)

    def estimate(self, kind: Kind, past_frames: int) -> float | None:
        """Milliseconds that the work will take now; None when the kind is unknown."""
        share = self.share(kind, past_frames)
        return None if share is None else share * self.load

    def is_doubtful(self, past_frames: int) -> bool:
        """Whether the share of "pass" had better be measured again: sooner the less it was compared."""
        with self._lock:
            known = [self._nearest(kind, past_frames) for kind in ("pass", "joined")]
        return self._since_single >= DOUBT * min((s.compared for s in known if s), default=SURE)

    def observe(self, kind: Kind, past_frames: int, ms: float) -> None:
        """Learn that the work took `ms`; what is no duration (0, not finite) is ignored."""
        if not 0 < ms < math.inf:
            return
        with self._lock:
            before = self._recent[-1] if self._recent else None
            observed = _Observed(self._share(kind, past_frames, math.log(ms)), math.log(ms))
            if before is not None and before.share is not observed.share:
                _compare(before, observed, both=kind in NETWORK)
            if kind in NETWORK:
                self._recent.append(observed)
                self._since_single = 0 if kind == "pass" else self._since_single + 1

    def _share(self, kind: Kind, past_frames: int, log_ms: float) -> _Share:
        """The share to be learned, made if need be."""
        nearest = self._nearest(kind, past_frames)
        lengths = self._shares.setdefault(kind, {})
        if past_frames in lengths:
            # Put last, so that the length that was not in use for longest comes first.
            lengths[past_frames] = lengths.pop(past_frames)
            return lengths[past_frames]
        log = log_ms - (self._recent[-1].log_speed if self._recent else 0.0)
        if nearest is not None:
            log = min(max(log, nearest.log - GROWTH), nearest.log + GROWTH)
        lengths[past_frames] = share = _Share(log, 1)
        if len(lengths) > LENGTHS:
            del lengths[next(iter(lengths))]
        return share

    def _nearest(self, kind: Kind, past_frames: int) -> _Share | None:
        lengths = self._shares.get(kind)
        if not lengths or past_frames in lengths:
            return lengths[past_frames] if lengths else None
        return lengths[min(lengths, key=lambda known: abs(known - past_frames))]


def _compare(before: _Observed, observed: _Observed, both: bool) -> None:
    """Correct the shares of two neighbours by how far their speeds are apart, or only the latter's."""
    one, other = observed.share, before.share
    least = min(one.compared, other.compared) if both else one.compared
    clip = max(2 / least, LEAST_CLIP)
    apart = min(max(observed.log_speed - before.log_speed, -clip), clip)
    step = apart * max(2 / (least + 2), LEAST_RATE)
    part = other.compared / (one.compared + other.compared) if both else 1.0
    one.log += step * part
    other.log -= step * (1 - part)
    one.compared = min(one.compared + 1, SURE)
    if both:
        other.compared = min(other.compared + 1, SURE)


class Price(NamedTuple):
    """What a block costs in ms: the cache pass before it, each step and the rest per step, and decoding."""

    cache: float
    step: float
    rest: float
    decode: float

    def of(self, steps: int) -> float:
        """Milliseconds of a block with `steps` steps."""
        return self.cache + steps * (self.step + self.rest) + self.decode

    def most(self, budget_ms: float, limit: int) -> int:
        """The most steps up to `limit` that fit; 0 when not even one does."""
        return max((n for n in range(1, limit + 1) if self.of(n) <= budget_ms), default=0)

    def times(self, factor: float) -> Price:
        """The price at another load."""
        return Price(*(ms * factor for ms in self))
