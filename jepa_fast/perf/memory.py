"""How much memory a call takes at its peak, beyond what was there before it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def _no_collection() -> Iterator[None]:
    """Frees what waits in reference cycles now, and no more of it until the end.

    Else a collection in the middle of a call lowers its peak in some runs.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def peak_allocation(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that torch's allocator holds for `call` at its peak, beyond those held before it.

    Deterministic on either device: it counts what is asked for, not what the system hands out.
    Run `call` once before, so that what it keeps for good (caches, compiled code) does not count.

    Args:
        call: does the work; what it returns is alive until the end, and counts.
        device: `"cpu"` or `"cuda"`.
    """
    if device == "cuda":
        with _no_collection():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            kept = call()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak
    # Not torch.profiler's, which would import all of torch.compile first, in seconds.
    with _no_collection(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = call()
    del kept
    # The profiler takes a block freed here for one of an earlier profile that had its address: what
    # is freed is subtracted if it was allocated here, and no other.
    held = peak = 0
    sizes: dict[int, int] = {}
    for allocation in _allocations(profile):
        if allocation.alloc_size > 0:
            sizes[allocation.ptr] = allocation.alloc_size
            held += allocation.alloc_size
            peak = max(peak, held)
        else:
            held -= sizes.pop(allocation.ptr, 0)
    return peak


def _allocations(profile: torch.autograd.profiler.profile) -> list[Any]:
    """What was allocated (a positive `alloc_size`) and freed, in order."""
    found = []
    roots = profile.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    todo = list(reversed(roots))
    while todo:
        event = todo.pop()
        todo += reversed(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            found.append(event)
    return [event.extra_fields for event in sorted(found, key=lambda event: event.start_time_ns)]
