"""Gathering patches, in plain PyTorch: the specification."""

from __future__ import annotations

from torch import Tensor


def gather_patches(x: Tensor, index: Tensor) -> Tensor:
    """`out[b, ..., k] = x[b, index[b, ..., k]]` for x [B, N, D] and index [B, K] or [B, M, K]."""
    batch, patches, width = x.shape
    # One row index into [B * N, D]: no index as wide as the features is ever made.
    offset = patches * index.new_ones(batch).cumsum(0) - patches
    rows = index + offset.view(-1, *[1] * (index.ndim - 1))
    flat = x.reshape(batch * patches, width).index_select(0, rows.flatten())
    return flat.view(*index.shape, width)
