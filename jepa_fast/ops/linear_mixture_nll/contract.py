"""Schemas, fakes and backends of `linear_mixture_nll`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jepa_fast.ops._autograd import recomputed_gradients
from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.linear_mixture_nll import reference
from jepa_fast.ops.mixture_nll.reference import compute_dtype


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *options: Any
) -> Tensor:
    return target.new_empty((), dtype=compute_dtype(hidden, target))


def _fake_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *options: Any,
) -> list[Tensor]:
    needs: Sequence[bool] = options[-1]
    inputs = [t for t in (hidden, weight, bias, target) if t is not None]
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]


def reference_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    num_components: int,
    family: str,
    event: str,
    scale_floor: float,
    scale_map: str,
    reduction: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    options = (num_components, family, event, scale_floor, scale_map, reduction)

    def function(hidden: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        *bias, target = rest
        return reference.linear_mixture_nll(
            hidden, weight, bias[0] if bias else None, target, *options
        )

    inputs = [t for t in (hidden, weight, bias, target) if t is not None]
    return recomputed_gradients(function, inputs, needs, [grad])


FORWARD = Operator(
    "linear_mixture_nll(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    "int num_components, str family, str event, float scale_floor, str scale_map, str reduction, "
    "str backend) -> Tensor",
    fake=_fake,
    backends={
        "reference": Backend("jepa_fast.ops.linear_mixture_nll.reference:linear_mixture_nll")
    },
)
BACKWARD = Operator(
    "linear_mixture_nll_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor target, int num_components, str family, str event, float scale_floor, str scale_map, "
    "str reduction, bool[] needs, str backend) -> Tensor[]",
    fake=_fake_backward,
    backends={"reference": Backend(f"{__name__}:reference_backward")},
)
