"""Schema, fake and backends of `ema_update_`.

One operator, not two: the moving average has no gradient. Momentum and seed travel as 0-dim
tensors, so that one schema serves numbers and device scalars.
"""

from __future__ import annotations

from torch import Tensor

from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.ema_update import memory, reference


def _fake(
    targets: list[Tensor],
    sources: list[Tensor],
    shadows: list[Tensor],
    momentum: Tensor,
    rounding_seed: Tensor | None,
) -> None:
    return None


def _reference(
    targets: list[Tensor],
    sources: list[Tensor],
    shadows: list[Tensor],
    momentum: Tensor,
    rounding_seed: Tensor | None,
) -> None:
    memory.check(targets, sources, shadows, momentum)
    reference.ema_update_(targets, sources, shadows, momentum, rounding_seed)


_FOLDER = "jepa_fast.ops.ema_update"
UPDATE = Operator(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor(b!)[] shadows, Tensor momentum,"
    " Tensor? rounding_seed, str backend) -> ()",
    fake=_fake,
    backends={
        "cuda": Backend(f"{_FOLDER}.native:ema_update_", memory.unsupported),
        "triton": Backend(f"{_FOLDER}.triton:ema_update_", memory.unsupported),
        "cpu": Backend(f"{_FOLDER}.native:ema_update_", memory.unsupported),
        "reference": Backend(f"{__name__}:_reference"),
    },
)
