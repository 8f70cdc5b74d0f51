"""A linear layer and the mixture likelihood of what it predicts: the specification."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

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
