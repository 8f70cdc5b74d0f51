"""The C++ kernels: csrc/cpu/text_cross_attention.cpp."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jepa_fast.ops import _native
from jepa_fast.ops._rows import without_gaps
from jepa_fast.ops.text_cross_attention.reference import POOLS, empty_outputs, score_scale

_OPTIONS = (
    "Tensor? word_mask, Tensor? caption_mask, Tensor? token_mask, int num_heads, float scale, "
    "int pool, bool softplus, float tau"
)
_FORWARD = _native.define(
    f"text_cross_attention(Tensor q, Tensor k, Tensor v, Tensor residual, {_OPTIONS}, "
    "Tensor(a!) features, Tensor(b!) sparsity, Tensor(c!) winner) -> ()"
)
_BACKWARD = _native.define(
    "text_cross_attention_backward(Tensor grad_features, Tensor grad_sparsity, Tensor winner, "
    f"Tensor q, Tensor k, Tensor v, {_OPTIONS}, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()"
)


def text_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, residual: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.text_cross_attention`."""
    features, sparsity, winner = empty_outputs(q, k, residual, pool=options[5])
    inputs = (without_gaps(x) for x in (q, k, v, residual))
    _FORWARD(*inputs, *_for_kernel(q, *options), features, sparsity, winner)
    return features, sparsity, winner


def text_cross_attention_backward(
    grad_features: Tensor,
    grad_sparsity: Tensor,
    winner: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.text_cross_attention_backward`."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    _BACKWARD(
        without_gaps(grad_features),
        grad_sparsity,
        winner.contiguous(),
        *(without_gaps(x) for x in (q, k, v)),
        *_for_kernel(q, *options),
        dq,
        dk,
        dv,
    )
    return dq, dk, dv


def _for_kernel(
    q: Tensor,
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    token_mask: Tensor | None,
    num_heads: int,
    scale: float | None,
    pool: str,
    similarity: str,
    tau: float,
) -> tuple[Any, ...]:
    masks = _native.contiguous(word_mask, caption_mask, token_mask)
    scale = score_scale(scale, q, num_heads)
    return *masks, num_heads, scale, POOLS.index(pool), similarity == "softplus", tau
