"""Consistency of patch-word similarities over layers, in plain PyTorch: the specification."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from jepa_fast.ops.text_cross_attention.reference import (
    by_head,
    by_image,
    by_row,
    dot_products,
    pair_weights,
    similarities,
    unit_length,
    valid_words,
    weighted,
)


def patch_word_consistency(
    q_layers: Sequence[Tensor],
    k_layers: Sequence[Tensor],
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    token_mask: Tensor | None,
    num_heads: int,
    similarity: str,
    tau: float,
) -> Tensor:
    """Mean over layers, captions and tokens of `sum_w |O^l[w] - mean_l O^l[w]|`."""
    batch = k_layers[0].shape[0]
    valid = valid_words(k_layers[0], word_mask, caption_mask)
    layers = torch.stack(
        list(_similarities(q_layers, k_layers, valid, token_mask, num_heads, similarity, tau))
    )
    deviation = (layers - layers.mean(0)).abs().mean(0).sum(2)  # [B, C, P]
    has_words = valid.any(3, keepdim=True)
    weight = pair_weights(has_words, token_mask, batch, deviation.shape[-1], deviation.dtype)
    return weighted(deviation, weight[:, 0])


def patch_word_similarity(
    q_layers: Sequence[Tensor],
    k_layers: Sequence[Tensor],
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    num_heads: int,
    similarity: str,
    tau: float,
) -> Tensor:
    """`mean_l O^l`, [R, C, T, S], zero where there is no word."""
    rows, tokens, _ = q_layers[0].shape
    valid = valid_words(k_layers[0], word_mask, caption_mask)
    # Summed layer by layer: no more than a few maps are there at a time.
    layers = _similarities(q_layers, k_layers, valid, None, num_heads, similarity, tau)
    mean = functools.reduce(operator.add, layers) / len(q_layers)
    return by_row(mean.transpose(2, 3)[:, None], rows, tokens)


def _similarities(
    q_layers: Sequence[Tensor],
    k_layers: Sequence[Tensor],
    valid: Tensor,
    token_mask: Tensor | None,
    num_heads: int,
    similarity: str,
    tau: float,
) -> Iterator[Tensor]:
    """O of one layer after the other, averaged over its heads: [B, C, S, P]."""
    for q, k in zip(q_layers, k_layers, strict=True):
        if token_mask is not None:  # slopes of 0 would not undo what is not finite
            q = q.masked_fill(~token_mask[..., None], 0)
        q = unit_length(by_image(q, k.shape[0], num_heads))
        k = unit_length(by_head(k, num_heads, valid))
        yield similarities(dot_products(q, k), valid, similarity, tau).mean(1)
