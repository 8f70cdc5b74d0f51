"""Numbers of a batch that several processes share, where a mean of their means would be another.

Every rank holds a slice of the batch, and gradients are averaged over ranks, as
`DistributedDataParallel` and the trainer do. Nothing here communicates in a process alone or
without gradients, so one rank may still evaluate by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def share_of_batch(counted: Callable[[], Tensor]) -> Tensor | float:
    """The weight of this rank's mean in the mean over the whole batch, times the number of ranks.

    The mean over ranks of ``share * mean`` is the batch's mean, and so are its gradients.

    Args:
        counted: gives a scalar, of how many things the mean is here, 0 or more. A process alone
            does not call it.
    """
    if not _is_shared():
        return 1.0
    count = counted()
    total = count.to(torch.float32, copy=True)
    dist.all_reduce(total)
    return count * dist.get_world_size() / total.clamp(min=1)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, differentiable."""
    return _SumOverRanks.apply(x) if _is_shared() else x


def _is_shared() -> bool:
    return torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduced(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Every rank's loss depends on every rank's x.
        return _all_reduced(grad)


def _all_reduced(x: Tensor) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x)
    return x
