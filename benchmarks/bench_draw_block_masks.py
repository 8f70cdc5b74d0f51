"""Block masks of a batch of 224 px images: operator, sampler and collator, against a loop."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from cases import block_masks_cost, draw_block_masks_cost
from plain import backend_of
from torch import Tensor

from jepa_fast import ops
from jepa_fast.masks import BlockMasks, BlockMaskSampler, MaskCollator
from jepa_fast.ops.draw_block_masks import reference
from jepa_fast.perf import Case, Race, benchmark

_GRID = (14, 14)
_TARGETS = 4
_TARGET_SCALE, _TARGET_ASPECT, _CONTEXT_SCALE = (0.15, 0.2), (0.75, 1.5), (0.85, 1.0)
_MIN_CONTEXT = 10
_NO_COMPILE = {"compile": "how often a loop draws depends on what it draws"}
_SMALL, _BATCH = {"B": 16}, {"B": 256}
# Sizes that the sampler draws; the most context that they leave.
_TARGET, _CONTEXT = (6, 5), (13, 13)
_SIZES = {"M": _TARGETS, "Kc": 149, "Kt": 30}


@benchmark(
    [
        Case("draw_block_masks", "small", {**_SMALL, **_SIZES}, quick=True),
        Case("draw_block_masks", "256-images", {**_BATCH, **_SIZES}),
    ]
)
def bench_operator(case: Case, device: str) -> Race:
    """One step's masks, at one pair of block sizes; "reference" is ours without a kernel."""
    sample_ids = torch.arange(case["B"], device=device)
    arguments = (
        sample_ids, 0, 3, _GRID, _TARGETS, _TARGET, _CONTEXT, _MIN_CONTEXT, None, False,
    )  # fmt: skip

    def in_torch() -> tuple[Tensor, ...]:
        return reference.draw_block_masks(*arguments)

    expected = in_torch()

    def ours() -> tuple[Tensor, ...]:
        return ops.draw_block_masks(*arguments)

    def check() -> None:
        context, real, _, targets = expected
        contexts = [row[kept] for row, kept in zip(context, real, strict=True)]
        assert_masks("reference", contexts, targets, whole=True)
        for i, (got, want) in enumerate(zip(ours(), expected, strict=True)):
            assert torch.equal(got, want), f"ours: tensor {i} is not the reference's"
        _check_loop(case["B"])

    return Race(
        ours=ours,
        others={"eager": lambda: loop_masks(case["B"]), "reference": in_torch},
        check=check,
        cost=draw_block_masks_cost(case),
        backend=backend_of("draw_block_masks", *arguments),
        why_not=_NO_COMPILE,
    )


@benchmark(
    [
        Case("block_masks", "sampler-16-images", _SMALL, quick=True),
        Case("block_masks", "sampler-256-images", _BATCH),
    ]
)
def bench_sampler(case: Case, device: str) -> Race:
    """`BlockMaskSampler`, which draws where the images are, and always the same step."""
    sampler = _sampler()
    sample_ids = torch.arange(case["B"], device=device)
    first = sampler(0, sample_ids)

    def ours() -> BlockMasks:
        return sampler(0, sample_ids)

    def check() -> None:
        masks = ours()
        padded = masks.context_mask
        assert padded is not None, "ours: contexts of different lengths without their mask"
        contexts = [row[kept] for row, kept in zip(masks.context, padded, strict=True)]
        assert_masks("ours", contexts, masks.targets, whole=True)
        reversed_targets = sampler(0, sample_ids.flip(0)).targets.flip(0)
        assert torch.equal(masks.targets, reversed_targets), "ours: the order of images matters"
        _check_loop(case["B"])

    return Race(
        ours=ours,
        others={"eager": lambda: loop_masks(case["B"])},
        check=check,
        cost=block_masks_cost(case, first.context.numel() + first.targets.numel()),
        why_not=_NO_COMPILE,
    )


@functools.cache
def _sampler() -> BlockMaskSampler:
    """Making one takes longer than a batch of masks: it goes through all sizes of a block."""
    return BlockMaskSampler(_GRID, min_context=_MIN_CONTEXT)


