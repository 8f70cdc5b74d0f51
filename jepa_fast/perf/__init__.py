"""Measuring: benchmarks, an audit that needs no GPU, a gate for regressions, profilers' ranges."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jepa_fast.perf.audit_report import Report as Report
    from jepa_fast.perf.errors import NotHere as NotHere
    from jepa_fast.perf.errors import PerfError as PerfError
    from jepa_fast.perf.kernel_audit import Launch as Launch
    from jepa_fast.perf.kernel_audit import audit as audit
    from jepa_fast.perf.race import Case as Case
    from jepa_fast.perf.race import Cost as Cost
    from jepa_fast.perf.race import Race as Race
    from jepa_fast.perf.race import benchmark as benchmark
    from jepa_fast.ranges import disable_ranges as disable_ranges
    from jepa_fast.ranges import enable_ranges as enable_ranges
    from jepa_fast.ranges import phase as phase
    from jepa_fast.ranges import use_ranges as use_ranges

_RANGES = ("disable_ranges", "enable_ranges", "phase", "use_ranges")
"""Of `jepa_fast.ranges`, loaded at first use: the other files here do without torch."""
_PUBLIC = {
    "Case": "race",
    "Cost": "race",
    "Launch": "kernel_audit",
    "NotHere": "errors",
    "PerfError": "errors",
    "Race": "race",
    "Report": "audit_report",
    "audit": "kernel_audit",
    "benchmark": "race",
}
"""For one's own benchmarks and audits, by the files here, loaded at first use."""


def __getattr__(name: str) -> Any:
    if name in _RANGES:
        from jepa_fast import ranges

        return getattr(ranges, name)
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
