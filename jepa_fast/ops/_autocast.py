"""Dtypes under autocast."""

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


def linear_inputs(
    op: str, argument: str, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs of a linear layer in one dtype, as `torch.nn.functional.linear` has it: autocast's
    where it is on (float64 stays), else the one they have.

    Called before an operator is entered, so that forward, backward, fake and every backend see the
    same dtypes, and the gradient arrives at the parameter in the parameter's dtype.

    Raises:
        TypeError: the dtypes differ and autocast does not settle it.
    """
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    if enabled and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {argument}, {x.dtype}, got {tensor.dtype}; "
                f"convert one of them or run under torch.autocast"
            )
    return x, weight, bias
