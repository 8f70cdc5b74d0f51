"""Multi-block masks in plain PyTorch. This is the specification, to the last bit.

Block `m` of an image is placed by draw number `attempt * (M + 1) + m` of the stream
`fold(fold(fold(0, seed), step), sample id)`: its upper 32 bits give the top row, its lower 32 bits
the left column. The context is block M. A layout that leaves too little context is drawn again, as
a whole, up to `TRIES * M` times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa_fast.ops import _random

TRIES = 20
"""Layouts drawn before one more target block must share the place of another."""

Size = Sequence[int]  # patches: height, width


def most_context(grid: Size, target_size: Size, context_size: Size, allow_overlap: bool) -> int:
    """Patches of the largest context that a layout can leave: all targets opposite to it."""
    context = context_size[0] * context_size[1]
    if allow_overlap:
        return context
    rows = max(context_size[0] + target_size[0] - grid[0], 0)
    return context - rows * max(context_size[1] + target_size[1] - grid[1], 0)


def slots(
    grid: Size,
    target_size: Size,
    context_size: Size,
    max_context: int | None,
    allow_overlap: bool,
) -> int:
    """How long a context can be, whatever is drawn: `Kc` of the outputs."""
    most = most_context(grid, target_size, context_size, allow_overlap)
    return most if max_context is None else min(most, max_context)


def draw_block_masks(
    sample_ids: Tensor,
    seed: int,
    step: int,
    grid: Size,
    num_targets: int,
    target_size: Size,
    context_size: Size,
    min_context: int,
    max_context: int | None,
    allow_overlap: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Context `[B, Kc]`, which of it is real, its lengths `[B]`, and targets `[B, M, Kt]`."""
    device, width = sample_ids.device, grid[1]
    sizes = torch.tensor([target_size] * num_targets + [context_size], device=device)
    step_key = _random.fold(_random.fold(0, seed), step)
    keys = _random.folded(_random.signed(step_key), sample_ids)

    corners = _place(keys, 0, grid, sizes)
    context = _context(corners, grid, sizes, allow_overlap)
    for attempt in range(1, TRIES * num_targets + 1):
        again = (context.sum(dim=1) < min_context).nonzero()[:, 0]
        if not len(again):
            break
        corners[again] = _place(keys[again], attempt, grid, sizes)
        context[again] = _context(corners[again], grid, sizes, allow_overlap)
    if max_context is not None:
        context &= _nearest_to_a_side(keys, context, grid, max_context)

    rows = torch.arange(target_size[0], device=device)[:, None] * width
    block = (rows + torch.arange(target_size[1], device=device)).flatten()
    first = corners[:, :-1, 0] * width + corners[:, :-1, 1]
    targets = first[:, :, None] + block
    length = context.sum(dim=1)
    most = slots(grid, target_size, context_size, max_context, allow_overlap)
    real = torch.arange(most, device=device) < length[:, None]
    index = torch.zeros(real.shape, dtype=torch.int64, device=device)
    index[real] = context.nonzero()[:, 1]  # both in order of images, then of patches
    return index, real, length, targets


def _place(keys: Tensor, attempt: int, grid: Size, sizes: Tensor) -> Tensor:
    """`[B, M + 1, 2]`, the top left patches (row, column) of all blocks."""
    blocks = len(sizes)
    num_targets = blocks - 1
    counters = attempt * blocks + torch.arange(blocks, device=keys.device)
    draws = _random.draws(keys[:, None], counters)
    last = torch.tensor(grid, device=keys.device) - sizes
    distinct = num_targets - attempt // TRIES
    if distinct:
        halves = torch.stack([draws >> 32, draws], dim=2) & 0xFFFFFFFF
        corners = halves * (last + 1) >> 32
        source = torch.arange(num_targets, device=keys.device) % distinct
        corners[:, :-1] = corners[:, source]
        return corners
    # All targets in one corner of the grid, the context in the opposite one.
    is_context = torch.arange(blocks, device=keys.device) == num_targets
    at_bottom = (draws[:, :1] < 0) ^ is_context
    at_right = (draws[:, :1] & 1 == 1) ^ is_context
    return torch.stack([at_bottom, at_right], dim=2) * last


def _context(corners: Tensor, grid: Size, sizes: Tensor, allow_overlap: bool) -> Tensor:
    """`[B, H * W]` bool, True for the context patches."""
    y = torch.arange(grid[0], device=corners.device)[:, None]
    x = torch.arange(grid[1], device=corners.device)

    def covers(block: int) -> Tensor:
        top, left = corners[:, block, 0, None, None], corners[:, block, 1, None, None]
        height, width = sizes[block]
        return ((y >= top) & (y < top + height)) & ((x >= left) & (x < left + width))

    num_targets = len(sizes) - 1
    context = covers(num_targets)
    if not allow_overlap:
        for block in range(num_targets):
            context &= ~covers(block)
    return context.flatten(1)


def _nearest_to_a_side(keys: Tensor, context: Tensor, grid: Size, count: int) -> Tensor:
    """`[B, H * W]` bool, True for the `count` context patches nearest to a side: top, bottom,
    left or right by the upper two bits of draw 0 of the image's sub-stream -1."""
    height, width = grid
    patches = torch.arange(height * width, device=keys.device)
    by_row, by_column = patches, patches % width * height + patches // width
    last = height * width - 1
    from_side = torch.stack([by_row, last - by_row, by_column, last - by_column])
    side = _random.shifted(_random.draws(_random.folded(keys, torch.full_like(keys, -1)), 0), 62)
    order = torch.where(context, from_side[side], height * width)
    kept = order.argsort(dim=1)[:, :count]
    return torch.zeros_like(context).scatter_(1, kept, True)
