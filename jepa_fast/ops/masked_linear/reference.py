"""A linear layer masked by degrees, in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degree: Tensor,
    out_degree: Tensor,
    strict: bool,
) -> Tensor:
    """[..., O] from x [..., I], weight [O, I], bias [O], in_degree [I], out_degree [O]."""
    rows = out_degree.unsqueeze(1)
    mask = rows > in_degree if strict else rows >= in_degree  # [O, I]
    return F.linear(x, torch.where(mask, weight, 0.0), bias)
