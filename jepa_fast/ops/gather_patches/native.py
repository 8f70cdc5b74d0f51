"""The C++ kernel: csrc/cpu/gather_patches.cpp."""

from __future__ import annotations

from torch import Tensor

from jepa_fast.ops import _native
from jepa_fast.ops._checks import check_index_range
from jepa_fast.ops._rows import without_gaps

_FORWARD = _native.define("gather_patches(Tensor x, Tensor index, Tensor(a!) out) -> ()")
_BACKWARD = _native.define(
    "gather_patches_backward(Tensor grad, Tensor index, Tensor(a!) table) -> ()"
)


def gather_patches(x: Tensor, index: Tensor) -> Tensor:
    """As `reference.gather_patches`."""
    out = x.new_empty((*index.shape, x.shape[2]))
    try:
        _FORWARD(without_gaps(x), index.contiguous().flatten(1), out.flatten(1, -2))
    except (IndexError, RuntimeError):  # it finds an index that is out of range; this says which
        check_index_range("gather_patches", "index", index, x.shape[1])
        raise
    return out


def gather_patches_backward(grad: Tensor, index: Tensor, patches: int) -> Tensor:
    """As `reference.gather_patches_backward`."""
    table = grad.new_empty((index.shape[0], patches, grad.shape[-1]))
    grad = without_gaps(grad).flatten(1, -2)
    _BACKWARD(without_gaps(grad), index.contiguous().flatten(1), table)
    return table
