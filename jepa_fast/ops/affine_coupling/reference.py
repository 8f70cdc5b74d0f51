"""The affine coupling of RealNVP, in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa_fast.ops._autograd import recomputed_gradients


def affine_coupling(
    x: Tensor, raw_scale: Tensor, shift: Tensor, mask: Tensor, scale_bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """(y [T, D], logdet [T]) from x, raw_scale and shift [T, D] and mask [D]."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # First of all, so that not even NaN inside the mask has a gradient.
    raw_scale, shift = (torch.where(mask, 0.0, t.to(dtype)) for t in (raw_scale, shift))
    log_scale = scale_bound * torch.tanh(raw_scale)
    if inverse:
        y = (x.to(dtype) - shift) * torch.exp(-log_scale)
        return y.to(x.dtype), -log_scale.sum(-1)
    y = x.to(dtype) * torch.exp(log_scale) + shift
    return y.to(x.dtype), log_scale.sum(-1)


def affine_coupling_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    scale_bound: float,
    inverse: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of x, raw_scale and shift, of those marked in `needs`."""

    def function(x: Tensor, raw_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return affine_coupling(x, raw_scale, shift, mask, scale_bound, inverse)

    return recomputed_gradients(function, (x, raw_scale, shift), needs, (grad_y, grad_logdet))


def empty_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """y and logdet, not filled."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=dtype)


def empty_gradients(inputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Tensors like the inputs marked in `needs`, contiguous, not filled."""
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]
