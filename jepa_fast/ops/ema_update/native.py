"""The C++ and the CUDA kernel: csrc/cpu/ema_update.cpp, csrc/cuda/ema_update.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_fast.ops import _memory, _native
from jepa_fast.ops.ema_update import memory

_KERNEL = _native.define(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor(b!)[] shadows, Tensor momentum,"
    " Tensor? rounding_seed) -> ()"
)


def ema_update_(
    targets: list[Tensor],
    sources: list[Tensor],
    shadows: list[Tensor],
    momentum: Tensor,
    rounding_seed: Tensor | None,
) -> None:
    """As `reference.ema_update_`; runs on the device of the targets."""
    memory.check(targets, sources, shadows, momentum)
    if not targets:
        return
    if momentum.is_cuda and momentum.dtype not in (torch.float32, torch.float64):
        momentum = momentum.float()
    flat = _memory.Flat.of(targets, sources, shadows)
    to, by, copies = flat.lists
    with torch.cuda.device_of(targets[0]):
        _KERNEL(to, by, copies, momentum, rounding_seed)
    torch.autograd.graph.increment_version([*to, *copies])
    flat.write_back((to, copies))
