"""What paired times prove: slower, not slower, or not enough to tell."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

LOOKS = (32, 64, 128, 256, 512)
"""After how many pairs the numbers are looked at; the last one decides."""
_CONFIDENCE, _EARLY_CONFIDENCE = 0.99, 0.999
"""One-sided. Stricter before the last look, as every look is a chance to err."""
_RESAMPLES = 4000


class Verdict(Enum):
    """On a slow-down beyond the tolerance."""

    SLOWER = "slower"
    OK = "ok"
    UNSURE = "unsure"


@dataclass(frozen=True)
class Interval:
    """A slow-down as a fraction: 0.05 is 5 % slower, -0.05 faster.

    Args:
        estimate: of it.
        low, high: its 99 % bounds, each one-sided.
        early_low, early_high: its 99.9 % bounds.
        pairs: how many times were compared.
    """

    estimate: float
    low: float
    high: float
    early_low: float
    early_high: float
    pairs: int

    def __str__(self) -> str:
        return f"{percent(self.estimate)} ({percent(self.low)} to {percent(self.high)})"


def percent(fraction: float) -> str:
    """`+1.3 %`."""
    return f"{100 * fraction:+.1f} %"


def slow_down(ratios: Sequence[float], seed: int = 0) -> Interval:
    """The slow-down that paired ratios tell of, with bounds by the bootstrap over pairs.

    The estimate is the mean of the middle half of the logarithms: nearly as exact as the mean where
    times are well behaved, and out of reach of the pairs that something else disturbed.

    Args:
        ratios: the new version's time over the old one's, a pair each; positive.
        seed: of the bootstrap, so that the same numbers give the same verdict.

    Raises:
        ValueError: there are fewer than two ratios.
    """
    if len(ratios) < 2:
        raise ValueError(f"expected at least two ratios, got {len(ratios)}")
    logs = [math.log(ratio) for ratio in ratios]
    generator = random.Random(seed)
    found = sorted(_middle_mean(generator.choices(logs, k=len(logs))) for _ in range(_RESAMPLES))

    def bound(share: float) -> float:
        return math.expm1(found[min(_RESAMPLES - 1, int(share * _RESAMPLES))])

    return Interval(
        math.expm1(_middle_mean(logs)),
        bound(1 - _CONFIDENCE),
        bound(_CONFIDENCE),
        bound(1 - _EARLY_CONFIDENCE),
        bound(_EARLY_CONFIDENCE),
        len(ratios),
    )


def _middle_mean(values: Sequence[float]) -> float:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return math.fsum(ordered[quarter : len(ordered) - quarter]) / (len(ordered) - 2 * quarter)


def decide(found: Interval, tolerance: float, last: bool) -> Verdict:
    """The verdict at a look.

    Args:
        found: so far.
        tolerance: slow-down that is allowed.
        last: whether there is no later look.
    """
    low, high = (found.low, found.high) if last else (found.early_low, found.early_high)
    if low > tolerance:
        return Verdict.SLOWER
    return Verdict.OK if high <= tolerance else Verdict.UNSURE
