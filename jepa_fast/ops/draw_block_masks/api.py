"""The public function `draw_block_masks`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa_fast.ops import _checks
from jepa_fast.ops.draw_block_masks import contract, reference


def draw_block_masks(
    sample_ids: Tensor,
    seed: int,
    step: int,
    grid: Sequence[int],
    num_targets: int,
    target_size: Sequence[int],
    context_size: Sequence[int],
    min_context: int = 1,
    max_context: int | None = None,
    allow_overlap: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws multi-block masks, a pure function of (seed, step, sample id) and of the sizes.

    An image gets `M = num_targets` target blocks and a context block without the target patches,
    each uniform over all places in the grid. A layout with fewer than `min_context` context patches
    is drawn again, as a whole; after every 20 such failures one more target block takes the place
    of another, and at last all of them lie in the corner opposite to the context.

    Args:
        sample_ids: `[B]` int64, a number that stays with each image.
        seed: in `[0, 2**63)`.
        step: of the training, in `[0, 2**63)`.
        grid: `(H, W)` patches of an image.
        num_targets: target blocks an image.
        target_size: `(height, width)` of a target block in patches; `Kt` is their product.
        context_size: of the context block, before the targets are removed.
        min_context: fewest context patches of an image, counted before `max_context` cuts.
        max_context: most context patches that an image keeps: those nearest to one of its four
            sides, drawn for every image; None keeps all.
        allow_overlap: leave the target patches in the context.
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`; "cuda" and "cpu" take grids of up to
            128 patches a side.

    Returns:
        On the device of `sample_ids`, without the host waiting for it unless the reference runs:

        - context, `[B, Kc]` int64: patches in raster order, 0 behind the last. `Kc` is the most
          that any layout of these sizes can leave, and `max_context` at most;
        - which of it is real, `[B, Kc]` bool;
        - lengths of the contexts, `[B]` int64;
        - targets, `[B, M, Kt]` int64: the patches of each block in raster order.

        All backends return the same bits.

    Raises:
        TypeError: `sample_ids` is no int64 tensor, or a number is no int.
        ValueError: a shape other than `[B]`, a number out of range, a block larger than the grid,
            or a `min_context` that no layout of these sizes can leave.
        BackendError: the requested backend cannot serve the call.

    Source: the multi-block masks of I-JEPA, arXiv 2301.08243, section 3.
    """
    _checks.check_dim(_OP, "sample_ids", sample_ids, 1, "[B]")
    if sample_ids.dtype != torch.int64:
        raise TypeError(
            f"{_OP}: sample_ids must be int64, got {sample_ids.dtype}; use sample_ids.long()"
        )
    _check_number("seed", seed, 0)
    _check_number("step", step, 0)
    _check_number("num_targets", num_targets, 1)
    _check_number("min_context", min_context, 1)
    if max_context is not None:
        _check_number("max_context", max_context, min_context)
    _checks.check_flag(_OP, "allow_overlap", allow_overlap)
    _check_size("grid", grid, None)
    _check_size("target_size", target_size, grid)
    _check_size("context_size", context_size, grid)
    most = reference.most_context(grid, target_size, context_size, allow_overlap)
    if most < min_context:
        fixes = "" if allow_overlap else ", lower target_size, or set allow_overlap=True"
        raise ValueError(
            f"{_OP}: min_context must be at most {most}, what a context of "
            f"{_times(context_size)} on a grid of {_times(grid)} can be left with, got "
            f"{min_context}; lower min_context, raise context_size{fixes}"
        )
    return contract.DRAW.call(
        sample_ids, seed, step, grid, num_targets, target_size, context_size, min_context,
        max_context, allow_overlap, backend,
    )  # fmt: skip


_OP = "draw_block_masks"


def _check_number(argument: str, value: int, least: int) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{_OP}: {argument} must be an int, got {type(value).__name__}; use int()")
    if not least <= value < 1 << 63:
        raise ValueError(f"{_OP}: {argument} must be in [{least}, 2**63), got {value}")


def _check_size(argument: str, size: Sequence[int], grid: Sequence[int] | None) -> None:
    if not isinstance(size, (tuple, list)):
        got = type(size).__name__
        raise TypeError(f"{_OP}: {argument} must be a tuple (height, width), got {got}")
    if len(size) != 2:
        raise ValueError(f"{_OP}: {argument} must be (height, width), got {tuple(size)}")
    for value in size:
        _check_number(f"{argument}'s sides", value, 1)
    if grid is not None and (size[0] > grid[0] or size[1] > grid[1]):
        raise ValueError(
            f"{_OP}: {argument} must fit into the grid of {_times(grid)}, got {_times(size)}"
        )


def _times(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
