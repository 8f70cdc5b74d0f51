"""The public function `latent_loss`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops._autograd import (
    OperatorFunction,
    applied,
    differentiable_once,
    is_the_gradient,
    keep_slopes,
)
from jepa_fast.ops._checks import (
    check_choice,
    check_dim,
    check_flag,
    check_index,
    check_number,
    check_same_size,
    check_vectors,
)
from jepa_fast.ops.latent_loss import contract
from jepa_fast.ops.latent_loss.reference import KINDS


class _LatentLoss(OperatorFunction):
    @staticmethod
    def forward(prediction: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        return contract.FORWARD.call(prediction, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, slope = output
        ctx.dtype = inputs[0].dtype
        keep_slopes(ctx, slope)

    @staticmethod
    @differentiable_once("latent_loss")
    def backward(ctx: Any, saved: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        slope = saved[0].detach()
        if not is_the_gradient(slope, grad, ctx.dtype):
            # Plain PyTorch on every device.
            slope = contract.BACKWARD.call(grad, slope, ctx.dtype, "reference")
        return slope, *[None] * 9


def latent_loss(
    prediction: Tensor,
    teacher: Tensor,
    target_index: Tensor,
    kind: str = "smooth_l1",
    normalize_target: bool = True,
    target_mask: Tensor | None = None,
    beta: float = 1.0,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """How far the prediction is from the teacher's tokens at the target patches.

    The target of `prediction[m * B + b, k]` is `z = teacher[b, target_index[b, m, k]]`, after
    LayerNorm over D without affine if `normalize_target`. With `r = prediction - z`, a mean over
    all tokens of
        smooth_l1   mean_D of 0.5 r^2 / beta where |r| < beta, else |r| - 0.5 beta
        l1          mean_D |r|
        l2          mean_D r^2
        l2_norm     the norm of r, not squared
    The teacher takes no gradient, whether or not it requires one (stop-gradient).

    Args:
        prediction: [M * B, Kt, D], block-major, any floating dtype.
        teacher: [B, N, D] the teacher's tokens of whole images; its dtype may differ.
        target_index: [B, M, Kt] patch indices in [0, N), int32 or int64; [B, Kt] is one block.
        kind: `"smooth_l1"`, `"l1"`, `"l2"` or `"l2_norm"`.
        normalize_target: LayerNorm of the target.
        target_mask: bool, of the shape of `target_index`; False tokens do not count, whatever they
            hold.
        beta: where smooth_l1 turns linear; 0 makes it l1.
        eps: of the LayerNorm.
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`.

    Returns:
        0-dim float32 (float64 if `prediction` is). 0 where no token counts.

    Raises:
        TypeError: `prediction` or `teacher` is not a dense floating tensor, `target_index` not
            int32 or int64, `target_mask` or `normalize_target` not bool, `beta` or `eps` no number.
        ValueError: a shape does not fit; an unknown `kind`; negative `beta` or `eps`; an index is
            out of range (checked on the CPU always, on a GPU with `JEPA_FAST_DEBUG=1`).
        BackendError: the requested backend cannot serve the call.

    Source: I-JEPA, arXiv 2301.08243, section 3 (smooth_l1 in its public code); TI-JEPA, arXiv
    2503.06380 (l1); TC-JEPA, arXiv 2605.03245 (l2_norm).
    """
    op = "latent_loss"
    check_dim(op, "prediction", prediction, 3, "[M * B, Kt, D]")
    check_dim(op, "teacher", teacher, 3, "[B, N, D]")
    check_vectors(op, "prediction", prediction)
    check_vectors(op, "teacher", teacher)
    check_index(op, "target_index", target_index, (2, 3), "[B, M, Kt] or [B, Kt]")
    if target_mask is not None:
        check_dim(op, "target_mask", target_mask, (2, 3), "of the shape of target_index")
        if target_mask.dtype != torch.bool:
            raise TypeError(
                f"{op}: target_mask must be bool, got {target_mask.dtype}; use target_mask.bool() "
                f"(True: the token counts)"
            )
        if target_mask.shape != target_index.shape:
            raise ValueError(
                f"{op}: target_mask must have the shape of target_index, "
                f"{list(target_index.shape)}, got {list(target_mask.shape)}"
            )
    if target_index.ndim == 2:
        target_index = target_index[:, None]
        target_mask = None if target_mask is None else target_mask[:, None]
    check_same_size(op, "target_index", target_index, 0, "teacher", teacher, 0)
    check_same_size(op, "prediction", prediction, 1, "target_index", target_index, 2)
    check_same_size(op, "prediction", prediction, 2, "teacher", teacher, 2)
    batch, blocks, _ = target_index.shape
    if prediction.shape[0] != blocks * batch:
        raise ValueError(
            f"{op}: prediction must have M * B = {blocks} * {batch} rows for target_index "
            f"{list(target_index.shape)}, got {list(prediction.shape)}"
        )
    check_choice(op, "kind", kind, KINDS)
    check_flag(op, "normalize_target", normalize_target)
    for name, value in (("beta", beta), ("eps", eps)):
        check_number(op, name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{op}: {name} must be at least 0 and finite, got {value}")
    with_slope = prediction.requires_grad and torch.is_grad_enabled()
    loss, _ = applied(
        _LatentLoss,
        prediction,
        teacher.detach(),
        target_index,
        target_mask,
        kind,
        normalize_target,
        beta,
        eps,
        with_slope,
        backend,
    )
    return loss
