"""Operator calls whose memory traffic is counted, address by address, in Triton's interpreter.

A Triton file has a function `traffic_cases() -> list[TrafficCase]` beside its `compile_cases()`;
`jepa-fast audit` runs every case there, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jepa_fast.ops._compile import triton_modules
from jepa_fast.perf.race import Cost


@dataclass(frozen=True)
class TrafficCase:
    """One call of an operator's Triton backend.

    Args:
        name: the operator, a dash, and what is particular: `"ema_update_-float32"`.
        call: calls the backend's function on CPU tensors made before: small ones, yet of several
            thread blocks, and of sizes that no block divides. It is called twice, and the second
            call counts: what is made once and kept is no traffic of a step.
        minimum: bytes that the operator has to read and write, by its byte model.
    """

    name: str
    call: Callable[[], object]
    minimum: Cost

    @property
    def operator(self) -> str:
        return self.name.partition("-")[0]


def all_traffic_cases() -> list[TrafficCase]:
    """The cases of every operator that has a Triton kernel."""
    return [case for module in triton_modules() for case in module.traffic_cases()]
