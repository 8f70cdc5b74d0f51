"""Schema, fake and backends of `ema_update_`.

One operator, not two: the moving average has no gradient. Momentum travels as a 0-dim tensor, so
that one schema serves a float and a device scalar.
"""

from __future__ import annotations

from torch import Tensor

from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.ema_update import reference


def _fake(
    targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor], momentum: Tensor
) -> None:
    return None


UPDATE = Operator(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor(b!)[] shadows, Tensor momentum,"
    " str backend) -> ()",
    fake=_fake,
    backends={"reference": Backend(f"{reference.__name__}:ema_update_")},
)
