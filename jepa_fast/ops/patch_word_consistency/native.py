"""The C++ kernels: csrc/cpu/patch_word_consistency.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops import _native
from jepa_fast.ops._rows import without_gaps

_OPTIONS = (
    "Tensor[] q_layers, Tensor[] k_layers, Tensor? word_mask, Tensor? caption_mask, "
    "Tensor? token_mask, int num_heads, bool softplus, float tau"
)
_FORWARD = _native.define(f"patch_word_consistency({_OPTIONS}, Tensor(a!) loss) -> ()")
_BACKWARD = _native.define(
    f"patch_word_consistency_backward(Tensor grad, {_OPTIONS}, "
    "Tensor(a!)[] dq_layers, Tensor(b!)[] dk_layers) -> ()"
)


def patch_word_consistency(q_layers: Sequence[Tensor], *arguments: Any) -> Tensor:
    """As `reference.patch_word_consistency`."""
    loss = q_layers[0].new_empty((), dtype=torch.float32)
    _FORWARD(*_for_kernel(q_layers, *arguments), loss)
    return loss


def patch_word_consistency_backward(
    grad: Tensor, q_layers: Sequence[Tensor], k_layers: Sequence[Tensor], *options: Any
) -> list[Tensor]:
    """As `contract.reference_backward`."""
    dq, dk = ([x.new_empty(x.shape) for x in layers] for layers in (q_layers, k_layers))
    _BACKWARD(grad, *_for_kernel(q_layers, k_layers, *options), dq, dk)
    return [*dq, *dk]


def _for_kernel(
    q_layers: Sequence[Tensor],
    k_layers: Sequence[Tensor],
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    token_mask: Tensor | None,
    num_heads: int,
    similarity: str,
    tau: float,
) -> tuple[Any, ...]:
    layers = ([without_gaps(x) for x in layers] for layers in (q_layers, k_layers))
    masks = _native.contiguous(word_mask, caption_mask, token_mask)
    return *layers, *masks, num_heads, similarity == "softplus", tau
