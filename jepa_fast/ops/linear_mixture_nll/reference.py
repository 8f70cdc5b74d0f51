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
    token_mask: Tensor | None,
    num_components: int,
    family: str,
    event: str,
    scale_floor: float,
    scale_map: str,
    reduction: str,
    computed_in: torch.dtype | None = None,
) -> Tensor:
    """Scalar from hidden [T, H], weight [P, H], bias [P], target [T, D] and token_mask [T].

    The layer is computed in the dtype of its tensors, or in another; gradients are in theirs.
    """
    parameters = _outputs(hidden, weight, bias, computed_in or hidden.dtype)
    logits, loc, log_scale = mixture.split_mixture_parameters(
        parameters, num_components, target.shape[1], event
    )
    nll = mixture.mixture_nll(target, logits, loc, log_scale, family, event, scale_floor, scale_map)
    if token_mask is None:
        return nll.sum() if reduction == "sum" else nll.sum() / max(nll.shape[0], 1)
    total = nll.where(token_mask, 0).sum()
    return total if reduction == "sum" else total / token_mask.sum().clamp(min=1)


def _outputs(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The layer's outputs, computed in `dtype`, with gradients in that of the tensors."""
    outputs = F.linear(hidden, weight, bias)
    if dtype == outputs.dtype:
        return outputs
    rounded = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return outputs + (rounded - outputs).detach()


def linear_mixture_nll_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_mask: Tensor | None,
    num_components: int,
    family: str,
    event: str,
    scale_floor: float,
    scale_map: str,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """(loss, its gradients for those of hidden, weight, bias and target that `needs` marks).

    Gradients are in float32, or float64 for float64. Those of the outputs are in `gradient_dtype`.
    """
    options = (token_mask, num_components, family, event, scale_floor, scale_map, reduction)
    loss = linear_mixture_nll(hidden, weight, bias, target, *options)
    if not any(needs):
        return loss, []

    def again(hidden_: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        *offset, target = rest
        bias = offset[0] if offset else None
        return linear_mixture_nll(hidden_, weight, bias, target, *options, hidden.dtype)

    wide = gradient_dtype(hidden.dtype)
    layer = [None if each is None else each.to(wide) for each in (hidden, weight, bias)]
    tensors = (*layer, target)
    needed = [need for need, t in zip(needs, tensors, strict=True) if t is not None]
    leaves = [t for t in tensors if t is not None]
    grads = recomputed_gradients(again, leaves, needed, [torch.ones_like(loss)])
    rooms = empty_gradients(hidden, weight, bias, target, needs)
    return loss, [room.copy_(grad) for room, grad in zip(rooms, grads, strict=True)]


def linear_mixture_nll_backward(grad: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
    """What the forward pass has left, times the factor from above."""
    return [each * grad for each in grads]


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the gradients of a layer's outputs in `dtype`.

    Those of a token are up to 1 / scale times its deviation, and in a mean they are divided by the
    number of tokens: float16 holds neither the one nor the other.
    """
    return torch.float32 if dtype == torch.float16 else dtype


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
