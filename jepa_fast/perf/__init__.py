"""Measuring: benchmarks, an audit that needs no GPU, a gate for regressions, profilers' ranges."""

from __future__ import annotations

import importlib
from typing import Any

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
