"""A linear layer and the likelihood of its outputs, with the gradients, in chunks of tokens.

The outputs of one chunk exist at a time. Their gradients take their places, go through the layer's
products and are gone: nothing of the size of all outputs is ever there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jepa_fast.ops._checks import check_finite_target
from jepa_fast.ops.linear_mixture_nll.reference import empty_gradients, gradient_dtype
from jepa_fast.ops.mixture_nll.reference import split_mixture_parameters

_CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 128 << 20}
"""Of outputs: on a CPU its last cache holds them between the products, a GPU is filled by them."""


def in_chunks(
    nll_and_posterior: Callable[..., tuple[Tensor, Tensor]],
    mixture_nll_and_gradients_: Callable[..., Tensor],
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
    """As `reference.linear_mixture_nll_and_gradients`, by a backend's two functions."""
    tokens, width = target.shape
    options = (family, event, scale_floor, scale_map)
    mean = reduction == "mean"
    factor = 1 / max(tokens, 1) if mean and token_mask is None else 1.0
    grads = empty_gradients(hidden, weight, bias, target, needs)
    present = iter(grads)
    grad_hidden, grad_weight, grad_bias, grad_target = (
        next(present) if need else None for need in needs
    )
    wide = gradient_dtype(hidden.dtype)
    wide_weight = weight.to(wide)
    step = _tokens_at_once(hidden.device, len(weight) * wide.itemsize)
    room = _rows(hidden, min(step, tokens), len(weight))
    nll = hidden.new_empty(tokens, dtype=torch.float32)
    for first in range(0, tokens, step):
        part = slice(first, first + step)
        inputs = hidden[part]
        outputs = room[: len(inputs)]
        if bias is None:
            torch.mm(inputs, weight.T, out=outputs)
        else:
            torch.addmm(bias, inputs, weight.T, out=outputs)
        outputs = outputs.to(wide)
        parameters = split_mixture_parameters(outputs, num_components, width, event)
        if not grads:
            nll[part], _ = nll_and_posterior(target[part], *parameters, *options)
            continue
        to_target = None if grad_target is None else grad_target[part]
        nll[part] = mixture_nll_and_gradients_(
            target[part], *parameters, *options, factor, to_target
        )
        if token_mask is not None:
            outputs.masked_fill_(~token_mask[part, None], 0)
        if grad_hidden is not None:
            _product(outputs, wide_weight, grad_hidden[part], is_first=True)
        if grad_weight is not None:
            _product(outputs.T, inputs.to(wide), grad_weight, is_first=first == 0)
        if grad_bias is not None:
            sums = outputs.sum(0, dtype=torch.float32)
            grad_bias.copy_(sums) if first == 0 else grad_bias.add_(sums)
    check_finite_target("linear_mixture_nll", target, nll)
    if tokens == 0:
        for grad in grads:
            grad.zero_()
    if token_mask is None:
        return (nll.sum(dtype=torch.float64) * factor).to(torch.float32), grads
    # How many count is known to the device alone: no chunk could be multiplied by it.
    share = 1 / token_mask.sum().clamp(min=1) if mean else 1.0
    loss = nll.where(token_mask, 0).sum(dtype=torch.float64) * share
    return loss.to(torch.float32), [grad.mul_(share) for grad in grads]


def _rows(like: Tensor, count: int, width: int) -> Tensor:
    """Room for rows that begin 64 bytes, or a multiple, apart: else MKL takes 1.25 to 1.45 times
    as long to fill them."""
    multiple = 64 // like.element_size()
    return like.new_empty(count, -(-width // multiple) * multiple)[:, :width]


def _product(left: Tensor, right: Tensor, total: Tensor, is_first: bool) -> None:
    """Puts `left @ right` into `total`, in float32; adds it where it is not the first."""
    if left.dtype != total.dtype:
        product = left @ right
        total.copy_(product) if is_first else total.add_(product)
    elif is_first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


def _tokens_at_once(device: torch.device, row_bytes: int) -> int:
    return max(64, _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"]) // max(1, row_bytes))
