"""The exponential moving average of parameters, in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_fast.ops import _rounding
from jepa_fast.ops.ema_update import memory


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
            new = _interpolated(old, toward, keep)
        _write(target, new, 2 * i, group, rounding_seed)
        if shadows:
            _write(shadows[i], target, 2 * i + 1, group, rounding_seed)


def _interpolated(old: Tensor, toward: Tensor, keep: Tensor) -> Tensor:
    """As lerp, but two roundings of product and sum wherever it runs: then kernels can do it too,
    to the last bit, on which it depends what is drawn."""
    step = toward - old
    near_target = old + (1 - keep).to(old.dtype) * step
    return torch.where(keep > 0.5, near_target, toward - keep.to(old.dtype) * step)


def _write(
    out: Tensor, value: Tensor, number: int, group: tuple[Tensor, ...], seed: Tensor | None
) -> None:
    if seed is None or out.dtype not in _rounding.NARROW:
        out.copy_(value)
        return
    random = _rounding.random_bits(seed.to(out.device), number, out.numel())
    if memory.share_order(group):
        random = random.as_strided(out.shape, out.stride())
    else:
        random = random.view(out.shape)
    out.copy_(_rounding.round_stochastically(value.float(), random, out.dtype))
