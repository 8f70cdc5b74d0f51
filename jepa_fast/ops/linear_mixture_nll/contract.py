"""Schema, fake and backends of `linear_mixture_nll`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jepa_fast.ops._checks import check_finite_target, only_float32_kernel_dtypes
from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.linear_mixture_nll import reference
from jepa_fast.ops.mixture_nll.reference import compute_dtype


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    needs: Sequence[bool] = rest[-1]
    loss = target.new_empty((), dtype=compute_dtype(hidden, target))
    return loss, reference.empty_gradients(hidden, weight, bias, target, needs)


def _fake_backward(grad: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
    return [each.new_empty(each.shape) for each in grads]


def _reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    result = reference.linear_mixture_nll_and_gradients(hidden, weight, bias, target, *rest)
    check_finite_target("linear_mixture_nll", target, result[0])
    return result


def _unsupported(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> list[str]:
    return only_float32_kernel_dtypes(hidden, target)


_FOLDER = "jepa_fast.ops.linear_mixture_nll"

# The forward pass has a token's outputs at hand, so it leaves the gradients but for the factor from
# above: [T, P] outputs are never kept, nor made twice. Tokens that do not count are rows of 0 in
# hidden and target.
FORWARD = Operator(
    "linear_mixture_nll(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor? token_mask, int num_components, str family, str event, float scale_floor, "
    "str scale_map, str reduction, bool[] needs, str backend) -> (Tensor, Tensor[])",
    fake=_fake,
    backends={
        "triton": Backend(f"{_FOLDER}.triton:linear_mixture_nll", _unsupported),
        "cpu": Backend(f"{_FOLDER}.native:linear_mixture_nll", _unsupported),
        "reference": Backend(f"{__name__}:_reference"),
    },
)
BACKWARD = Operator(
    "linear_mixture_nll_backward(Tensor grad, Tensor[] grads, str backend) -> Tensor[]",
    fake=_fake_backward,
    backends={"reference": Backend(f"{_FOLDER}.reference:linear_mixture_nll_backward")},
)
