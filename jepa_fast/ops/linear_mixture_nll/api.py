"""The public function `linear_mixture_nll`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops._autocast import linear_inputs
from jepa_fast.ops._autograd import (
    OperatorFunction,
    applied,
    differentiable_once,
    keep_slopes,
    spread,
)
from jepa_fast.ops._checks import (
    check_choice,
    check_dim,
    check_mask,
    check_same_size,
    check_vectors,
)
from jepa_fast.ops.linear_mixture_nll import contract
from jepa_fast.ops.mixture_nll.api import check_mixture_options
from jepa_fast.ops.mixture_nll.reference import mixture_parameter_count


class _LinearMixtureNll(OperatorFunction):
    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        loss, grads = contract.FORWARD.call(hidden, weight, bias, target, *rest)
        return loss, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *grads = output
        ctx.needs = inputs[-2]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:4]]
        keep_slopes(ctx, *grads)

    @staticmethod
    @differentiable_once("linear_mixture_nll")
    def backward(ctx: Any, saved: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # Plain PyTorch on every device.
        slopes = [slope.detach() for slope in saved]
        scaled = contract.BACKWARD.call(grad, slopes, "reference")
        grads = [
            None if each is None else each.to(dtype)
            for each, dtype in zip(spread(scaled, ctx.needs), ctx.dtypes, strict=True)
        ]
        return *grads, *[None] * 9


def linear_mixture_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    num_components: int,
    family: str = "gaussian",
    event: str = "joint",
    scale_floor: float = 1e-3,
    scale_map: str = "exp",
    reduction: str = "mean",
    token_mask: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """`mixture_nll` of the mixtures that a linear layer predicts, reduced over the tokens.

    The P outputs of the layer are laid out as logits, then loc, then log_scale; loc and log_scale
    are K rows of D numbers (component by component, the coordinate running fastest), and so are the
    logits with `event="coordinate"`; with `"joint"` they are K numbers. So P = K (2 D + 1) for
    `"joint"` and 3 K D for `"coordinate"`.

    The forward pass computes the gradients, too, if any is asked for, and keeps them, in float32,
    for the backward pass. Kernels (every backend but the reference) take the tokens in chunks: the
    parameters, [T, P], never exist in full.

    Args:
        hidden: [T, H].
        weight: [P, H].
        bias: [P] or None.
        target: [T, D].
        num_components: K.
        family, event, scale_floor, scale_map: as in `mixture_nll`.
        reduction: `"mean"` or `"sum"` over the tokens that count. The mean over no token is 0.
        token_mask: [T] bool, False at tokens that do not count: what they hold is not read, and
            their gradients are 0; None: all count.
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`.

    Returns:
        A scalar, float32 (float64 if `hidden` or `target` is). Under autocast the linear layer runs
        in autocast's dtype, the likelihood in float32.

    Raises:
        TypeError: dtypes of `hidden`, `weight` and `bias` differ outside autocast; an argument is
            not a dense floating tensor; `num_components` is no integer, `scale_floor` no number.
        ValueError: a shape does not fit, an unknown name, a floor that is not positive; on a CPU, a
            target that counts and is NaN or infinite.
        BackendError: the requested backend cannot serve the call.

    Source: mixture density networks, Bishop 1994.
    """
    op = "linear_mixture_nll"
    check_mixture_options(op, family, event, scale_floor, scale_map, num_components)
    check_choice(op, "reduction", reduction, ("mean", "sum"))
    check_dim(op, "hidden", hidden, 2, "[T, H]")
    check_dim(op, "weight", weight, 2, "[P, H]")
    check_dim(op, "target", target, 2, "[T, D]")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("target", target)):
        check_vectors(op, name, tensor)
    check_same_size(op, "hidden", hidden, 1, "weight", weight, 1)
    check_same_size(op, "hidden", hidden, 0, "target", target, 0)
    outputs = mixture_parameter_count(num_components, target.shape[1], event)
    if weight.shape[0] != outputs:
        formula = "K (2 D + 1)" if event == "joint" else "3 K D"
        raise ValueError(
            f"{op}: weight must have {formula} = {outputs} rows for num_components K = "
            f"{num_components}, target width D = {target.shape[1]} and event={event!r}, "
            f"got {list(weight.shape)}"
        )
    if bias is not None:
        check_dim(op, "bias", bias, 1, "[P]")
        check_vectors(op, "bias", bias)
        check_same_size(op, "bias", bias, 0, "weight", weight, 0)
    if token_mask is not None:
        check_mask(op, "token_mask", token_mask, target.shape[:1])
        absent = ~token_mask[:, None]
        hidden, target = hidden.masked_fill(absent, 0), target.masked_fill(absent, 0)
    hidden, weight, bias = linear_inputs(op, "hidden", hidden, weight, bias)
    tensors = (hidden, weight, bias, target)
    records = torch.is_grad_enabled()
    needs = [records and tensor is not None and tensor.requires_grad for tensor in tensors]
    loss, *_ = applied(
        _LinearMixtureNll,
        hidden,
        weight,
        bias,
        target,
        token_mask,
        num_components,
        family,
        event,
        scale_floor,
        scale_map,
        reduction,
        needs,
        backend,
    )
    return loss
