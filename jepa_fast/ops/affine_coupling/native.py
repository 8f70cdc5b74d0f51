"""The C++ kernels: csrc/cpu/affine_coupling.cpp."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jepa_fast.ops import _native
from jepa_fast.ops._autograd import spread
from jepa_fast.ops._rows import without_gaps
from jepa_fast.ops.affine_coupling.reference import empty_gradients, empty_outputs

_FORWARD = _native.define(
    "affine_coupling(Tensor x, Tensor raw_scale, Tensor shift, Tensor mask, float scale_bound, "
    "bool inverse, Tensor(a!) y, Tensor(b!) logdet) -> ()"
)
_BACKWARD = _native.define(
    "affine_coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor raw_scale, "
    "Tensor shift, Tensor mask, float scale_bound, bool inverse, Tensor(a!)? grad_x, "
    "Tensor(b!)? grad_raw_scale, Tensor(c!)? grad_shift) -> ()"
)


def affine_coupling(
    x: Tensor, raw_scale: Tensor, shift: Tensor, mask: Tensor, scale_bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.affine_coupling`."""
    y, logdet = empty_outputs(x)
    _FORWARD(
        without_gaps(x),
        without_gaps(raw_scale),
        without_gaps(shift),
        mask.contiguous(),
        scale_bound,
        inverse,
        y,
        logdet,
    )
    return y, logdet


def affine_coupling_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    scale_bound: float,
    inverse: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """As `reference.affine_coupling_backward`."""
    grads = empty_gradients((x, raw_scale, shift), needs)
    _BACKWARD(
        without_gaps(grad_y),
        grad_logdet.contiguous(),
        without_gaps(x),
        without_gaps(raw_scale),
        without_gaps(shift),
        mask.contiguous(),
        scale_bound,
        inverse,
        *spread(grads, needs),
    )
    return grads
