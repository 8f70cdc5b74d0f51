"""AdamW and the moving average of the updated parameters, in plain PyTorch: the specification."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from jepa_fast.ops import _rounding
from jepa_fast.ops.ema_update.reference import interpolated


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
    rounding_seed: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019) for every parameter, and then of the EMA::

        p = (1 - lr * weight_decay) * p
        m = beta1 * m + (1 - beta1) * g,   v = beta2 * v + (1 - beta2) * g^2
        p = p - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
        target = momentum * target + (1 - momentum) * p,   shadow = target

    in the order of operations of torch's fused AdamW, but for a division by sqrt(1 - beta2^step),
    which is a product here. Computed in float32 (float64 where p is
    float64), rounded once. `steps` count the updates, this one included. `targets` belong to the
    first parameters; there may be fewer of them. `shadows` is empty, or as long as `targets`.

    Where `found_inf` is not zero, AdamW does nothing, and only the moving average is taken.
    Otherwise gradients are divided by `grad_scale`, in place, where there is one.

    With a seed, parameters, targets and shadows of a narrow dtype are rounded stochastically, from
    the streams 3 i, 3 i + 1 and 3 i + 2.
    """
    skipped = found_inf is not None and bool(found_inf != 0)
    groups = itertools.zip_longest(params, grads, exp_avgs, exp_avg_sqs, targets, shadows)
    for i, (param, grad, exp_avg, exp_avg_sq, target, shadow) in enumerate(groups):
        group = [param, grad, exp_avg, exp_avg_sq]
        group += [tensor for tensor in (target, shadow) if tensor is not None]
        if not skipped:
            steps[i].add_(1)
            wide = torch.float64 if param.dtype == torch.float64 else torch.float32
            device = param.device
            step, rate, decay = (x.to(device, torch.float64) for x in (steps[i], lr, weight_decay))
            step_size = (rate / (1 - beta1**step)).to(wide)
            inverse_root = (1 / (1 - beta2**step).sqrt()).to(wide)

            if grad_scale is not None:
                grad.copy_(grad.to(wide) / grad_scale.to(device, wide).reshape(()))
            g = -grad.to(wide) if maximize else grad.to(wide)
            keep = torch.tensor(beta1, dtype=torch.float64, device=device)
            m = interpolated(exp_avg.to(wide), g, keep)
            v = exp_avg_sq.to(wide) * beta2 + (1 - beta2) * g * g
            kept = param.to(wide) * (1 - rate * decay).to(wide)
            new = kept - step_size * m / (v.sqrt() * inverse_root + eps)
            exp_avg.copy_(m)
            exp_avg_sq.copy_(v)
            _rounding.write(param, new, rounding_seed, 3 * i, group)
        if target is not None:
            wide = torch.float64 if target.dtype == torch.float64 else torch.float32
            keep = momentum.to(target.device, torch.float64)
            moved = interpolated(target.to(wide), param.to(wide), keep)
            _rounding.write(target, moved, rounding_seed, 3 * i + 1, group)
        if shadow is not None:
            _rounding.write(shadow, target, rounding_seed, 3 * i + 2, group)
