"""The C++ kernels: csrc/cpu/text_cross_attention.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops import _native
from jepa_fast.ops._rows import without_gaps

# The kernels know these by their place.
_POOLS = ("max", "mean", "none")

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
    pool = options[5]
    rows, tokens, width = q.shape
    shape = (rows, k.shape[1], tokens, width) if pool == "none" else (rows, tokens, width)
    features = residual.new_empty(shape)
    sparsity = q.new_empty((), dtype=torch.float32)
    winner = q.new_empty(q.shape if pool == "max" else 0, dtype=torch.uint8)
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
    masks = (
        None if mask is None else mask.contiguous()
        for mask in (word_mask, caption_mask, token_mask)
    )
    if scale is None:
        scale = (q.shape[2] // num_heads) ** -0.5
    return *masks, num_heads, scale, _POOLS.index(pool), similarity == "softplus", tau
