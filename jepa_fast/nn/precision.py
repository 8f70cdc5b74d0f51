"""Where half precision would lose the answer."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_fast.ops._autocast import without_autocast

__all__ = ["widened", "without_autocast"]


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is: what targets, samples and densities are kept in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
