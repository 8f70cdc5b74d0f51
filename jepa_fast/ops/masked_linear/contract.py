"""Schemas, fakes and backends of `masked_linear`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jepa_fast.ops._autograd import recomputed_gradients
from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.masked_linear import reference


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degree: Tensor,
    out_degree: Tensor,
    strict: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degree: Tensor,
    out_degree: Tensor,
    strict: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    inputs = [t for t in (x, weight, bias) if t is not None]
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]


def reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degree: Tensor,
    out_degree: Tensor,
    strict: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.masked_linear(x, weight, bias, in_degree, out_degree, strict)

    inputs = [t for t in (x, weight, bias) if t is not None]
    return recomputed_gradients(function, inputs, needs, [grad])


FORWARD = Operator(
    "masked_linear(Tensor x, Tensor weight, Tensor? bias, Tensor in_degree, Tensor out_degree, "
    "bool strict, str backend) -> Tensor",
    fake=_fake,
    backends={"reference": Backend("jepa_fast.ops.masked_linear.reference:masked_linear")},
)
BACKWARD = Operator(
    "masked_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor in_degree, "
    "Tensor out_degree, bool strict, bool[] needs, str backend) -> Tensor[]",
    fake=_fake_backward,
    backends={"reference": Backend(f"{__name__}:reference_backward")},
)
