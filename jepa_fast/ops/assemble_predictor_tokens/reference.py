"""Assembling the predictor's tokens, in plain PyTorch: the specification."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from jepa_fast.ops._rows import sum_rows, take_rows


def assemble_predictor_tokens(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    context_index: Tensor,
    target_index: Tensor,
) -> Tensor:
    """[M * B, Kc + Kt, d]: row `m * B + b` is image b's context, then its block m's mask tokens.

    From context [B, Kc, d], mask_token [d], pos_embed [N, d], context_index [B, Kc] and
    target_index [B, M, Kt]. Every token gets its patch's position added.
    """
    dtype = _promoted(context, mask_token, pos_embed)
    # So that no sum is rounded before what it promotes to: of two of one dtype PyTorch rounds once.
    wide = torch.promote_types(dtype, torch.float32)
    if not context.dtype == mask_token.dtype == pos_embed.dtype:
        context, mask_token, pos_embed = (x.to(wide) for x in (context, mask_token, pos_embed))
    seen = context + take_rows(pos_embed, context_index)  # [B, Kc, d]
    hidden = mask_token + take_rows(pos_embed, target_index)  # [B, M, Kt, d]
    blocks = target_index.shape[1]
    tokens = torch.cat([seen.expand(blocks, *seen.shape), hidden.transpose(0, 1)], 2)
    return tokens.flatten(0, 1).to(dtype)


def empty_tokens(
    context: Tensor, mask_token: Tensor, pos_embed: Tensor, target_index: Tensor
) -> Tensor:
    """Memory for the tokens, in the dtype that the three floating inputs promote to."""
    (batch, blocks, hidden), (_, seen, width) = target_index.shape, context.shape
    dtype = _promoted(context, mask_token, pos_embed)
    return context.new_empty((blocks * batch, seen + hidden, width), dtype=dtype)


def _promoted(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def assemble_predictor_tokens_backward(
    grad: Tensor, context_index: Tensor, target_index: Tensor, patches: int, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of context, mask_token and pos_embed [patches, d] that are marked in `needs`.

    All in the dtype of `grad`, summed in float32 at least.
    """
    (batch, blocks, _), kept = target_index.shape, context_index.shape[1]
    wide = torch.promote_types(grad.dtype, torch.float32)
    per_block = grad.unflatten(0, (blocks, batch))
    seen = per_block[:, :, :kept].sum(0, dtype=wide)
    hidden = per_block[:, :, kept:]
    grads = []
    if needs[0]:
        grads.append(seen)
    if needs[1]:
        grads.append(hidden.sum((0, 1, 2), dtype=wide))
    if needs[2]:
        of_context = sum_rows(seen, context_index, patches)
        of_targets = sum_rows(hidden.transpose(0, 1).to(wide), target_index, patches)
        grads.append(of_context + of_targets)
    return [g.to(grad.dtype) for g in grads]
