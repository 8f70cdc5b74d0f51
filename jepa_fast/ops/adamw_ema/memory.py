"""The lists of `adamw_ema_` as memory: what kernels take, what may not overlap, what is moved."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops import _memory
from jepa_fast.ops.ema_update.memory import check_number
from jepa_fast.perf.race import Cost


def unsupported(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    targets: list[Tensor],
    shadows: list[Tensor],
    *others: Any,
) -> list[str]:
    """Why a kernel cannot serve a call, from metadata alone: dtypes and devices."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, targets, shadows)
    reasons = _memory.unsupported([tensor for each in lists for tensor in each])
    dtypes = list(map(_memory.DTYPE, params))
    if any(list(map(_memory.DTYPE, each)) != dtypes for each in (grads, exp_avgs, exp_avg_sqs)):
        reasons.append("takes gradients and moments of their parameters' dtypes, got others")
    if params and set(map(_memory.DEVICE, steps)) != {params[0].device}:
        reasons.append("takes steps on the parameters' device, got others")
    if set(map(_memory.DTYPE, steps)) - {torch.float32}:
        reasons.append("takes steps of float32, got others")
    return reasons


def check(
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
) -> None:
    """Checks what only real tensors show: values of numbers, and that nothing overlaps.

    Raises:
        ValueError: a negative rate or weight decay, momentum outside [0, 1], or a tensor to be
            written that overlaps another one or itself.
    """
    check_number("adamw_ema_", "lr", lr, math.inf)
    check_number("adamw_ema_", "weight_decay", weight_decay, math.inf)
    if targets:
        check_number("adamw_ema_", "momentum", momentum, 1.0)
    written = {
        "params": params,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "steps": steps,
        "targets": targets,
        "shadows": shadows,
    }
    read = {"grads": grads}
    if grad_scale is not None:
        written, read = {**written, **read}, {}
    _memory.check_apart("adamw_ema_", written, read)


def of_scaler(number: Tensor | None, device: torch.device) -> Tensor | None:
    """What a GradScaler gives, a 0-dim float32 tensor: as torch's, it may be of another device."""
    return None if number is None else number.to(device, torch.float32).reshape(())


def cost(
    params: list[Tensor], targets: list[Tensor], shadows: list[Tensor], unscaled: bool = False
) -> Cost:
    """The byte model: parameters, moments and targets are read and written once, gradients read
    (and written where they are `unscaled`), shadows written.
    """
    own, to, copies = (sum(map(_memory.BYTES, each)) for each in (params, targets, shadows))
    return Cost(read=4 * own + to, written=(4 if unscaled else 3) * own + to + copies)
