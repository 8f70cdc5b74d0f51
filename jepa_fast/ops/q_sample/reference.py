"""Noising and denoising loss in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_fast.ops._normal import standard_normal


def q_sample(target: Tensor, signal: Tensor, noise: Tensor, seed: Tensor, first_row: int) -> Tensor:
    """`signal * target + noise * e`, with target [T, D] and levels [T] or [n, T].

    e are the standard normal numbers of `ops/_normal.py`, rows counted from `first_row` through all
    draws. Computed in float32 at least; the result has the dtype of `target`.
    """
    dtype = torch.promote_types(target.dtype, torch.float32)
    shape = (*signal.shape, target.shape[1])
    e = standard_normal(seed, first_row, signal.numel(), shape[-1]).view(shape)
    x = signal.to(dtype)[..., None] * target.to(dtype) + noise.to(dtype)[..., None] * e.to(dtype)
    return x.to(target.dtype)


def q_sample_backward(grad: Tensor, signal: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of target, in its `dtype`, summed over draws."""
    wide = torch.promote_types(dtype, torch.float32)
    to_target = signal.to(wide)[..., None] * grad.to(wide)
    return (to_target.sum(0) if to_target.ndim == 3 else to_target).to(dtype)


def denoising_loss_and_slope(
    prediction: Tensor, target: Tensor | None, seed: Tensor, first_row: int, with_slope: bool
) -> tuple[Tensor, Tensor]:
    """The mean of `(prediction - e)^2`, or of `(prediction - (target - e))^2`, and its gradient.

    With prediction [T, D] or [n, T, D], target [T, D] and e as in `q_sample`. The gradient is of
    the prediction's dtype, but float32 for float16, where those of many tokens would be 0. Without
    `with_slope` it is empty.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    rows = prediction.shape[:-1].numel()
    e = standard_normal(seed, first_row, rows, prediction.shape[-1]).view_as(prediction).to(dtype)
    wanted = e if target is None else target.to(dtype) - e
    residual = prediction.to(dtype) - wanted
    count = max(residual.numel(), 1)
    loss = residual.square().sum() / count
    if not with_slope:
        return loss, empty_slope(prediction, with_slope)
    return loss, (residual * (2 / count)).to(slope_dtype(prediction.dtype))


def slope_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the slope for predictions of `dtype`."""
    return torch.float32 if dtype == torch.float16 else dtype


def empty_slope(prediction: Tensor, with_slope: bool) -> Tensor:
    """Memory for the slope, contiguous; none without `with_slope`."""
    shape = prediction.shape if with_slope else (0,)
    return prediction.new_empty(shape, dtype=slope_dtype(prediction.dtype))


def denoising_loss_backward(grad: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of prediction, in its `dtype`."""
    return (slope * grad).to(dtype)
