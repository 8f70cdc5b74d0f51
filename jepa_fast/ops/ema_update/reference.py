"""The exponential moving average of parameters, in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_fast.ops import _rounding


def ema_update_(
    targets: list[Tensor],
    sources: list[Tensor],
    shadows: list[Tensor],
    momentum: float | Tensor,
    rounding_seed: Tensor | None = None,
) -> None:
    """`target = momentum * target + (1 - momentum) * source` in place, tensor by tensor.

    Computed in float32 (float64 where the target is float64) as an interpolation from the nearer
    end, so that momentum 1 keeps the target and momentum 0 takes the source to the last bit; then
    rounded once, to the target's dtype. A shadow is the new target in its own dtype. `shadows` is
    empty, or as long as `targets`.

    With a seed, targets and shadows of a narrow dtype are rounded stochastically. Target i draws
    from stream 2 i, its shadow from 2 i + 1, each element by its place in memory; in its shape,
    row by row, where target, source and shadow are not dense and ordered alike.
    """
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        group = (target, source, *shadows[i : i + 1])
        wide = torch.float64 if target.dtype == torch.float64 else torch.float32
        keep = torch.as_tensor(momentum, dtype=torch.float64, device=target.device)
        old, toward = target.to(wide), source.to(wide)
        if rounding_seed is None:
            new = torch.lerp(old, toward, (1 - keep).to(wide))
        else:
            new = interpolated(old, toward, keep)
        _rounding.write(target, new, rounding_seed, 2 * i, group)
        if shadows:
            _rounding.write(shadows[i], target, rounding_seed, 2 * i + 1, group)


def interpolated(old: Tensor, toward: Tensor, keep: Tensor) -> Tensor:
    """As lerp, but with product and sum rounded one by one wherever it runs: kernels can do the
    same, to the last bit, on which it depends what is drawn."""
    step = toward - old
    near_target = old + (1 - keep).to(old.dtype) * step
    return torch.where(keep > 0.5, near_target, toward - keep.to(old.dtype) * step)
