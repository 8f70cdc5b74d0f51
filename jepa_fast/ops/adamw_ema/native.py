"""The C++ and the CUDA kernel: csrc/cpu/adamw_ema.cpp, csrc/cuda/adamw_ema.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops import _memory, _native
from jepa_fast.ops.adamw_ema import contract, memory

_KERNEL = _native.define(f"adamw_ema_({contract.ARGUMENTS}) -> ()")


def adamw_ema_(
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
    found_inf: Tensor | None,
    *others: Any,
) -> None:
    """As `reference.adamw_ema_`; runs on the device of the parameters."""
    own, teacher = (params, grads, exp_avgs, exp_avg_sqs), (targets, shadows)
    memory.check(*own, steps, *teacher, lr, weight_decay, momentum, grad_scale)
    if not params:
        return
    device = params[0].device
    lr, weight_decay, momentum = map(_readable, (lr, weight_decay, momentum))
    grad_scale, found_inf = (memory.of_scaler(x, device) for x in (grad_scale, found_inf))
    flat = _memory.Flat.of(*own, *teacher)
    p, g, m, v, t, s = flat.lists
    scalars = (lr, weight_decay, momentum, grad_scale, found_inf, *others)
    with torch.cuda.device_of(params[0]):
        if device.type == "cuda":  # there each thread block reads the count, so none can add to it
            torch._foreach_add_(steps, 1.0 if found_inf is None else (found_inf == 0).float())
        _KERNEL(p, g, m, v, steps, t, s, *scalars)
    written = (p, m, v, t, s) if grad_scale is None else (p, g, m, v, t, s)
    torch.autograd.graph.increment_version(
        [tensor for each in (*written, steps) for tensor in each]
    )
    flat.write_back(written)


def _readable(scalar: Tensor) -> Tensor:
    if scalar.is_cuda and scalar.dtype not in (torch.float32, torch.float64):
        return scalar.float()
    return scalar
