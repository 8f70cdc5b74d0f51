"""Where half precision would lose the answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jepa_fast.ops._autocast import without_autocast

__all__ = ["WideBuffers", "widened", "without_autocast"]


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is: what targets, samples and densities are kept in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class WideBuffers(nn.Module):
    """A module whose own buffers are tables that `.bfloat16()` and the like leave as wide as they
    are: rounded, they would not be those that the weights were trained with.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WideBuffers:
        wide = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, now in self._buffers.items():
            table = wide[name]
            if table is not None and now is not None and now.dtype.itemsize < table.dtype.itemsize:
                self._buffers[name] = table.to(now.device)
        return self
