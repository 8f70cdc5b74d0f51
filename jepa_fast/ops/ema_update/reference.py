"""The exponential moving average of parameters, in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def ema_update_(
    targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor], momentum: float | Tensor
) -> None:
    """`target = momentum * target + (1 - momentum) * source` in place, tensor by tensor.

    Computed in float32 (float64 where the target is float64) as an interpolation from the nearer
    end, so that momentum 1 keeps the target and momentum 0 takes the source to the last bit; then
    rounded once, to the target's dtype. A shadow is the new target in its own dtype. `shadows` is
    empty, or as long as `targets`.
    """
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        wide = torch.float64 if target.dtype == torch.float64 else torch.float32
        weight = 1 - torch.as_tensor(momentum, dtype=torch.float64, device=target.device)
        target.copy_(torch.lerp(target.to(wide), source.to(wide), weight.to(wide)))
        if shadows:
            shadows[i].copy_(target)
