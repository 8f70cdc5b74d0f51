"""The affine coupling of RealNVP, in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def affine_coupling(
    x: Tensor, raw_scale: Tensor, shift: Tensor, mask: Tensor, scale_bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """(y [T, D], logdet [T]) from x, raw_scale and shift [T, D] and mask [D]."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    log_scale = torch.where(mask, 0.0, scale_bound * torch.tanh(raw_scale.to(dtype)))
    shift = torch.where(mask, 0.0, shift.to(dtype))
    if inverse:
        y = (x.to(dtype) - shift) * torch.exp(-log_scale)
        return y.to(x.dtype), -log_scale.sum(-1)
    y = x.to(dtype) * torch.exp(log_scale) + shift
    return y.to(x.dtype), log_scale.sum(-1)
