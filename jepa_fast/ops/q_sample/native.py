"""The C++ kernels: csrc/cpu/q_sample.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_fast.ops import _native
from jepa_fast.ops._rows import without_gaps
from jepa_fast.ops.q_sample.reference import empty_slope

_Q_SAMPLE = _native.define(
    "q_sample(Tensor target, Tensor signal, Tensor noise, Tensor seed, int first_row,"
    " Tensor(a!) x) -> ()"
)
_DENOISING_LOSS = _native.define(
    "denoising_loss(Tensor prediction, Tensor? target, Tensor seed, int first_row,"
    " Tensor(a!) loss, Tensor(b!)? slope) -> ()"
)


def q_sample(target: Tensor, signal: Tensor, noise: Tensor, seed: Tensor, first_row: int) -> Tensor:
    """As `reference.q_sample`."""
    dtype = torch.promote_types(target.dtype, torch.float32)
    signal, noise = signal.to(dtype).contiguous(), noise.to(dtype).contiguous()
    x = target.new_empty((*signal.shape, target.shape[1]))
    _Q_SAMPLE(without_gaps(target), signal, noise, seed, first_row, x)
    return x


def denoising_loss(
    prediction: Tensor, target: Tensor | None, seed: Tensor, first_row: int, with_slope: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.denoising_loss_and_slope`."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    loss = prediction.new_empty((), dtype=dtype)
    slope = empty_slope(prediction, with_slope)
    _DENOISING_LOSS(
        prediction.contiguous(),
        None if target is None else without_gaps(target.to(dtype)),
        seed,
        first_row,
        loss,
        slope if with_slope else None,
    )
    return loss, slope