@benchmark([Case("block_masks", "collator-256-images", _BATCH, devices=("cpu",))])
def bench_collator(case: Case, device: str) -> Race:
    """`MaskCollator`, which cuts all contexts to one length as the public code does."""
    collator = MaskCollator(
        enc_mask_scale=_CONTEXT_SCALE,
        pred_mask_scale=_TARGET_SCALE,
        aspect_ratio=_TARGET_ASPECT,
        npred=_TARGETS,
        min_keep=_MIN_CONTEXT,
    )
    images = [0] * case["B"]

    def ours() -> tuple[Tensor, Tensor]:
        _, (context,), targets = collator(images)
        return context, torch.stack(targets, 1)

    def check() -> None:
        context, targets = ours()
        assert_masks("ours", list(context), targets, whole=False)
        _check_loop(case["B"])

    context, targets = ours()
    return Race(
        ours=ours,
        others={"eager": lambda: loop_masks(case["B"])},
        check=check,
        cost=block_masks_cost(case, context.numel() + targets.numel()),
        why_not=_NO_COMPILE,
    )


def _check_loop(images: int) -> None:
    contexts, targets = loop_masks(images)
    assert_masks("eager", contexts, targets, whole=True)


def loop_masks(images: int) -> tuple[list[Tensor], Tensor]:
    """Contexts, a list of patches an image, and targets [B, M, Kt], image by image.

    One size a batch, positions an image; a context that is left with too little is drawn again,
    with all targets of its image.
    """
    uniform = float(torch.rand(()))
    target = _block_size(uniform, _TARGET_SCALE, _TARGET_ASPECT)
    context = _block_size(float(torch.rand(())), _CONTEXT_SCALE, (1.0, 1.0))
    contexts, targets = [], []
    for _ in range(images):
        while True:
            blocks = [_block(target) for _ in range(_TARGETS)]
            seen = _block(context)
            for block in blocks:
                seen = seen & ~block
            if int(seen.sum()) >= _MIN_CONTEXT:
                break
        contexts.append(seen.flatten().nonzero()[:, 0])
        targets.append(torch.stack([block.flatten().nonzero()[:, 0] for block in blocks]))
    return contexts, torch.stack(targets)


def _block_size(
    uniform: float, scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int]:
    patches = int(math.prod(_GRID) * (scale[0] + uniform * (scale[1] - scale[0])))
    ratio = aspect[0] + uniform * (aspect[1] - aspect[0])
    height, width = round(math.sqrt(patches * ratio)), round(math.sqrt(patches / ratio))
    return min(height, _GRID[0]), min(width, _GRID[1])


def _block(size: tuple[int, int]) -> Tensor:
    """[H, W] bool, True in a rectangle somewhere in the grid."""
    block = torch.zeros(_GRID, dtype=torch.bool)
    top = int(torch.randint(_GRID[0] - size[0] + 1, ()))
    left = int(torch.randint(_GRID[1] - size[1] + 1, ()))
    block[top : top + size[0], left : left + size[1]] = True
    return block


def assert_masks(name: str, contexts: Sequence[Tensor], targets: Tensor, whole: bool) -> None:
    """Raises AssertionError unless these are block masks: the draws themselves may differ.

    Args:
        name: the provider's.
        contexts: patches of each image's context.
        targets: [B, M, Kt].
        whole: contexts hold every patch of their block that is in no target.
    """
    height, width = _GRID
    least, most = (int(scale * height * width) for scale in _TARGET_SCALE)
    assert targets.shape[1] == _TARGETS, f"{name}: {targets.shape[1]} targets an image"
    patches = targets.shape[2]
    # Sides are rounded: a block is off by half a row and half a column at the most.
    slack = (height + width) / 2
    assert least - slack <= patches <= most + slack, f"{name}: targets of {patches} patches"
    rows, columns = targets // width, targets % width
    sides = (rows.amax(-1) - rows.amin(-1) + 1) * (columns.amax(-1) - columns.amin(-1) + 1)
    assert bool((sides == patches).all()), f"{name}: a target is no block"
    assert bool((targets.diff(dim=-1) > 0).all()), f"{name}: a target repeats patches"
    assert bool(((targets >= 0) & (targets < height * width)).all()), f"{name}: out of the grid"
    places = {tuple(image[:, 0].tolist()) for image in targets}
    assert len(places) > len(targets) // 2, f"{name}: images share their blocks"
    assert len(contexts) == len(targets), f"{name}: {len(contexts)} contexts"
    for context, image in zip(contexts, targets, strict=True):
        assert len(context) >= _MIN_CONTEXT, f"{name}: a context of {len(context)} patches"
        assert bool((context.diff() > 0).all()), f"{name}: a context repeats patches"
        assert not torch.isin(context, image).any(), f"{name}: a context holds targets"
        if not whole:
            continue
        r, c = context // width, context % width
        inside = torch.zeros(_GRID, dtype=torch.bool, device=targets.device)
        inside[int(r.min()) : int(r.max()) + 1, int(c.min()) : int(c.max()) + 1] = True
        inside.view(-1)[image.flatten()] = False
        assert int(inside.sum()) == len(context), f"{name}: a context has holes"
