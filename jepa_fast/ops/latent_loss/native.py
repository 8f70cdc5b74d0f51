"""The C++ kernel: csrc/cpu/latent_loss.cpp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jepa_fast.ops import _native
from jepa_fast.ops._checks import check_index_range
from jepa_fast.ops._rows import without_gaps
from jepa_fast.ops.latent_loss.reference import KINDS, empty_slope

_KERNEL = _native.define(
    "latent_loss(Tensor prediction, Tensor teacher, Tensor target_index, Tensor? target_mask, "
    "int kind, bool normalize_target, float beta, float eps, Tensor(a!) loss, Tensor(b!)? slope) "
    "-> ()"
)


def latent_loss(
    prediction: Tensor,
    teacher: Tensor,
    target_index: Tensor,
    target_mask: Tensor | None,
    kind: str,
    normalize_target: bool,
    beta: float,
    eps: float,
    with_slope: bool,
) -> tuple[Tensor, Tensor]:
    """As `reference.latent_loss_and_slope`."""
    loss = prediction.new_empty((), dtype=torch.promote_types(prediction.dtype, torch.float32))
    slope = empty_slope(prediction, with_slope)
    try:
        _KERNEL(
            without_gaps(prediction),
            without_gaps(teacher),
            target_index.contiguous(),
            *_native.contiguous(target_mask),
            _kind(kind, beta),
            normalize_target,
            beta,
            eps,
            loss,
            slope if with_slope else None,
        )
    except (IndexError, RuntimeError):  # it finds an index that is out of range; this says which
        check_index_range("latent_loss", "target_index", target_index, teacher.shape[1])
        raise
    return loss, slope


def _kind(kind: str, beta: float) -> int:
    """The kernel's number of a kind: its place in `KINDS`."""
    # Below, 1 / beta is not finite in float32, and only subnormal residuals tell the two apart.
    if kind == "smooth_l1" and beta < math.ldexp(1.0, -127):
        kind = "l1"
    return KINDS.index(kind)
