"""The C++ and the CUDA kernel: csrc/cpu/block_masks.cpp, csrc/cuda/block_masks.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_fast.ops import _native
from jepa_fast.ops.draw_block_masks import reference

_KERNEL = _native.define(
    "draw_block_masks(Tensor sample_ids, int seed, int step, int[] grid, int num_targets,"
    " int[] target_size, int[] context_size, int min_context, bool allow_overlap, int slots)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
).default


def draw_block_masks(
    sample_ids: Tensor,
    seed: int,
    step: int,
    grid: list[int],
    num_targets: int,
    target_size: list[int],
    context_size: list[int],
    min_context: int,
    max_context: int | None,
    allow_overlap: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.draw_block_masks`; runs on the device of the ids."""
    # No context passes what the slots hold, so that they say max_context, too.
    slots = reference.slots(grid, target_size, context_size, max_context, allow_overlap)
    arguments = (
        sample_ids, seed, step, grid, num_targets, target_size, context_size, min_context,
        allow_overlap, slots,
    )  # fmt: skip
    if not sample_ids.is_cuda:
        return _KERNEL(*arguments)
    with torch.cuda.device_of(sample_ids):
        return _KERNEL(*arguments)
