"""The lists of `ema_update_` as memory: what kernels take, what may not overlap, what is moved."""

from __future__ import annotations

import os

from torch import Tensor

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
    check_momentum("ema_update_", momentum)
    written = {"targets": targets, "shadows": shadows}
    _memory.check_apart("ema_update_", written, {"sources": sources})


def check_momentum(op: str, momentum: Tensor) -> None:
    """Raises ValueError if the momentum is outside [0, 1].

    One on a GPU is read with `JEPA_FAST_DEBUG=1` only; otherwise the host would wait for it.
    """
    if momentum.device.type == "cpu" or os.environ.get("JEPA_FAST_DEBUG") == "1":
        value = float(momentum)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{op}: momentum must be in [0, 1], got {value}")


def cost(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor]) -> Cost:
    """The byte model: targets and sources are read once, targets and shadows written once."""
    to, by, copies = (sum(map(_memory.BYTES, each)) for each in (targets, sources, shadows))
    return Cost(read=to + by, written=to + copies)
