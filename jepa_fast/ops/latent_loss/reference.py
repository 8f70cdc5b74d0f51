"""The loss in the teacher's latent space, in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_fast.ops._rows import flat_rows, take_rows

KINDS = ("smooth_l1", "l1", "l2", "l2_norm")


def latent_loss(
    prediction: Tensor,
    teacher: Tensor,
    target_index: Tensor,
    target_mask: Tensor | None,
    kind: str,
    normalize_target: bool,
    beta: float,
    eps: float,
) -> Tensor:
    """The scalar loss of prediction [M * B, Kt, D] against teacher [B, N, D].

    With target_index [B, M, Kt] and target_mask of the same shape. Computed in float32 at least.
    """
    residual = _residual(prediction, teacher, target_index, target_mask, normalize_target, eps)
    return _loss(residual, kind, beta) / _count(target_index, target_mask)


def latent_loss_and_slope(
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
    """The loss, and its gradient with respect to prediction; the teacher has none.

    The gradient is of the prediction's dtype, but float32 for float16, where those of many tokens
    would be 0. Without `with_slope` it is empty.
    """
    residual = _residual(prediction, teacher, target_index, target_mask, normalize_target, eps)
    count = _count(target_index, target_mask)
    loss = _loss(residual, kind, beta) / count
    if not with_slope:
        return loss, empty_slope(prediction, with_slope)
    return loss, _slope(residual, kind, beta, count).to(slope_dtype(prediction.dtype))


def slope_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the slope for predictions of `dtype`."""
    return torch.float32 if dtype == torch.float16 else dtype


def empty_slope(prediction: Tensor, with_slope: bool) -> Tensor:
    """Memory for the slope, none without `with_slope`."""
    shape = prediction.shape if with_slope else (0,)
    return prediction.new_empty(shape, dtype=slope_dtype(prediction.dtype))


def latent_loss_backward(grad: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of prediction, in its `dtype`."""
    return (slope * grad).to(dtype)


def _loss(residual: Tensor, kind: str, beta: float) -> Tensor:
    """The sum over tokens."""
    if kind == "smooth_l1":
        zero = residual.new_zeros(()).expand_as(residual)
        token = F.smooth_l1_loss(residual, zero, reduction="none", beta=beta).mean(-1)
    elif kind == "l1":
        token = residual.abs().mean(-1)
    elif kind == "l2":
        token = residual.square().mean(-1)
    else:
        token = torch.linalg.vector_norm(residual, dim=-1)
    return token.sum()


def _slope(residual: Tensor, kind: str, beta: float, count: int | Tensor) -> Tensor:
    """The gradient with respect to the residual, in its place."""
    # A fresh tensor of this size costs more than the arithmetic in it.
    slope, width = residual, residual.shape[-1]
    if kind == "l1" or (kind == "smooth_l1" and beta == 0):
        slope.sign_()
    elif kind == "smooth_l1":
        slope.div_(beta).clamp_(-1, 1)
    elif kind == "l2":
        slope.mul_(2)
    else:
        norm = torch.linalg.vector_norm(slope, dim=-1, keepdim=True)
        slope.div_(norm.masked_fill_(norm == 0, 1))  # the subgradient 0 where the residual is 0
        width = 1
    return slope.div_(max(width, 1)).div_(count)


def _residual(
    prediction: Tensor,
    teacher: Tensor,
    target_index: Tensor,
    target_mask: Tensor | None,
    normalize_target: bool,
    eps: float,
) -> Tensor:
    """Prediction minus target, [M * B, Kt, D]; 0 at the tokens that do not count."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    rows = flat_rows(target_index, teacher.shape[1]).transpose(0, 1).flatten(0, 1)  # [M * B, Kt]
    target = take_rows(teacher.detach().flatten(0, 1), rows).to(dtype)
    if normalize_target:
        target = F.layer_norm(target, target.shape[-1:], eps=eps)
    residual = prediction.to(dtype) - target
    if target_mask is None:
        return residual
    # Before the loss, so that whatever stands in padding cannot reach loss or gradient.
    return torch.where(target_mask.transpose(0, 1).flatten(0, 1)[..., None], residual, 0.0)


def _count(target_index: Tensor, target_mask: Tensor | None) -> int | Tensor:
    """How many tokens count; 1 if none, where the sum over them is 0."""
    return max(target_index.numel(), 1) if target_mask is None else target_mask.sum().clamp(min=1)
