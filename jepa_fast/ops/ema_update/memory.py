"""The lists of `ema_update_` as memory: what kernels take, what may not overlap, what is moved."""

from __future__ import annotations

import math

from torch import Tensor

from jepa_fast._arguments import switched_on
from jepa_fast.ops import _memory
from jepa_fast.perf.race import Cost


def unsupported(
    targets: list[Tensor],
    sources: list[Tensor],
    shadows: list[Tensor],
    momentum: Tensor,
    rounding_seed: Tensor | None = None,
) -> list[str]:
    """Why a kernel cannot serve a call, from metadata alone: dtypes and devices."""
    return _memory.unsupported([*targets, *sources, *shadows])


def check(
    targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor], momentum: Tensor
) -> None:
    """Checks what only real tensors show: the momentum's value, and that nothing overlaps.

    Raises:
        ValueError: momentum outside [0, 1], or a tensor to be written that overlaps another one
            or itself.
    """
    check_number("ema_update_", "momentum", momentum, 1.0)
    written = {"targets": targets, "shadows": shadows}
    _memory.check_apart("ema_update_", written, {"sources": sources})


def check_number(op: str, name: str, number: Tensor, most: float) -> None:
    """Raises ValueError if a number is outside [0, most], or is none.

    One on a GPU is read with `JEPA_FAST_DEBUG=1` only; otherwise the host would wait for it.
    """
    if number.device.type == "cpu" or switched_on("JEPA_FAST_DEBUG"):
        value = float(number)
        if not 0.0 <= value <= most:
            interval = "0 or more" if most == math.inf else f"in [0, {most:g}]"
            raise ValueError(f"{op}: {name} must be {interval}, got {value}")


def cost(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor]) -> Cost:
    """The byte model: targets and sources are read once, targets and shadows written once."""
    to, by, copies = (sum(map(_memory.BYTES, each)) for each in (targets, sources, shadows))
    return Cost(read=to + by, written=to + copies)
