"""Schema, fake and backends of `adamw_ema_`.

One operator, not two: an optimizer's step has no gradient. What may change from step to step
travels as 0-dim tensors, so that one schema serves numbers and device scalars.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.adamw_ema import memory, reference


def _fake(*arguments: Any) -> None:
    return None


def _reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    targets: list[Tensor],
    shadows: list[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    momentum: Tensor,
    grad_scale: Tensor | None,
    *others: Any,
) -> None:
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    memory.check(*lists, steps, targets, shadows, lr, weight_decay, momentum, grad_scale)
    reference.adamw_ema_(
        *lists, steps, targets, shadows, lr, weight_decay, momentum, grad_scale, *others
    )


ARGUMENTS = (
    "Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
    " Tensor(e!)[] steps, Tensor(f!)[] targets, Tensor(g!)[] shadows, Tensor lr,"
    " Tensor weight_decay, Tensor momentum, Tensor? grad_scale, Tensor? found_inf,"
    " Tensor? rounding_seed, float beta1, float beta2, float eps, bool maximize"
)
_FOLDER = "jepa_fast.ops.adamw_ema"
STEP = Operator(
    f"adamw_ema_({ARGUMENTS}, str backend) -> ()",
    fake=_fake,
    backends={
        "cuda": Backend(f"{_FOLDER}.native:adamw_ema_", memory.unsupported),
        "triton": Backend(f"{_FOLDER}.triton:adamw_ema_", memory.unsupported),
        "cpu": Backend(f"{_FOLDER}.native:adamw_ema_", memory.unsupported),
        "reference": Backend(f"{__name__}:_reference"),
    },
)
