"""Gathering patches, in plain PyTorch: the specification."""

from __future__ import annotations

from torch import Tensor

from jepa_fast.ops._rows import flat_rows, sum_rows, take_rows


def gather_patches(x: Tensor, index: Tensor) -> Tensor:
    """`out[b, ..., k] = x[b, index[b, ..., k]]` for x [B, N, D] and index [B, K] or [B, M, K]."""
    return take_rows(x.flatten(0, 1), flat_rows(index, x.shape[1]))


def gather_patches_backward(grad: Tensor, index: Tensor, patches: int) -> Tensor:
    """The gradient of x [B, patches, D]: patches that were taken repeatedly sum up."""
    batch = index.shape[0]
    table = sum_rows(grad, flat_rows(index, patches), batch * patches)
    return table.view(batch, patches, grad.shape[-1])
