"""The public function `assemble_predictor_tokens`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jepa_fast.ops._autograd import OperatorFunction, applied, differentiable_once, spread
from jepa_fast.ops._checks import check_dim, check_index, check_same_size, check_vectors
from jepa_fast.ops.assemble_predictor_tokens import contract


class _AssemblePredictorTokens(OperatorFunction):
    @staticmethod
    def forward(
        context: Tensor,
        mask_token: Tensor,
        pos_embed: Tensor,
        context_index: Tensor,
        target_index: Tensor,
        backend: str,
    ) -> Tensor:
        return contract.FORWARD.call(
            context, mask_token, pos_embed, context_index, target_index, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *floating, context_index, target_index, ctx.backend = inputs
        ctx.dtypes = [tensor.dtype for tensor in floating]
        ctx.patches = floating[2].shape[0]
        ctx.save_for_backward(context_index, target_index)

    @staticmethod
    @differentiable_once("assemble_predictor_tokens")
    def backward(ctx: Any, saved: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        grads = contract.BACKWARD.call(grad, *saved, ctx.patches, needs, ctx.backend)
        dtypes = [dtype for dtype, need in zip(ctx.dtypes, needs, strict=True) if need]
        cast = [g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True)]
        return *spread(cast, needs), None, None, None


def assemble_predictor_tokens(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    context_index: Tensor,
    target_index: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """The predictor's input: one sequence a target block, context tokens first.

    Row `m * B + b` (block-major) holds `context[b] + pos_embed[context_index[b]]` and then
    `mask_token + pos_embed[target_index[b, m]]`.

    Args:
        context: [B, Kc, d] context tokens in the predictor's width.
        mask_token: [d] or [1, 1, d] the learned vector that stands for a hidden patch.
        pos_embed: [N, d] or [1, N, d] position embedding, fixed or learned.
        context_index: [B, Kc] patch indices in [0, N), int32 or int64.
        target_index: [B, M, Kt] patch indices in [0, N), int32 or int64; [B, Kt] is one block.
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`.

    Returns:
        [M * B, Kc + Kt, d] in the dtype that the three floating inputs promote to, so that a
        float32 position embedding keeps the residual stream in float32 under autocast.

    Raises:
        TypeError: an index is not int32 or int64, or another input no dense floating tensor.
        ValueError: a shape does not fit; an index is out of range (checked on the CPU always, on a
            GPU with `JEPA_FAST_DEBUG=1`).
        BackendError: the requested backend cannot serve the call.

    Source: the predictor of I-JEPA, arXiv 2301.08243, section 3.
    """
    op = "assemble_predictor_tokens"
    check_dim(op, "context", context, 3, "[B, Kc, d]")
    for name, tensor in (
        ("context", context),
        ("mask_token", mask_token),
        ("pos_embed", pos_embed),
    ):
        check_vectors(op, name, tensor)
    mask_token = _without_ones(op, "mask_token", mask_token, 1, "[d] or [1, 1, d]")
    pos_embed = _without_ones(op, "pos_embed", pos_embed, 2, "[N, d] or [1, N, d]")
    check_index(op, "context_index", context_index, 2, "[B, Kc]")
    check_index(op, "target_index", target_index, (2, 3), "[B, M, Kt] or [B, Kt]")
    if target_index.ndim == 2:
        target_index = target_index[:, None]
    check_same_size(op, "mask_token", mask_token, 0, "context", context, 2)
    check_same_size(op, "pos_embed", pos_embed, 1, "context", context, 2)
    check_same_size(op, "context_index", context_index, 0, "context", context, 0)
    check_same_size(op, "context_index", context_index, 1, "context", context, 1)
    check_same_size(op, "target_index", target_index, 0, "context", context, 0)
    return applied(
        _AssemblePredictorTokens,
        context,
        mask_token,
        pos_embed,
        context_index,
        target_index,
        backend,
    )


def _without_ones(op: str, argument: str, tensor: Tensor, dims: int, shape: str) -> Tensor:
    """A tensor of `dims` dimensions from one that may be a module's parameter, [1, .., d].

    Raises:
        ValueError: another number of dimensions, or a leading one that is not 1.
    """
    check_dim(op, argument, tensor, (dims, 3), shape)
    if any(size != 1 for size in tensor.shape[:-dims]):
        raise ValueError(f"{op}: {argument} must be {shape}, got shape {list(tensor.shape)}")
    return tensor.reshape(tensor.shape[-dims:])
