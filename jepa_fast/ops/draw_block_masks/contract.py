"""Schema, fake and backends of `draw_block_masks`.

One operator: integers have no gradient. Seed, step and block sizes may be symbolic, so that a
compiled program need not be compiled again for every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.draw_block_masks import reference

LARGEST_SIDE = 128
"""Of a grid in the native kernels, which hold a row of patches in two 64-bit words."""


def _fake(
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
    batch = sample_ids.shape[0]
    slots = reference.slots(grid, target_size, context_size, max_context, allow_overlap)
    return (
        sample_ids.new_empty(batch, slots),
        sample_ids.new_empty(batch, slots, dtype=torch.bool),
        sample_ids.new_empty(batch),
        sample_ids.new_empty(batch, num_targets, target_size[0] * target_size[1]),
    )


def _unsupported(
    sample_ids: Tensor, seed: int, step: int, grid: list[int], *layout: Any
) -> list[str]:
    if max(grid) <= LARGEST_SIDE:
        return []
    return [f"takes grids of up to {LARGEST_SIDE} patches a side, got {grid[0]}x{grid[1]}"]


_NATIVE = Backend("jepa_fast.ops.draw_block_masks.native:draw_block_masks", _unsupported)
DRAW = Operator(
    "draw_block_masks(Tensor sample_ids, SymInt seed, SymInt step, int[] grid, int num_targets,"
    " SymInt[] target_size, SymInt[] context_size, int min_context, int? max_context,"
    " bool allow_overlap, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    backends={
        "cuda": _NATIVE,
        "cpu": _NATIVE,
        "reference": Backend(f"{reference.__name__}:draw_block_masks"),
    },
)
