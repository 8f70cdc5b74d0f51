"""How a race is measured, without pytest.

First every provider is called once and the checks run: where they fail there are no numbers. Then,
for as many rounds as asked for, all providers take turns, in an order that rotates from round to
round, so that neighbours on the machine, clocks that fall and caches hit all alike. On a GPU, CUDA
events time a call with a cold L2; on a CPU it is the wall clock, and only ratios of calls from the
same round mean anything there. Afterwards come what would disturb the rounds: the time until a call
returns on a GPU, peak memory, and short calls once more as a CUDA graph.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from jepa_fast.perf.ceilings import Ceilings
from jepa_fast.perf.errors import PerfError
from jepa_fast.perf.memory import peak_allocation
from jepa_fast.perf.race import Case, Provider, Race

MINIMUM_ROUNDS = 30
OURS = "ours"
GRAPH_BELOW_MILLISECONDS = 0.05
"""Where launching takes as long as computing, which a CUDA graph leaves out."""
_FLUSHED_BYTES = 2**28
"""More than any GPU's L2."""
_HOST_CALLS = 11
_WARM_UP_CALLS = 3


class OverBudget(PerfError):
    """What is left of the time does not suffice for a race."""


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Args:
        rounds: how often every provider is timed.
        quick: a third of the calls in a round; for trying things out.
        left: the seconds that are left for this race and those after it; None: as long as it takes.
        share: of these, what is meant for this race: where it does not suffice, short calls are
            repeated less, but every one is still timed `rounds` times.
    """

    rounds: int = MINIMUM_ROUNDS
    quick: bool = False
    left: Callable[[], float] | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.rounds < 1 or (self.rounds < MINIMUM_ROUNDS and not self.quick):
            raise PerfError(
                f"expected at least {MINIMUM_ROUNDS} rounds (fewer only in a quick run), "
                f"got {self.rounds}"
            )


class Clock(Protocol):
    """Times calls on one device."""

    round_seconds: float
    """That the calls of one provider in a round should take together, to be told from noise."""
    most_calls: int
    """Of one provider in a round."""

    def seconds(self, provider: Provider, calls: int) -> float:
        """The mean of as many calls, in a row."""

    def wall_seconds(self, provider: Provider) -> float:
        """One call until its result is there, with everything that it waits for."""


class WallClock:
    """For a CPU.

    Args:
        now: seconds since any moment.
    """

    round_seconds = 3e-3
    most_calls = 1000

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def seconds(self, provider: Provider, calls: int) -> float:
        begin = self._now()
        for _ in range(calls):
            provider()
        return (self._now() - begin) / calls

    def wall_seconds(self, provider: Provider) -> float:
        return self.seconds(provider, 1)


class EventClock:
    """For a GPU, each call with a cold L2."""

    round_seconds = 1e-3
    most_calls = 10

    def __init__(self) -> None:
        # Writing it evicts what the last call left in the L2. While the GPU does so, the host
        # gets ahead of it, as it is within a training step.
        self._flush = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")

    def seconds(self, provider: Provider, calls: int) -> float:
        events = [
            tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(calls)
        ]
        for begin, end in events:
            self._flush.zero_()
            begin.record()
            provider()
            end.record()
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in events) / calls / 1e3

    def wall_seconds(self, provider: Provider) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        provider()
        torch.cuda.synchronize()
        return time.perf_counter() - begin


def clock_of(device: str) -> Clock:
    """The clock for `"cpu"` or `"cuda"`."""
    return EventClock() if device == "cuda" else WallClock()


@dataclass
class Times:
    """What was measured of one provider, in seconds and bytes."""

    first_call: float = math.nan
    rounds: list[float] = field(default_factory=list)
    host: float | None = None
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """The interquartile range over the median."""
        if len(self.rounds) < 2:
            return 0.0
        low, middle, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return (high - low) / middle if middle else 0.0


class Contest:
    """One race, being measured: `prepare`, `round` as often as the settings say, `finish`.

    Args:
        race: what to measure.
        device: `"cpu"` or `"cuda"`.
        settings: how much.
        clock: that of the device if None.
    """

    def __init__(
        self, race: Race, device: str, settings: Settings, clock: Clock | None = None
    ) -> None:
        names = [OURS, *race.others, *race.variants]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise PerfError(f"a race has several providers called {', '.join(twice)}")
        for name, numbers in race.numbers.items():
            for what, number in numbers.items():
                if not math.isfinite(number):  # which no results file could hold
                    told = f"{what} {number} of {name}"
                    raise PerfError(f"a race's numbers must be finite, got {told}")
        self.race = race
        self.device = device
        self.settings = settings
        self.why_not = dict(race.why_not)
        self.graph_seconds: float | None = None
        self._clock = clock or clock_of(device)
        self._providers: dict[str, Provider] = {OURS: race.ours, **race.others, **race.variants}
        self._calls: dict[str, int] = {}
        self.times: dict[str, Times] = {}
        self._round = 0

    def check(self) -> None:
        """Calls every provider once, and then the race's check, which raises if one is wrong.

        The first calls come before the check because it makes calls itself: what compiles at a
        first call would do so unmeasured. Another's lack of memory only ends its own part.

        Raises:
            OverBudget: the time was used up before all had been called.
            PerfError: there is not enough memory for ours.
        """
        for name, provider in list(self._providers.items()):
            if self.settings.left is not None and self.settings.left() <= 0:
                raise OverBudget(f"the budget was used up before the first call of {name}")
            found = _first_call(self._clock, provider)
            if isinstance(found, float):
                self.times[name] = Times(first_call=found)
                continue
            if name == OURS:
                raise PerfError(f"ours does not fit here: {found}")
            self.why_not[name] = found
            del self._providers[name]
            if self.device == "cuda":
                torch.cuda.empty_cache()
        self.race.check()

    def prepare(self) -> None:
        """Checks, warms up, and chooses how often each provider is called in a round.

        Raises:
            OverBudget: the time that is left does not suffice.
        """
        self.check()
        # Of first calls nothing follows: they compile. What a second one takes shows whether more
        # are affordable at all.
        typical = self._turn()
        left = self._left_for(typical)
        for _ in range(_WARM_UP_CALLS - 1):
            typical = {name: min(typical[name], again) for name, again in self._turn().items()}
        wanted = self._clock.round_seconds / (3 if self.settings.quick else 1)
        wanted = min(wanted, left * self.settings.share / self.settings.rounds / len(typical))
        self._calls = {
            name: max(1, min(self._clock.most_calls, math.ceil(wanted / max(seconds, 1e-9))))
            for name, seconds in typical.items()
        }

    def _turn(self) -> dict[str, float]:
        """The seconds of one more call of every provider."""
        return {name: self._clock.seconds(each, 1) for name, each in self._providers.items()}

    def _left_for(self, typical: Mapping[str, float]) -> float:
        """The seconds that are left, which have to suffice for one call a round."""
        if self.settings.left is None:
            return math.inf
        left, rounds = self.settings.left(), self.settings.rounds
        needed = (rounds + _WARM_UP_CALLS - 1) * sum(typical.values())
        if needed > left:
            raise OverBudget(
                f"needs {needed:.1f} s for {rounds} rounds, {max(left, 0):.1f} s are left of the "
                "budget"
            )
        return left

    def round(self) -> float:
        """Times every provider; gives the seconds of a call of ours."""
        names = list(self._providers)
        first = self._round % len(names)
        self._round += 1
        collecting = gc.isenabled()
        gc.disable()
        try:
            for name in names[first:] + names[:first]:
                seconds = self._clock.seconds(self._providers[name], self._calls[name])
                self.times[name].rounds.append(seconds)
        finally:
            if collecting:
                gc.enable()
        return self.times[OURS].rounds[-1]

    def finish(self) -> None:
        """Measures what has no part in the rounds: memory, the host's time, a CUDA graph."""
        for name, provider in self._providers.items():
            times = self.times[name]
            times.peak_bytes = peak_allocation(provider, self.device)
            if self.device == "cuda":
                times.host = _host_seconds(provider)
        if self.device == "cuda" and 1e3 * self.times[OURS].median < GRAPH_BELOW_MILLISECONDS:
            self._replay()

    def _replay(self) -> None:
        try:
            replay = _captured(self.race.ours)
        except RuntimeError as error:
            # Allowed to be impossible: work that waits for the GPU cannot be captured.
            self.why_not["ours as a CUDA graph"] = _first_line(error)
            return
        seconds = [
            self._clock.seconds(replay, self._calls[OURS]) for _ in range(self.settings.rounds)
        ]
        self.graph_seconds = statistics.median(seconds)

    def measure(self) -> None:
        """All of it."""
        self.prepare()
        for _ in range(self.settings.rounds):
            self.round()
        self.finish()

    def ratios(self) -> dict[str, float]:
        """The others' times over ours: the median over rounds of what one round says."""
        ours = self.times[OURS].rounds
        return {
            name: statistics.median(
                other / our for other, our in zip(self.times[name].rounds, ours, strict=True)
            )
            for name in self._providers
            if name != OURS
        }

    def record(self, case: Case, run: str, ceilings: Ceilings) -> dict[str, Any]:
        """The race's record in a results file.

        Args:
            case: which one it was.
            run: the run's name.
            ceilings: of the machine.
        """
        ratios = self.ratios()
        rivals = [name for name in ratios if name in self.race.others]
        best = min(rivals, key=ratios.__getitem__, default=None)
        seconds, cost = self.times[OURS].median, self.race.cost
        share, bound = ceilings.share(cost, case.dtype, seconds)
        return {
            "operator": case.operator,
            "case": case.name,
            "device": self.device,
            "dtype": case.dtype,
            "sizes": dict(case.sizes),
            "run": run,
            "backend": self.race.backend,
            "rounds": len(self.times[OURS].rounds),
            "quick": self.settings.quick,
            "cost": {"read": cost.read, "written": cost.written, "flops": cost.flops},
            "providers": {
                name: {
                    "milliseconds": _digits(1e3 * times.median),
                    "spread": _digits(times.spread),
                    "first_call_milliseconds": _digits(1e3 * times.first_call),
                    "host_microseconds": _digits(times.host and 1e6 * times.host),
                    "peak_bytes": times.peak_bytes,
                    "ratio": _digits(ratios.get(name)),
                }
                for name, times in self.times.items()
            },
            "numbers": {
                name: {what: _digits(number) for what, number in numbers.items()}
                for name, numbers in self.race.numbers.items()
            },
            "variants": [name for name in self.times if name in self.race.variants],
            "why_not": self.why_not,
            "headline": best and {"against": best, "ratio": _digits(ratios[best])},
            "gigabytes_per_second": _digits(cost.moved / seconds / 1e9 if cost.moved else None),
            "teraflops": _digits(cost.flops / seconds / 1e12 if cost.flops else None),
            "share_of_ceiling": _digits(share),
            "bound": bound,
            "graph_milliseconds": _digits(self.graph_seconds and 1e3 * self.graph_seconds),
        }


def _digits(value: float | None) -> float | None:
    """Five digits: more are noise, and make versions of a file differ."""
    return None if value is None else float(f"{value:.5g}")


def _first_call(clock: Clock, provider: Provider) -> float | str:
    """Its seconds, or why there is not enough memory for it."""
    try:
        return clock.wall_seconds(provider)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        return f"out of memory: {_first_line(error)}"


def _is_out_of_memory(error: Exception) -> bool:
    """A CPU's allocator and Triton have no exceptions of their own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "out of memory"))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _host_seconds(provider: Provider) -> float:
    """Until a call returns, on a GPU that waits for nothing else."""
    found = []
    for _ in range(_HOST_CALLS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        provider()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def _captured(provider: Provider) -> Provider:
    """What replays a call of `provider`.

    Raises:
        RuntimeError: it does what a graph cannot hold.
    """
    # A capture that fails leaves torch's allocator in the middle of it, so what is bound to fail is
    # not tried.
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        provider()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_CALLS):
            provider()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        provider()
    return graph.replay
