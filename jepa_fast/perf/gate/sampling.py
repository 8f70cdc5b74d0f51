"""Two versions taking turns at one case, until it is clear which is faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from jepa_fast.perf.gate.decision import LOOKS, Interval, Verdict, decide, slow_down
from jepa_fast.perf.gate.sides import Side

_ORDER = "ABBA"
"""The turns within a pair: what drifts evenly hits both alike."""
_TURN_SECONDS = 4e-3
_MOST_CALLS = 16


@dataclass(frozen=True)
class Sample:
    """What was found of one case.

    Args:
        interval: of its slow-down.
        verdict: on it.
        base_seconds, head_seconds: the fastest call of each.
    """

    interval: Interval
    verdict: Verdict
    base_seconds: float
    head_seconds: float


def sample(
    base: Side,
    head: Side,
    case: tuple[int, int],
    tolerance: float,
    seconds: float,
    now: Callable[[], float] = time.monotonic,
) -> Sample:
    """Times a case that is open on both sides until the verdict is sure, or the time is up.

    A pair is: both set the case up anew, so that where their data happen to lie is drawn again
    each time, and take turns of some calls; of each, the fastest call counts, as other load only
    ever adds to a time.

    Args:
        base, head: the versions' processes.
        case: its number on either side.
        tolerance: slow-down that is allowed.
        seconds: after which no further pair begins; at least those of the first look are taken.
        now: a clock.

    Raises:
        SideFailed: a version cannot run the case.
    """
    numbers = {base: case[0], head: case[1]}
    calls = _calls(base)
    ratios: list[float] = []
    fastest = {base: float("inf"), head: float("inf")}
    began = now()
    while True:
        # Who begins alternates, too.
        order = (base, head) if len(ratios) % 2 else (head, base)
        for side in order:
            side.ask("open", case=numbers[side])
        least = {base: float("inf"), head: float("inf")}
        for letter in _ORDER:
            side = order["AB".index(letter)]
            least[side] = min(least[side], *side.ask("turn", calls=calls))
        ratios.append(least[head] / least[base])
        fastest = {side: min(fastest[side], least[side]) for side in order}
        late = now() - began > seconds and len(ratios) >= LOOKS[0]
        if late or len(ratios) in LOOKS:
            last = late or len(ratios) == LOOKS[-1]
            interval = slow_down(ratios)
            verdict = decide(interval, tolerance, last)
            if last or verdict is not Verdict.UNSURE:
                return Sample(interval, verdict, fastest[base], fastest[head])


def _calls(side: Side) -> int:
    """Calls in a turn: enough for one of them to be undisturbed, and not more."""
    typical = min(side.ask("turn", calls=3))
    return max(1, min(_MOST_CALLS, round(_TURN_SECONDS / max(typical, 1e-6))))
