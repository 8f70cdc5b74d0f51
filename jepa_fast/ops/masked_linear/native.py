"""The C++ kernels: csrc/cpu/masked_linear.cpp."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jepa_fast.ops import _native
from jepa_fast.ops._rows import as_matrix, without_gaps

_FORWARD = _native.define(
    "masked_linear(Tensor x, Tensor weight, Tensor? bias, Tensor in_degree, Tensor out_degree, "
    "bool strict, Tensor(a!) out) -> ()"
)
_BACKWARD = _native.define(
    "masked_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor in_degree, "
    "Tensor out_degree, bool strict, Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias) -> ()"
)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degree: Tensor,
    out_degree: Tensor,
    strict: bool,
) -> Tensor:
    """As `reference.masked_linear`."""
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    _FORWARD(
        without_gaps(as_matrix(x)),
        without_gaps(weight),
        *_native.contiguous(bias),
        in_degree.contiguous(),
        out_degree.contiguous(),
        strict,
        as_matrix(out),
    )
    return out


def masked_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degree: Tensor,
    out_degree: Tensor,
    strict: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, weight and bias, those marked in `needs`."""
    inputs = [x, weight] if bias is None else [x, weight, bias]
    grads = [t.new_empty(t.shape) if n else None for t, n in zip(inputs, needs, strict=True)]
    dx, dweight, dbias = [*grads, None][:3]
    _BACKWARD(
        without_gaps(as_matrix(grad)),
        without_gaps(as_matrix(x)),
        without_gaps(weight),
        in_degree.contiguous(),
        out_degree.contiguous(),
        strict,
        None if dx is None else as_matrix(dx),
        dweight,
        dbias,
    )
    return [grad for grad in grads if grad is not None]
