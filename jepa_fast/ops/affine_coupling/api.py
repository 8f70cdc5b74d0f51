"""The public function `affine_coupling`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops._autograd import OperatorFunction, applied, differentiable_once, spread
from jepa_fast.ops._checks import (
    check_dim,
    check_flag,
    check_positive,
    check_same_size,
    check_vectors,
)
from jepa_fast.ops.affine_coupling import contract


class _AffineCoupling(OperatorFunction):
    # Without *arguments, which torch.compile gets wrong where nothing takes a gradient.
    @staticmethod
    def forward(
        x: Tensor,
        raw_scale: Tensor,
        shift: Tensor,
        mask: Tensor,
        scale_bound: float,
        inverse: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return contract.FORWARD.call(x, raw_scale, shift, mask, scale_bound, inverse, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale_bound, ctx.inverse, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @differentiable_once("affine_coupling")
    def backward(
        ctx: Any, saved: Any, grad_y: Tensor, grad_logdet: Tensor
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        grads = contract.BACKWARD.call(
            grad_y,
            grad_logdet,
            *saved,
            ctx.scale_bound,
            ctx.inverse,
            needs,
            ctx.backend,
        )
        return *spread(grads, needs), None, None, None, None


def affine_coupling(
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    scale_bound: float = 2.0,
    inverse: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scales and shifts the coordinates outside `mask`; those inside pass unchanged.

    With `s = scale_bound * tanh(raw_scale)`: forward `y = x * exp(s) + shift`, inverse
    `y = (x - shift) * exp(-s)`, and `logdet = log |det dy/dx|` of the direction taken. Both are
    bijections as long as raw_scale and shift are computed from the coordinates in `mask` alone.

    Args:
        x: [T, D].
        raw_scale: [T, D]; read outside `mask` only.
        shift: [T, D]; read outside `mask` only.
        mask: [D] bool, True where a coordinate passes unchanged.
        scale_bound: positive; the largest |log-scale|.
        inverse: the direction.
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`.

    Returns:
        y [T, D] in the dtype of `x`, and logdet [T] in float32 (float64 if `x` is).

    Raises:
        TypeError: `x`, `raw_scale` or `shift` is not a dense floating tensor, `mask` or
            `inverse` is not bool, or `scale_bound` is not a number.
        ValueError: a shape does not fit, or `scale_bound` is not positive.
        BackendError: the requested backend cannot serve the call.

    Source: RealNVP, arXiv 1605.08803, section 3.2.
    """
    check_flag("affine_coupling", "inverse", inverse)
    check_dim("affine_coupling", "x", x, 2, "[T, D]")
    check_vectors("affine_coupling", "x", x)
    for name, tensor in (("raw_scale", raw_scale), ("shift", shift)):
        check_dim("affine_coupling", name, tensor, 2, "[T, D]")
        check_vectors("affine_coupling", name, tensor)
        check_same_size("affine_coupling", name, tensor, 0, "x", x, 0)
        check_same_size("affine_coupling", name, tensor, 1, "x", x, 1)
    check_dim("affine_coupling", "mask", mask, 1, "[D]")
    check_same_size("affine_coupling", "mask", mask, 0, "x", x, 1)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"affine_coupling: mask must be bool, got {mask.dtype}; use mask.bool() "
            f"(True: the coordinate passes unchanged)"
        )
    check_positive("affine_coupling", "scale_bound", scale_bound)
    return applied(_AffineCoupling, x, raw_scale, shift, mask, scale_bound, inverse, backend)
