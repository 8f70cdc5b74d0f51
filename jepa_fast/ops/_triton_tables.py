"""Tables that Triton kernels read: with addresses in one, a launch serves hundreds of tensors.

Most of what is in them does not change from step to step, so a table is made once and then found
again. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from jepa_fast.ops._checks import KERNEL_DTYPES


def place(
    op: str, rows: Sequence[Sequence[float]], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """[rows, columns] on the device.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would read a copy's source at replays.
    """
    table = torch.tensor(rows, dtype=dtype, device="cpu")
    if device.type != "cuda":
        return table.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op}: the Triton kernel needs one call with the same tensors before a CUDA graph "
            f"captures it, to place its table of addresses; or use backend='cuda'"
        )
    return table.pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=256)
def placed(
    op: str,
    rows: tuple[tuple[float, ...], ...],
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """As `place`, once for the same rows."""
    return place(op, rows, device, dtype)


@functools.lru_cache(maxsize=256)
def chunks(op: str, sizes: tuple[int, ...], chunk: int, device: torch.device) -> Tensor:
    """[chunks, 2] int64 on the device: number of a size, and the chunk's first element."""
    cut = [(i, first) for i, size in enumerate(sizes) for first in range(0, size, chunk)]
    return place(op, cut, device)


_CAPTURED: list[Tensor] = []
"""Tables that CUDA graphs read at every replay, so that they are never freed."""


def keep(table: Tensor) -> Tensor:
    """The table, whose memory stays until launches that are about to be made have read it."""
    if table.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            _CAPTURED.append(table)
        else:
            table.record_stream(torch.cuda.current_stream())
    return table


def scalar(number: Tensor, device: torch.device) -> Tensor:
    """[1] on the device: a number from the CPU in float64 or int64, one that is there as it is."""
    if number.device.type == "cpu":
        dtype = torch.float64 if number.is_floating_point() else torch.int64
        return torch.full((1,), number.item(), dtype=dtype, device=device)
    if number.is_floating_point() and number.dtype not in KERNEL_DTYPES:
        number = number.float()
    return number.view(1)
