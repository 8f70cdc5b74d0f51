"""Where half precision would lose the answer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Context in which matrix products of tensors like this one keep their dtype."""
    device = tensor.device.type
    # Dynamo of torch 2.11 cannot trace the question; what gets compiled is on a device that has it.
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is: what targets, samples and densities are kept in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
