"""Schemas, fakes and backends of `text_cross_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops._checks import only_kernel_dtypes
from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.text_cross_attention import reference

_FOLDER = "jepa_fast.ops.text_cross_attention"


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor,
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    token_mask: Tensor | None,
    num_heads: int,
    scale: float | None,
    pool: str,
    similarity: str,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.empty_outputs(q, k, residual, pool)


def _fake_backward(
    grad_features: Tensor,
    grad_sparsity: Tensor,
    winner: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def _unsupported(q: Tensor, k: Tensor, v: Tensor, residual: Tensor, *options: Any) -> list[str]:
    reasons = [] if q.dtype in _KERNEL_DTYPES else [f"computes in float32, got {q.dtype} queries"]
    return reasons + only_kernel_dtypes(residual)


def _unsupported_backward(
    grad_features: Tensor, grad_sparsity: Tensor, winner: Tensor, q: Tensor, *rest: Any
) -> list[str]:
    return _unsupported(q, q, q, grad_features)


# The default scale is worked out inside: outside, torch.compile would guard it and so the width.
_OPTIONS = (
    "Tensor? word_mask, Tensor? caption_mask, Tensor? token_mask, int num_heads, float? scale, "
    "str pool, str similarity, float tau, str backend"
)

FORWARD = Operator(
    f"text_cross_attention(Tensor q, Tensor k, Tensor v, Tensor residual, {_OPTIONS}) "
    "-> (Tensor features, Tensor sparsity, Tensor winner)",
    fake=_fake,
    backends={
        "cpu": Backend(f"{_FOLDER}.native:text_cross_attention", _unsupported),
        "reference": Backend(f"{_FOLDER}.reference:text_cross_attention"),
    },
)
BACKWARD = Operator(
    "text_cross_attention_backward(Tensor grad_features, Tensor grad_sparsity, Tensor winner, "
    f"Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    backends={
        "cpu": Backend(f"{_FOLDER}.native:text_cross_attention_backward", _unsupported_backward),
        "reference": Backend(f"{_FOLDER}.reference:text_cross_attention_backward"),
    },
)
