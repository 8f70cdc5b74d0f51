"""The public function `masked_linear`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jepa_fast.ops._autocast import linear_inputs
from jepa_fast.ops._autograd import OperatorFunction, applied, differentiable_once, spread
from jepa_fast.ops._checks import (
    check_dim,
    check_flag,
    check_index,
    check_same_size,
    check_vectors,
)
from jepa_fast.ops.masked_linear import contract


class _MaskedLinear(OperatorFunction):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        return contract.FORWARD.call(x, weight, bias, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.strict, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @differentiable_once("masked_linear")
    def backward(ctx: Any, saved: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        bias = saved[2]
        present = needs if bias is not None else needs[:2]
        grads = contract.BACKWARD.call(grad, *saved, ctx.strict, present, ctx.backend)
        return *spread(grads, needs), None, None, None, None


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degree: Tensor,
    out_degree: Tensor,
    strict: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """A linear layer in which an output sees only the inputs of no higher degree.

    `weight[o, i]` counts where `out_degree[o] >= in_degree[i]` (`>` if `strict`) and is taken as
    zero elsewhere, whatever it holds; its gradient is zero there. Layers whose degrees follow on
    each other, the last one strict, make an autoregressive network.

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O] or None.
        in_degree: [I] int32 or int64.
        out_degree: [O] int32 or int64.
        strict: compare with `>`.
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`.

    Returns:
        [..., O] in the dtype of `x`; under autocast in autocast's, as `F.linear`.

    Raises:
        TypeError: `x` or `weight` is not a dense floating tensor, degrees are not int32 or
            int64, `strict` is not bool, or dtypes differ outside autocast.
        ValueError: a shape does not fit.
        BackendError: the requested backend cannot serve the call.

    Source: MADE, arXiv 1502.03509, section 4.
    """
    check_flag("masked_linear", "strict", strict)
    check_vectors("masked_linear", "x", x)
    if x.ndim == 0:
        raise ValueError("masked_linear: x must be [..., I], got a tensor without dimensions")
    check_dim("masked_linear", "weight", weight, 2, "[O, I]")
    check_vectors("masked_linear", "weight", weight)
    check_same_size("masked_linear", "x", x, -1, "weight", weight, 1)
    check_index("masked_linear", "in_degree", in_degree, 1, "[I]")
    check_same_size("masked_linear", "in_degree", in_degree, 0, "weight", weight, 1)
    check_index("masked_linear", "out_degree", out_degree, 1, "[O]")
    check_same_size("masked_linear", "out_degree", out_degree, 0, "weight", weight, 0)
    if bias is not None:
        check_dim("masked_linear", "bias", bias, 1, "[O]")
        check_vectors("masked_linear", "bias", bias)
        check_same_size("masked_linear", "bias", bias, 0, "weight", weight, 0)
    x, weight, bias = linear_inputs("masked_linear", "x", x, weight, bias)
    return applied(_MaskedLinear, x, weight, bias, in_degree, out_degree, strict, backend)
