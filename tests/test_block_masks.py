"""BlockMasks, what every sampler makes and every model takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jepa_fast.masks import BlockMasks, BlockMaskSampler, pack_masks

GRID = (3, 4)


def _masks() -> BlockMasks:
    return BlockMasks(
        torch.tensor([[0, 7, 0], [1, 2, 3]]),
        torch.tensor([[[4, 5], [5, 6]], [[8, 9], [8, 9]]]),
        torch.tensor([[True, True, False], [True, True, True]]),
        GRID,
    )


def test_target_union_is_ascending_and_padded() -> None:
    index, valid = _masks().target_union()
    assert index.tolist() == [[4, 5, 6], [8, 9, 0]]
    assert valid.tolist() == [[True, True, True], [True, True, False]]


@pytest.mark.parametrize("patch", [-1, 12])
def test_target_union_of_patches_outside_the_grid(patch: int) -> None:
    masks = dataclasses.replace(_masks(), targets=torch.full((2, 1, 1), patch))
    with pytest.raises(ValueError, match=rf"masks: targets must be in \[0, 12\), got {patch}"):
        masks.target_union()


def test_target_union_of_no_images() -> None:
    empty = torch.zeros(0, 3, dtype=torch.int64)
    index, valid = BlockMasks(empty, empty[:, None], None, GRID).target_union()
    assert index.shape == valid.shape == (0, 0)


def test_compiled_target_union_has_slots_for_the_most_there_could_be() -> None:
    union = torch.compile(BlockMasks.target_union, fullgraph=True, backend="eager")
    index, valid = union(_masks())
    want, real = _masks().target_union()
    assert index.shape == valid.shape == (2, 4)
    assert valid.tolist() == [[True, True, True, False], [True, True, False, False]]
    assert torch.equal(index[valid], want[real])
    assert not index[~valid].any()
    many = dataclasses.replace(_masks(), targets=torch.arange(12).repeat(2, 3, 1))
    assert union(many)[0].tolist() == [list(range(12))] * 2


def test_to_moves_every_tensor() -> None:
    moved = _masks().to("meta")
    assert moved.context.is_meta
    assert moved.targets.is_meta
    assert moved.context_mask is not None
    assert moved.context_mask.is_meta
    assert moved.grid == GRID
    without = dataclasses.replace(_masks(), context_mask=None)
    assert without.to("meta").context_mask is None


def test_masks_that_were_saved_come_back(tmp_path: Path) -> None:
    masks = BlockMaskSampler((6, 6), min_context=2)(0, 3)
    for each in (_masks(), masks, *pack_masks(masks, tokens=100, block=18, longest=36)):
        torch.save(each, tmp_path / "masks.pt")
        back = torch.load(tmp_path / "masks.pt")
        assert type(back) is type(each)
        for name, value in vars(each).items():
            got = getattr(back, name)
            assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value


@pytest.mark.tier3
def test_pin_memory_pins_every_tensor() -> None:
    pinned = _masks().pin_memory()
    assert pinned.context_mask is not None
    assert all(t.is_pinned() for t in (pinned.context, pinned.targets, pinned.context_mask))


def test_the_collators_pair_is_accepted() -> None:
    contexts = [torch.tensor([[0, 1], [2, 3]])]
    targets = [torch.tensor([[4], [5]]), torch.tensor([[6], [7]]), torch.tensor([[8], [9]])]
    for masks in (
        BlockMasks.from_lists(contexts, targets, GRID),
        BlockMasks.coerce((contexts, targets), GRID),
    ):
        assert torch.equal(masks.context, contexts[0])
        assert masks.targets.tolist() == [[[4], [6], [8]], [[5], [7], [9]]]
        assert masks.context_mask is None
    masks = _masks()
    assert BlockMasks.coerce(masks, GRID) is masks


def test_what_does_not_fit_is_refused() -> None:
    masks = _masks()
    one = [masks.context]
    with pytest.raises(ValueError, match=r"expected masks of a 4x4 grid, got 3x4"):
        BlockMasks.coerce(masks, (4, 4))
    with pytest.raises(TypeError, match="expected BlockMasks or the pair"):
        BlockMasks.coerce(masks.context, GRID)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got 2; use MaskCollator\(nenc=1\)"):
        BlockMasks.from_lists(one * 2, one, GRID)
    with pytest.raises(ValueError, match=r"one or more blocks .* got none"):
        BlockMasks.from_lists(one, [], GRID)
    with pytest.raises(ValueError, match=r"blocks .* of one shape"):
        BlockMasks.from_lists(one, [masks.context, masks.context[:, 1:]], GRID)
    with pytest.raises(TypeError, match="context: expected int64 patch indices"):
        BlockMasks(masks.context.int(), masks.targets, None, GRID)
    with pytest.raises(ValueError, match=r"targets: expected shape \[B, M, Kt\], got \[2, 3\]"):
        BlockMasks(masks.context, masks.context, None, GRID)
    with pytest.raises(ValueError, match="targets: expected 2 images as in context, got 1"):
        BlockMasks(masks.context, masks.targets[1:], None, GRID)
    with pytest.raises(TypeError, match="context_mask: expected bool"):
        BlockMasks(masks.context, masks.targets, masks.context, GRID)
    with pytest.raises(ValueError, match="context_mask: expected the shape of context"):
        BlockMasks(masks.context, masks.targets, masks.context_mask[:, 1:], GRID)


def test_what_is_no_tensor_and_no_grid_is_refused_by_name() -> None:
    context, targets, mask = _masks().context, _masks().targets, _masks().context_mask
    rows: Any = context.tolist()
    for error, message, arguments in (
        (TypeError, r"context: expected a tensor \[B, Kc\], got list", (rows, targets, None, GRID)),
        (
            TypeError,
            r"targets: expected a tensor \[B, M, Kt\], got ndarray",
            (context, targets.numpy(), None, GRID),
        ),
        (
            TypeError,
            "context_mask: expected a tensor or None, got ndarray",
            (context, targets, mask.numpy(), GRID),
        ),
        (TypeError, "grid: expected an int, or two", (context, targets, None, None)),
        (TypeError, "grid: expected an int, or two", (context, targets, None, (3.0, 4.0))),
        (ValueError, r"grid: expected \(height, width\)", (context, targets, None, (3,))),
        (ValueError, "grid: .* both at least 1", (context, targets, None, (-3, 4))),
    ):
        with pytest.raises(error, match=message):
            BlockMasks(*arguments)
    for grid in (4, [4, 4], np.array([4, 4])):
        assert BlockMasks(context, targets, None, grid).grid == (4, 4)
    with pytest.raises(TypeError, match=r"contexts: expected a list of tensors .* got Tensor"):
        BlockMasks.from_lists(context, [context], GRID)
    with pytest.raises(TypeError, match=r"contexts: expected a list of tensors .* got NoneType"):
        BlockMasks.from_lists(None, [context], GRID)
    with pytest.raises(TypeError, match=r"targets\[1\]: expected a tensor .* got list"):
        BlockMasks.coerce(([context], [context, rows]), GRID)
