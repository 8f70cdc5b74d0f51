"""The public functions `gather_patches` and `gather_packed`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jepa_fast.ops._autograd import OperatorFunction, applied, differentiable_once
from jepa_fast.ops._checks import (
    check_dense,
    check_dim,
    check_floating,
    check_index,
    check_same_size,
)
from jepa_fast.ops.gather_patches import contract


class _GatherPatches(OperatorFunction):
    @staticmethod
    def forward(x: Tensor, index: Tensor, backend: str) -> Tensor:
        return contract.FORWARD.call(x, index, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, index, ctx.backend = inputs
        ctx.patches = x.shape[1]
        ctx.save_for_backward(index)

    @staticmethod
    @differentiable_once("gather_patches")
    def backward(ctx: Any, saved: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = saved
        return contract.BACKWARD.call(grad, index, ctx.patches, ctx.backend), None, None


def gather_patches(x: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """Takes patches out of every image: `out[b, ..., k] = x[b, index[b, ..., k]]`.

    Args:
        x: [B, N, D] tokens, any floating dtype (float8 has no gradient), any strides.
        index: [B, K] or [B, M, K] patch indices in [0, N), int32 or int64. They may repeat; the
            gradients of a patch taken repeatedly are summed in float32, in a fixed order.
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`.

    Returns:
        [B, K, D] or [B, M, K, D] in the dtype of `x`.

    Raises:
        TypeError: `x` is not floating or not dense, or `index` not int32 or int64.
        ValueError: a shape does not fit; an index is out of range (checked on the CPU always, on a
            GPU with `JEPA_FAST_DEBUG=1`).
        BackendError: the requested backend cannot serve the call.

    Source: the context and target gathers of I-JEPA, arXiv 2301.08243, section 3.
    """
    check_dim("gather_patches", "x", x, 3, "[B, N, D]")
    check_floating("gather_patches", "x", x)
    check_dense("gather_patches", "x", x)
    check_index("gather_patches", "index", index, (2, 3), "[B, K] or [B, M, K]")
    check_same_size("gather_patches", "x", x, 0, "index", index, 0)
    return applied(_GatherPatches, x, index, backend)


def gather_packed(rows: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """Takes rows out of packed tokens, those of all images in one list: `out[k] = rows[index[k]]`.

    Args:
        rows: [T, D] tokens, any floating dtype, any strides.
        index: [K] row indices in [0, T), int32 or int64. They may repeat.
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`.

    Returns:
        [K, D] in the dtype of `rows`.

    Raises:
        TypeError, ValueError, BackendError: as :func:`gather_patches`.
    """
    check_dim("gather_packed", "rows", rows, 2, "[T, D]")
    check_floating("gather_packed", "rows", rows)
    check_dense("gather_packed", "rows", rows)
    check_index("gather_packed", "index", index, 1, "[K]")
    # Packed rows are the patches of a single, long image; the gradient of [0] would copy.
    return applied(_GatherPatches, rows[None], index[None], backend).squeeze(0)
