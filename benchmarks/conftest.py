"""The protocol of every benchmark: correct first, then interleaved, then ratios.

A benchmark hands its providers (ours and the alternatives) to `race`. On a CPU only ratios from
one run mean anything: the machine's other load changes from second to second, but hits neighbours
alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

Provider = Callable[[], object]
Race = Callable[..., None]

_lines: list[str] = []


class Stopwatch:
    """Times one call: on a GPU by events and with a cold L2, on a CPU by the wall clock."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        # Larger than any L2; writing it evicts what the last call left there.
        self.flush = torch.empty(2**28, dtype=torch.int8, device=device) if self.cuda else None

    def seconds(self, provider: Provider) -> float:
        if self.flush is None:
            start = time.perf_counter()
            provider()
            return time.perf_counter() - start
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        provider()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Race:
    """`race(device, check, moved, ours=..., **others)`: times all providers in turn, `ours` last.

    Args:
        device: `"cpu"` or `"cuda"`.
        check: raises where a provider is wrong; it runs first, and then there are no numbers.
        moved: bytes that have to be read and written at least.
        ours, others: the providers; calling one does the work once.
    """

    def run(
        device: str,
        check: Callable[[], None],
        moved: int,
        *,
        ours: Provider,
        rounds: int = 30,
        **others: Provider,
    ) -> None:
        check()
        watch = Stopwatch(device)
        times: dict[str, list[float]] = {name: [] for name in (*others, "ours")}
        first = watch.seconds(ours)
        for provider in (*others.values(), ours):
            for _ in range(2):
                provider()

        def time_others() -> None:
            for name, provider in others.items():
                times[name].append(watch.seconds(provider))

        benchmark.pedantic(
            lambda: times["ours"].append(watch.seconds(ours)), setup=time_others, rounds=rounds
        )
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios = {
            name: statistics.median(
                other / our for other, our in zip(times[name], times["ours"], strict=True)
            )
            for name in others
        }
        quartiles = statistics.quantiles(times["ours"], n=4)
        benchmark.extra_info.update(
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            milliseconds={name: 1e3 * value for name, value in medians.items()},
            spread=(quartiles[2] - quartiles[0]) / quartiles[1],
            speedup=ratios,
            gigabytes_per_second=moved / medians["ours"] / 1e9,
            first_call_milliseconds=1e3 * first,
        )
        against = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in ratios.items())
        _lines.append(
            f"{request.node.name}: {1e3 * medians['ours']:.2f} ms, "
            f"{moved / medians['ours'] / 1e9:.1f} GB/s; {against}"
        )

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The ratios, which pytest-benchmark's own table does not show."""
    if _lines:
        terminalreporter.section("ours against the others, interleaved")
        for line in _lines:
            terminalreporter.write_line(line)
