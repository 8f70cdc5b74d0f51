"""How much memory a call takes at its peak, beyond what was there before it."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_allocation(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that torch's allocator holds for `call` at its peak, beyond those held before it.

    Deterministic on either device: it counts what is asked for, not what the system hands out.
    Run `call` once before, so that what it keeps for good (caches, compiled code) does not count.

    Args:
        call: does the work; what it returns is alive until the end, and counts.
        device: `"cpu"` or `"cuda"`.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = call()
    del kept
    events = [
        event
        for event in profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
