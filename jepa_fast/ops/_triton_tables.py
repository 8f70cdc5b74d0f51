"""Tables that Triton kernels read: with addresses in one, a launch serves hundreds of tensors.

Most of what is in them does not change from step to step, so a table is made once and then found
again. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jepa_fast.ops._checks import KERNEL_DTYPES


@dataclass(frozen=True, eq=False)
class Placed:
    """A table on its way to the device.

    Args:
        table: [rows, columns].
        copied: when it has arrived; None for one that lies on a CPU.
    """

    table: Tensor
    copied: torch.cuda.Event | None = None


def place(
    op: str, rows: Sequence[Sequence[float]], device: torch.device, dtype: torch.dtype = torch.int64
) -> Placed:
    """A table for the device.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would read a copy's source at replays.
    """
    table = torch.tensor(rows, dtype=dtype, device="cpu")
    if device.type != "cuda":
        return Placed(table.to(device))
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op}: the Triton kernel needs one call with the same tensors before a CUDA graph "
            f"captures it, to place its table of addresses; or use backend='cuda'"
        )
    there = table.pin_memory().to(device, non_blocking=True)
    return Placed(there, torch.cuda.current_stream(device).record_event())


@functools.lru_cache(maxsize=256)
def placed(
    op: str,
    rows: tuple[tuple[float, ...], ...],
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> Placed:
    """As `place`, once for the same rows."""
    return place(op, rows, device, dtype)


@functools.lru_cache(maxsize=256)
def chunks(op: str, sizes: tuple[int, ...], chunk: int, device: torch.device) -> Placed:
    """[chunks, 2] int64 on the device: number of a size, and the chunk's first element."""
    cut = [(i, first) for i, size in enumerate(sizes) for first in range(0, size, chunk)]
    return place(op, cut, device)


_CAPTURED: list[Tensor] = []
"""Tables that CUDA graphs read at every replay, so that they are never freed."""


def keep(placed: Placed) -> Tensor:
    """The table, for launches that are about to be made: on any stream they find it there, and its
    memory stays until they have read it.
    """
    table = placed.table
    if placed.copied is not None:
        if torch.cuda.is_current_stream_capturing():  # no stream is at work on what came before
            _CAPTURED.append(table)
        else:
            stream = torch.cuda.current_stream(table.device)
            stream.wait_event(placed.copied)
            table.record_stream(stream)
    return table


def scalar(number: Tensor, device: torch.device) -> Tensor:
    """[1] on the device: a number from the CPU in float64 or int64, one that is there as it is."""
    if number.device.type == "cpu":
        dtype = torch.float64 if number.is_floating_point() else torch.int64
        return torch.full((1,), number.item(), dtype=dtype, device=device)
    if number.is_floating_point() and number.dtype not in KERNEL_DTYPES:
        number = number.float()
    return number.view(1)
