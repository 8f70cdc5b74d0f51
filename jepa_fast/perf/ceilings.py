"""What a machine can do at the most, as measured: what a kernel's speed is a share of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from jepa_fast.perf.race import Cost

_TRIES = range(3, 9)
"""Calls: at least, as the first ones touch new memory, and at most."""
_COPIED_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""More than the caches hold."""
_GEMM_SIZE = {"cpu": 768, "cuda": 8192}
_ENOUGH_SECONDS = 1.0
"""For more than the least; a CPU's products in half precision can take a second each."""


@dataclass(frozen=True)
class Ceilings:
    """The fastest that was seen.

    Args:
        bytes_per_second: read and written together, by a copy that no cache holds.
        flops_per_second: of a matrix product of torch's, by dtype (`"bfloat16"`).
    """

    bytes_per_second: float
    flops_per_second: Mapping[str, float] = field(default_factory=dict)

    def share(self, cost: Cost, dtype: str, seconds: float) -> tuple[float | None, str | None]:
        """How much of the ceiling `seconds` reach, 0 to 1, and which one it is.

        The ceiling is that which takes longer: `"memory"`, moving the bytes, or `"compute"`. (None,
        None) for work without a cost, or of a dtype that was not measured. More than 1 is possible
        where the caches of a CPU hold everything.
        """
        times = {}
        if cost.moved:
            times["memory"] = cost.moved / self.bytes_per_second
        if cost.flops and dtype in self.flops_per_second:
            times["compute"] = cost.flops / self.flops_per_second[dtype]
        if not times or not seconds or (cost.flops and not cost.moved and "compute" not in times):
            return None, None
        bound = max(times, key=times.__getitem__)
        return times[bound] / seconds, bound

    def to_json(self) -> dict[str, Any]:
        """As a results file has it: GB/s and TFLOP/s."""
        return {
            "gigabytes_per_second": round(self.bytes_per_second / 1e9, 1),
            "teraflops": {
                dtype: float(f"{value / 1e12:.4g}")
                for dtype, value in self.flops_per_second.items()
            },
        }


def measure_ceilings(device: str, dtypes: Iterable[str]) -> Ceilings:
    """Measures a copy, and a matrix product of each dtype: some seconds.

    Args:
        device: `"cpu"` or `"cuda"`.
        dtypes: names of floating-point dtypes of torch's; other dtypes are left out.
    """
    floating = [name for name in sorted(set(dtypes)) if _is_floating(name)]
    return Ceilings(
        _copied(device), {name: _multiplied(device, getattr(torch, name)) for name in floating}
    )


def _is_floating(name: str) -> bool:
    dtype = getattr(torch, name, None)
    # Products of float8 need scales, and are another function.
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1


def _copied(device: str) -> float:
    source = torch.ones(_COPIED_BYTES[device], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), device)


def _multiplied(device: str, dtype: torch.dtype) -> float:
    size = _GEMM_SIZE[device]
    # Random: a GPU's clock is higher on zeros, and higher than any real work sees.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _least_seconds(lambda: left @ right, device)


def _least_seconds(call: Callable[[], object], device: str) -> float:
    found: list[float] = []
    while len(found) < _TRIES.start or (len(found) < _TRIES.stop and sum(found) < _ENOUGH_SECONDS):
        found.append(_seconds(call, device))
    return min(found)


def _seconds(call: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3
