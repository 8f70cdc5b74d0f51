"""The loss in the teacher's latent space, in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_fast.ops.gather_patches.reference import gather_patches

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
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    batch, blocks, _ = target_index.shape
    target = gather_patches(teacher.detach(), target_index).to(dtype)  # [B, M, Kt, D]
    if normalize_target:
        target = F.layer_norm(target, target.shape[-1:], eps=eps)
    residual = prediction.unflatten(0, (blocks, batch)).transpose(0, 1).to(dtype) - target
    if target_mask is None:
        count: int | Tensor = max(target_index.numel(), 1)
    else:
        # Before the loss, so that whatever stands in padding cannot reach loss or gradient.
        residual = torch.where(target_mask[..., None], residual, 0.0)
        count = target_mask.sum().clamp(min=1)
    return _token_loss(residual, kind, beta).sum() / count


def _token_loss(residual: Tensor, kind: str, beta: float) -> Tensor:
    """The loss of every token, [...], from residuals [..., D]."""
    if kind == "smooth_l1":
        zero = residual.new_zeros(()).expand_as(residual)
        return F.smooth_l1_loss(residual, zero, reduction="none", beta=beta).mean(-1)
    if kind == "l1":
        return residual.abs().mean(-1)
    if kind == "l2":
        return residual.square().mean(-1)
    return torch.linalg.vector_norm(residual, dim=-1)
