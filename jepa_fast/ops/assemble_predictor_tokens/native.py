"""The C++ kernel: csrc/cpu/assemble_predictor_tokens.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa_fast.ops import _native
from jepa_fast.ops._checks import check_index_range
from jepa_fast.ops._rows import without_gaps
from jepa_fast.ops.assemble_predictor_tokens.reference import empty_tokens

_FORWARD = _native.define(
    "assemble_predictor_tokens(Tensor context, Tensor mask_token, Tensor pos_embed, "
    "Tensor context_index, Tensor target_index, Tensor(a!) out) -> ()"
)
_BACKWARD = _native.define(
    "assemble_predictor_tokens_backward(Tensor grad, Tensor context_index, Tensor target_index, "
    "int patches, Tensor(a!)? context, Tensor(b!)? mask_token, Tensor(c!)? pos_embed) -> ()"
)


def assemble_predictor_tokens(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    context_index: Tensor,
    target_index: Tensor,
) -> Tensor:
    """As `reference.assemble_predictor_tokens`."""
    out = empty_tokens(context, mask_token, pos_embed, target_index)
    wide = torch.promote_types(out.dtype, torch.float32)
    try:
        _FORWARD(
            without_gaps(context),
            mask_token.to(wide).contiguous()[None, None],
            pos_embed.to(wide).contiguous()[None],
            context_index.contiguous(),
            target_index.contiguous(),
            out,
        )
    except (IndexError, RuntimeError):  # it finds an index that is out of range; this says which
        for name, index in (("context_index", context_index), ("target_index", target_index)):
            check_index_range("assemble_predictor_tokens", name, index, pos_embed.shape[0])
        raise
    return out


def assemble_predictor_tokens_backward(
    grad: Tensor, context_index: Tensor, target_index: Tensor, patches: int, needs: Sequence[bool]
) -> list[Tensor]:
    """As `reference.assemble_predictor_tokens_backward`."""
    width = grad.shape[-1]
    shapes = ((*context_index.shape, width), (1, 1, width), (1, patches, width))
    grads = [
        grad.new_empty(shape) if need else None for shape, need in zip(shapes, needs, strict=True)
    ]
    _BACKWARD(
        without_gaps(grad), context_index.contiguous(), target_index.contiguous(), patches, *grads
    )
    context, mask_token, pos_embed = grads
    if mask_token is not None:
        mask_token = mask_token.view(width)
    if pos_embed is not None:
        pos_embed = pos_embed.view(patches, width)
    return [each for each in (context, mask_token, pos_embed) if each is not None]
