"""Schemas, fakes and backends of `text_cross_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops._registry import Backend, Operator

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
    rows, tokens, width = q.shape
    shape = (rows, k.shape[1], tokens, width) if pool == "none" else (rows, tokens, width)
    dtype = torch.promote_types(q.dtype, torch.float32)
    winner = q.new_empty(q.shape if pool == "max" else 0, dtype=torch.uint8)
    return residual.new_empty(shape), q.new_empty((), dtype=dtype), winner


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


_MOST_WORDS = 128  # of a caption, whose words the kernels take at once
_WIDEST_HEAD = 512


def _unsupported(q: Tensor, k: Tensor, features: Tensor, num_heads: int) -> list[str]:
    reasons = []
    narrow = (torch.bfloat16, torch.float16)
    # The kernels' products are the tensor cores'. In float32 they would be slower than PyTorch's:
    # the interpreter takes it for the tests.
    served = narrow if q.device.type == "cuda" else (*narrow, torch.float32)
    if q.dtype not in served:
        reasons.append(f"takes q, k and v in bfloat16 and float16, got {q.dtype}")
    if features.dtype not in (*narrow, torch.float32):
        reasons.append(f"takes features in float32, bfloat16 and float16, got {features.dtype}")
    if k.shape[2] > _MOST_WORDS:
        reasons.append(f"takes captions of at most {_MOST_WORDS} words, got {k.shape[2]}")
    if q.shape[2] // num_heads > _WIDEST_HEAD:
        reasons.append(
            f"takes heads of width {_WIDEST_HEAD} or less, got {q.shape[2] // num_heads}"
        )
    return reasons


def _unsupported_forward(
    q: Tensor, k: Tensor, v: Tensor, residual: Tensor, *options: Any
) -> list[str]:
    return _unsupported(q, k, residual, options[3])


def _unsupported_backward(
    grad_features: Tensor,
    grad_sparsity: Tensor,
    winner: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *options: Any,
) -> list[str]:
    return _unsupported(q, k, grad_features, options[3])


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
        "triton": Backend(f"{_FOLDER}.triton:text_cross_attention", _unsupported_forward),
        "reference": Backend(f"{_FOLDER}.reference:text_cross_attention"),
    },
)
BACKWARD = Operator(
    "text_cross_attention_backward(Tensor grad_features, Tensor grad_sparsity, Tensor winner, "
    f"Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    backends={
        "triton": Backend(
            f"{_FOLDER}.triton_backward:text_cross_attention_backward", _unsupported_backward
        ),
        "reference": Backend(f"{_FOLDER}.reference:text_cross_attention_backward"),
    },
)
