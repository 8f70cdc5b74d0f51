"""Buffers that follow from a module's options, and are in no state dict for that."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def filled_again(buffer: Tensor, values: Tensor, device: torch.device) -> Tensor:
    """The buffer with its values, for hooks of ``load_state_dict``: in a model that was built on
    the meta device, ``to_empty`` leaves in it whatever the memory held.

    Args:
        buffer: filled in place, but on the meta device, where it stays after a state dict has been
            loaded with ``assign=True``.
        values: of its shape; cast to its dtype.
        device: of what takes the place of a buffer on the meta device.
    """
    if buffer.is_meta:
        return values.to(device, buffer.dtype)
    return buffer.copy_(values)
