"""Schemas, fakes and backends of `gather_patches`."""

from __future__ import annotations

from torch import Tensor

from jepa_fast.ops._checks import check_index_range, only_kernel_dtypes
from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.gather_patches import reference


def _fake(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(*index.shape, x.shape[-1])


def _reference(x: Tensor, index: Tensor) -> Tensor:
    check_index_range("gather_patches", "index", index, x.shape[1])
    return reference.gather_patches(x, index)


def _fake_backward(grad: Tensor, index: Tensor, patches: int) -> Tensor:
    return grad.new_empty(index.shape[0], patches, grad.shape[-1])


def _unsupported(x: Tensor, index: Tensor, patches: int | None = None) -> list[str]:
    return only_kernel_dtypes(x)


_FOLDER = "jepa_fast.ops.gather_patches"
FORWARD = Operator(
    "gather_patches(Tensor x, Tensor index, str backend) -> Tensor",
    fake=_fake,
    backends={
        "triton": Backend(f"{_FOLDER}.triton:gather_patches", _unsupported),
        "cpu": Backend(f"{_FOLDER}.native:gather_patches", _unsupported),
        "reference": Backend(f"{__name__}:_reference"),
    },
)
# The gradient needs no more of x than its number of patches, so x is not kept for it.
BACKWARD = Operator(
    "gather_patches_backward(Tensor grad, Tensor index, SymInt patches, str backend) -> Tensor",
    fake=_fake_backward,
    backends={
        "triton": Backend(f"{_FOLDER}.triton:gather_patches_backward", _unsupported),
        "cpu": Backend(f"{_FOLDER}.native:gather_patches_backward", _unsupported),
        "reference": Backend(f"{reference.__name__}:gather_patches_backward"),
    },
)
