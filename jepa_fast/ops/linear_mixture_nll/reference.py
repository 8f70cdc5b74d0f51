"""A linear layer and the mixture likelihood of what it predicts: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_fast.ops._autograd import recomputed_gradients
from jepa_fast.ops.mixture_nll import reference as mixture


def linear_mixture_nll(
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
) -> Tensor:
    """Scalar from hidden [T, H], weight [P, H], bias [P] and target [T, D]."""
    parameters = F.linear(hidden, weight, bias)
    logits, loc, log_scale = mixture.split_mixture_parameters(
        parameters, num_components, target.shape[1], event
    )
    nll = mixture.mixture_nll(target, logits, loc, log_scale, family, event, scale_floor, scale_map)
    return nll.sum() if reduction == "sum" else nll.sum() / max(nll.shape[0], 1)


def linear_mixture_nll_and_gradients(
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
) -> tuple[Tensor, list[Tensor]]:
    """(loss, its gradients for those of hidden, weight, bias and target that `needs` marks).

    Gradients are in float32, or float64 for float64.
    """
    options = (num_components, family, event, scale_floor, scale_map)
    loss = linear_mixture_nll(hidden, weight, bias, target, *options, reduction)
    if not any(needs):
        return loss, []
    inner, outer = factors(reduction, len(hidden), hidden.dtype)

    def summed(hidden: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        *offset, target = rest
        return linear_mixture_nll(
            hidden, weight, offset[0] if offset else None, target, *options, "sum"
        )

    tensors = (hidden, weight, bias, target)
    needed = [need for need, t in zip(needs, tensors, strict=True) if t is not None]
    leaves = [t for t in tensors if t is not None]
    grads = recomputed_gradients(summed, leaves, needed, [loss.new_full((), inner)])
    rooms = empty_gradients(hidden, weight, bias, target, needs)
    return loss, [room.copy_(grad).mul_(outer) for room, grad in zip(rooms, grads, strict=True)]


def linear_mixture_nll_backward(grad: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
    """What the forward pass has left, times the factor from above."""
    return [each * grad for each in grads]


def factors(reduction: str, tokens: int, dtype: torch.dtype) -> tuple[float, float]:
    """The loss over the sum of the tokens' NLL, as a product of two factors.

    The first enters the gradients of the layer's outputs, which are in `dtype`, the second is left
    for the end: in float16 a mean's gradients would be 0 over many tokens.
    """
    factor = 1 / max(tokens, 1) if reduction == "mean" else 1.0
    return (1.0, factor) if dtype == torch.float16 else (factor, 1.0)


def empty_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Room for the gradients that `needs` marks, contiguous."""
    dtype = mixture.compute_dtype(hidden, target)
    return [
        tensor.new_empty(tensor.shape, dtype=dtype)
        for tensor, need in zip((hidden, weight, bias, target), needs, strict=True)
        if tensor is not None and need
    ]
