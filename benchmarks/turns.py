"""Times of calls that take turns, so that the machine's moods hit all alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import TypeVar

from jepa_fast.perf.protocol import clock_of

_WARM_UP = 2  # rounds

Name = TypeVar("Name", bound=Hashable)


def median_seconds(
    calls: Mapping[Name, Callable[[], object]], rounds: int, device: str
) -> dict[Name, float]:
    """Median seconds of each call, all in every round, after two rounds that warm up.

    Args:
        device: `"cpu"` or `"cuda"`, which is waited for.
    """
    clock = clock_of(device)
    for _ in range(_WARM_UP):
        for call in calls.values():
            call()
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock.wall_seconds(call))
    return {name: median(of) for name, of in times.items()}
