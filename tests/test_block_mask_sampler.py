"""BlockMaskSampler: a pure function of (seed, step, sample id)."""

from __future__ import annotations

import copy
import hashlib
import math
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from backends import backends
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from jepa_fast.masks import (
    BlockMasks,
    BlockMaskSampler,
    MaskCollator,
    pack_masks,
    packing_budget,
)
from jepa_fast.ops import draw_block_masks
from jepa_fast.ops._registry import OPERATORS

pytestmark = pytest.mark.native


def _check(sampler: BlockMaskSampler, masks: BlockMasks) -> None:
    """What holds for all masks: whole rectangles, contexts outside them, correctly padded."""
    height, width = masks.grid
    valid = masks.context_mask
    if valid is None:
        valid = torch.ones_like(masks.context, dtype=torch.bool)
    assert masks.targets.shape[1] == sampler.num_targets
    for context, real, targets in zip(masks.context, valid, masks.targets, strict=True):
        kept = context[real].tolist()
        assert kept == sorted(set(kept))
        assert len(kept) >= sampler.min_context
        assert set(kept) <= set(range(height * width))
        assert not context[~real].any()
        for block in targets.tolist():
            rows, columns = {i // width for i in block}, {i % width for i in block}
            assert len(block) == len(set(block)) == len(rows) * len(columns)
            assert max(rows) < height
            assert len(rows) == max(rows) - min(rows) + 1
            assert len(columns) == max(columns) - min(columns) + 1
            assert block == sorted(block)
            assert sampler.allow_overlap or not set(block) & set(kept)


def _assert_same(one: BlockMasks, other: BlockMasks) -> None:
    assert torch.equal(one.context, other.context)
    assert torch.equal(one.targets, other.targets)
    assert torch.equal(one.filled(), other.filled())


_pairs = st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(lambda pair: tuple(sorted(pair)))


@settings(max_examples=80, deadline=None)
@given(
    grid=st.tuples(st.integers(3, 16), st.integers(3, 16)),
    step=st.integers(0, 2**40),
    options=st.fixed_dictionaries(
        {
            "num_targets": st.integers(1, 5),
            "target_scale": _pairs,
            "target_aspect": st.tuples(st.floats(0.2, 1), st.floats(1, 5)),
            "context_scale": _pairs,
            "context_aspect": st.tuples(st.floats(0.2, 1), st.floats(1, 5)),
            "min_context": st.integers(1, 12),
            "allow_overlap": st.booleans(),
            "seed": st.integers(0, 2**63 - 1),
        }
    ),
)
def test_any_accepted_configuration(
    grid: tuple[int, int], step: int, options: dict[str, Any]
) -> None:
    refusal = ""
    try:
        sampler = BlockMaskSampler(grid, **options)
    except ValueError as error:
        refusal = str(error)
    if refusal:  # test_only_the_infeasible_is_refused says whether rightly
        assert refusal.split(":")[0] in {"target_scale", "context_scale", "min_context"}
    else:
        _check(sampler, sampler(step, 5))


@pytest.mark.parametrize("grid", [(3, 3), (4, 4), (5, 9), (8, 8), (14, 14), (128, 128)])
def test_grids(grid: tuple[int, int]) -> None:
    sampler = BlockMaskSampler(grid, min_context=min(10, grid[0] * grid[1] // 2))
    for step in range(3):
        _check(sampler, sampler(step, 3))


@pytest.mark.parametrize("grid", [(3, 3), (3, 5), (4, 4)])
@pytest.mark.parametrize("target", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("context", [0.3, 0.6, 1.0])
def test_only_the_infeasible_is_refused(
    grid: tuple[int, int], target: float, context: float
) -> None:
    """Against all placements of a single target block: more blocks never leave more context."""

    def places(size: tuple[int, int]) -> list[set[tuple[int, int]]]:
        return [
            {(y, x) for y in range(top, top + size[0]) for x in range(left, left + size[1])}
            for top in range(grid[0] - size[0] + 1)
            for left in range(grid[1] - size[1] + 1)
        ]

    def make(min_context: int) -> BlockMaskSampler:
        return BlockMaskSampler(
            grid,
            target_scale=(target, target),
            target_aspect=(1.0, 1.0),
            context_scale=(context, context),
            min_context=min_context,
        )

    def side(scale: float) -> list[int]:
        patches = int(grid[0] * grid[1] * scale)
        return [max(1, min(n, round(patches**0.5))) for n in grid]

    contexts, targets = places(tuple(side(context))), places(tuple(side(target)))
    best = max(len(c - t) for c in contexts for t in targets)
    if best:
        sampler = make(best)
        _check(sampler, sampler(0, 20))
    message = f"min_context: expected at most {best}," if best else "target_scale: nothing is left"
    with pytest.raises(ValueError, match=message):
        make(best + 1)


# Digests of what the sampler drew before the kernels were written.
RECORDED = [
    ({"grid": (14, 14)}, "c2741a855781311a"),
    ({"grid": (3, 3), "min_context": 2}, "748f2b157d117232"),
    ({"grid": (7, 5), "seed": 2**63 - 1, "min_context": 6}, "f9ef99d1413a4c7a"),
    ({"grid": (6, 6), "allow_overlap": True}, "8d2172ff61db55b6"),
    ({"grid": (4, 4), "min_context": 11}, "0fb8239d6450ee89"),
    ({"grid": (24, 24), "target_scale": (0.5, 0.5), "context_scale": (0.5, 0.5),
      "target_aspect": (1.0, 1.0), "min_context": 189}, "2986051f304adff6"),
    ({"grid": (16, 9), "min_context": 8, "max_context": 20, "seed": 3}, "12b4ca018dbbb69e"),
    ({"grid": (9, 16), "min_context": 12, "max_context": 12, "num_targets": 7},
     "cfe0453aca2a4697"),
    ({"grid": (5, 100), "max_context": 33, "allow_overlap": True}, "3dfa28c42a8cabbf"),
    ({"grid": (128, 128)}, "f2eb5ecdc9361a57"),
    ({"grid": (40, 140), "max_context": 300}, "37a3474cdeb3dd02"),
]  # fmt: skip


@backends(OPERATORS["draw_block_masks"].backends)
@pytest.mark.parametrize(("options", "expected"), RECORDED, ids=lambda x: str(x)[:16])
def test_masks_are_those_of_the_first_version(
    options: dict[str, Any],
    expected: str,
    backend: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if max(options["grid"]) <= 128:
        monkeypatch.setenv("JEPA_FAST_BACKEND", backend)
    sampler = BlockMaskSampler(**options)
    ids = torch.tensor([0, 1, 2, 12345, 2**62, -3, 4], device=device)
    digest = hashlib.sha256()
    for step in (0, 9, 2**40):
        masks = sampler(step, ids)
        context, real = masks.context.cpu(), masks.context_mask
        tensors = [context, masks.targets.cpu()]
        if real is not None:  # on a GPU longer than the longest context
            longest = int(real.sum(1).max())
            tensors = [context[:, :longest], tensors[1], real[:, :longest].cpu()]
        for tensor in tensors:
            digest.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    assert digest.hexdigest()[:16] == expected


def _mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


GOLDEN = 0x9E3779B97F4A7C15


def _draw(key: int, counter: int) -> int:
    return _mix((key + (counter + 1) * GOLDEN) % 2**64)


def _fold(key: int, value: int) -> int:
    return _mix(key ^ _mix((value + GOLDEN) % 2**64))


def _one_image(
    sampler: BlockMaskSampler, step: int, sample_id: int
) -> tuple[list[int], list[list[int]]]:
    """Context and targets of one image, one unsigned integer at a time."""
    height, width = sampler.grid
    count = sampler.num_targets
    step_key = _fold(_fold(0, sampler.seed), step)
    sizes = [sampler._target_sizes[_draw(step_key, 0) >> 52]] * count
    sizes.append(sampler._context_sizes[_draw(step_key, 1) >> 52])
    key = _fold(step_key, sample_id % 2**64)
    for attempt in range(20 * count + 1):
        draws = [_draw(key, attempt * (count + 1) + m) for m in range(count + 1)]
        last = [(height - h, width - w) for h, w in sizes]
        distinct = count - attempt // 20
        if distinct:
            corners = [
                ((d >> 32) * (y + 1) >> 32, d % 2**32 * (x + 1) >> 32)
                for d, (y, x) in zip(draws, last, strict=True)
            ]
            corners[:count] = [corners[m % distinct] for m in range(count)]
        else:
            bottom, right = draws[0] >> 63, draws[0] & 1
            corners = [(bottom * y, right * x) for y, x in last]
            y, x = last[count]
            corners[count] = ((1 - bottom) * y, (1 - right) * x)
        blocks = [
            [y * width + x for y in range(top, top + h) for x in range(left, left + w)]
            for (top, left), (h, w) in zip(corners, sizes, strict=True)
        ]
        context = set(blocks[count])
        if not sampler.allow_overlap:
            context = context.difference(*blocks[:count])
        if len(context) >= sampler.min_context:
            break
    return sorted(context), blocks[:count]


# The last ones need many attempts: shared places, and the opposite corners.
@pytest.mark.parametrize(
    "options",
    [
        {"grid": (14, 14)},
        {"grid": (7, 5), "seed": 2**63 - 1, "min_context": 6},
        {"grid": (6, 6), "allow_overlap": True},
        {"grid": (4, 4), "min_context": 11},
        {"grid": (12, 12), "target_scale": (0.5, 0.5), "context_scale": (0.5, 0.5),
         "target_aspect": (1.0, 1.0), "min_context": 48},
        {"grid": (24, 24), "target_scale": (0.5, 0.5), "context_scale": (0.5, 0.5),
         "target_aspect": (1.0, 1.0), "min_context": 189},
    ],
    ids=lambda options: str(options["grid"]),
)  # fmt: skip
def test_integer_arithmetic(options: dict[str, Any]) -> None:
    sampler = BlockMaskSampler(**options)
    ids = [0, 1, 2, 12345, 2**62, -3, 4]
    for step in (0, 9):
        masks = sampler(step, torch.tensor(ids))
        for b, sample_id in enumerate(ids):
            context, targets = _one_image(sampler, step, sample_id)
            row = masks.context[b]
            real = row if masks.context_mask is None else row[masks.context_mask[b]]
            assert real.tolist() == context
            assert masks.targets[b].tolist() == targets
        assert (masks.context_mask is None) == sampler.allow_overlap


def test_one_number_is_a_square_grid() -> None:
    assert BlockMaskSampler(6).grid == (6, 6)


def test_masks_belong_to_the_sample_not_to_the_batch() -> None:
    sampler = BlockMaskSampler((8, 8))
    ids = torch.tensor([5, 900, 17, 2, 33])
    whole = sampler(3, ids)
    state = torch.get_rng_state()
    for order in ([4, 3, 2, 1, 0], [2], [0, 0, 1]):
        part = BlockMaskSampler((8, 8))(3, ids[order])
        assert torch.equal(part.targets, whole.targets[order])
        for b, row in enumerate(order):
            kept = part.context[b][part.context_mask[b]]
            assert torch.equal(kept, whole.context[row][whole.context_mask[row]])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sampler(3, 4).targets, sampler(3, torch.arange(4)).targets)


def test_seed_step_and_id_all_matter() -> None:
    def corners(seed: int, step: int, sample_id: int) -> tuple[Any, ...]:
        masks = BlockMaskSampler(
            (16, 16), target_scale=(0.15, 0.15), target_aspect=(1.0, 1.0), seed=seed
        )(step, torch.tensor([sample_id]))
        return tuple(masks.targets[0, :, 0].tolist())

    drawn = {corners(a, b, c) for a in range(3) for b in range(3) for c in range(3)}
    assert len(drawn) == 27


def test_positions_are_uniform_up_to_the_borders() -> None:
    sampler = BlockMaskSampler((6, 6), num_targets=1, min_context=1, target_scale=(0.25, 0.25),
                               target_aspect=(1.0, 1.0))  # fmt: skip
    masks = sampler(0, 3200)
    counts = Counter(masks.targets[:, 0, 0].tolist())
    assert set(counts) == {y * 6 + x for y in range(4) for x in range(4)}
    # Mean 200, standard deviation 13.7.
    assert all(140 < count < 260 for count in counts.values())


def test_sizes_follow_the_public_collators() -> None:
    sampler = BlockMaskSampler((14, 14))
    collator = MaskCollator(
        npred=4, enc_mask_scale=(0.85, 1.0), pred_mask_scale=(0.15, 0.2), aspect_ratio=(0.75, 1.5)
    )
    generator = torch.Generator().manual_seed(0)
    theirs = Counter(collator._block_size(generator, (0.15, 0.2), (0.75, 1.5)) for _ in range(4000))
    ours = Counter(sampler._target_sizes)
    assert set(ours) == set(theirs)
    for size, count in ours.items():
        assert abs(count / 4096 - theirs[size] / 4000) < 0.03
    drawn = {sampler(step, 1).targets.shape[2] for step in range(60)}
    assert drawn == {h * w for h, w in ours}


@pytest.mark.parametrize(("side", "patches"), [(7, 1), (14, 1), (27, 1), (28, 211), (28, 463)])
def test_a_share_of_whole_patches_is_of_so_many(side: int, patches: int) -> None:
    assert side**2 * (patches / side**2) < patches  # rounding, as of 49 * (1 / 49)
    share = patches / side**2
    sampler = BlockMaskSampler(
        side, target_scale=(share, share), target_aspect=(1.0, 1.0), min_context=1
    )
    assert sampler.largest_target == round(patches**0.5) ** 2


def test_no_images() -> None:
    masks = BlockMaskSampler((8, 8))(0, torch.zeros(0, dtype=torch.int64))
    assert masks.context.shape == (0, 0)
    assert masks.targets.shape[:2] == (0, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (0, 3)}, "grid: expected .* at least 1"),
        ({"num_targets": 0}, "num_targets: expected at least 1"),
        ({"min_context": 0}, "min_context: expected at least 1"),
        ({"target_scale": (0.3, 0.2)}, "target_scale: expected 0 < low <= high <= 1"),
        ({"context_scale": (0.5, 1.5)}, "context_scale: expected 0 < low <= high <= 1"),
        ({"target_aspect": (0.0, 1.0)}, "target_aspect: expected 0 < low <= high"),
        ({"seed": -1}, "seed: expected 0 <= seed"),
        ({"target_scale": (0.01, 0.2)}, "raise target_scale to 1/64 or more"),
        ({"context_scale": (0.1, 1.0)}, "min_context: expected at most .*context_scale"),
        ({"min_context": 50}, "beside a target block of .*lower target_scale, or set"),
        ({"target_scale": (0.95, 1.0)}, "target_scale: nothing is left of a context block of 7x7"),
        ({"context_scale": (0.1, 1.0), "allow_overlap": True}, "got 10; .*raise context_scale$"),
    ],
)
def test_infeasible_or_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockMaskSampler(**({"grid": (8, 8)} | options))


def test_bad_calls() -> None:
    sampler = BlockMaskSampler((8, 8))
    with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
        sampler(-1, 2)
    for wrong, got in (
        (torch.arange(2).float(), "torch.float32; use the images' indices"),
        ([0.5, 1.0], "torch.float32 in a list"),
        (np.array([True]), "torch.bool in a ndarray"),
        (["a"], r"list \("),
        (None, r"NoneType \("),
        ([2**70], r"list \("),
    ):
        with pytest.raises(TypeError, match=f"sample_ids: expected .* integers .* got {got}"):
            sampler(0, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sample_ids: expected at least 0, got -1"):
        sampler(0, -1)
    with pytest.raises(TypeError, match=r"step: expected an int, got float 1.0; use int\(\)"):
        sampler(1.0, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sample_ids: expected shape \[B\], got \[1, 2\]"):
        sampler(0, torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="seed: expected an int, got float"):
        BlockMaskSampler((8, 8), seed=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grid": 8.0}, TypeError, r"grid: expected an int, or two as .* got 8.0; use int\(\)"),
        ({"grid": (8.5, 8.5)}, TypeError, r"grid: expected an int, or two as .* got \(8.5, 8.5\)"),
        ({"grid": "8"}, TypeError, "grid: expected an int, or two as .* got '8'"),
        ({"grid": (1, 8, 8)}, ValueError, r"grid: expected \(height, width\) or an int"),
        ({"num_targets": 4.0}, TypeError, "num_targets: expected an int, got float 4.0"),
        ({"num_targets": None}, TypeError, "num_targets: expected an int, got NoneType"),
        ({"min_context": 9.5}, TypeError, "min_context: expected an int, got float 9.5"),
        ({"max_context": 20.0}, TypeError, "max_context: expected an int, got float 20.0"),
        ({"target_scale": 0.2}, TypeError, r"target_scale: expected a pair of .* got 0.2"),
        ({"target_scale": ("a", "b")}, TypeError, r"target_scale: expected a pair"),
        ({"target_scale": (0.1, 0.2, 0.3)}, ValueError, "target_scale: .* both finite"),
        ({"target_aspect": (1, math.inf)}, ValueError, "target_aspect: .* both finite"),
        ({"context_aspect": (math.nan, 1)}, ValueError, "context_aspect: expected 0 < low"),
        ({"allow_overlap": "no"}, TypeError, "allow_overlap: expected True or False, got 'no'"),
        ({"seed": "3"}, TypeError, "seed: expected an int, got str"),
    ],
)
def test_arguments_of_other_types(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BlockMaskSampler(**({"grid": (8, 8)} | options))


@pytest.mark.parametrize(
    "ids",
    [
        [7, 2**40, 0],
        (7, 2**40, 0),
        np.array([7, 2**40, 0]),
        np.array([7, 2**40, 0], dtype=np.uint64),
        np.array([0, 2**40, 7])[::-1],
        np.array([7, 2**40, 0], dtype=">i8"),
        torch.tensor([7, 2**40, 0], dtype=torch.uint64),
    ],
)
def test_sample_ids_in_other_forms(ids: Any) -> None:
    sampler = BlockMaskSampler((8, 8))
    _assert_same(sampler(3, ids), sampler(3, torch.tensor([7, 2**40, 0])))


@pytest.mark.parametrize(
    "option", ["grid", "num_targets", "min_context", "max_context", "allow_overlap", "seed"]
)
def test_options_stay_as_they_were(option: str) -> None:
    """A new seed drew positions alone, and a new limit of contexts lost the mask of padding."""
    sampler = BlockMaskSampler((8, 8), max_context=12)
    for each in (sampler, copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        with pytest.raises(AttributeError, match=f"{option}: .* make another BlockMaskSampler"):
            setattr(each, option, getattr(each, option))
        _assert_same(each(3, 4), BlockMaskSampler((8, 8), max_context=12)(3, 4))


def test_masks_are_on_the_cpu_whatever_the_default_device_is() -> None:
    """`torch.set_default_device("cuda")`, that is; meta tensors have no values to be right by."""
    options: dict[str, Any] = {"input_size": 64, "patch_size": 8, "enc_mask_scale": (0.85, 1.0)}

    def drawn() -> list[Tensor]:
        torch.manual_seed(0)
        sampler = BlockMaskSampler((8, 8))
        tokens, block, longest = packing_budget(sampler, 4, steps=4)
        (pack,) = pack_masks(sampler(3, 4), tokens, block, longest)
        masks = [sampler(3, [7, 9]), pack.padded()]
        _, contexts, targets = MaskCollator(**options)([torch.zeros(1, device="cpu")] * 3)
        ids = torch.arange(4, device="cpu")
        sizes = (8, 8), 2, (3, 3), (7, 7), 2, 9
        capped = draw_block_masks(ids, 0, 0, *sizes, backend="reference")
        return [*contexts, *targets, *capped, *(x for m in masks for x in (m.context, m.targets))]

    expected = drawn()
    with torch.device("meta"):
        got = drawn()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_sample_ids_in_narrow_dtypes() -> None:
    sampler = BlockMaskSampler((8, 8))
    expected = sampler(3, torch.arange(4))
    for dtype in (torch.int32, torch.int16, torch.uint8):
        _assert_same(sampler(3, torch.arange(4, dtype=dtype)), expected)
    for empty in ([], np.zeros(0, dtype=np.int32)):
        assert sampler(3, empty).targets.shape[0] == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_of_a_tensor_break_no_graph(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    sampler = BlockMaskSampler((8, 8), min_context=10, max_context=10)
    graphs = CompileCounter()
    ids = torch.tensor([3, 1], dtype=dtype)
    masks = torch.compile(lambda ids: sampler(3, ids), fullgraph=True, backend=graphs)(ids)
    assert graphs.frame_count == 1
    _assert_same(masks, sampler(3, ids))


def test_numpys_arrays_and_integers() -> None:
    assert BlockMaskSampler(np.array([8, 9]), target_scale=np.array([0.15, 0.2])).grid == (8, 9)
    theirs, mine = np.int64, int
    made = [
        BlockMaskSampler(of(8), of(3), min_context=of(9), max_context=of(20), seed=of(3))(
            of(2), of(4)
        )
        for of in (theirs, mine)
    ]
    assert torch.equal(made[0].context, made[1].context)
    assert torch.equal(made[0].targets, made[1].targets)


def test_max_context_keeps_the_patches_nearest_to_a_random_side() -> None:
    whole = BlockMaskSampler((8, 6), min_context=6)
    capped = BlockMaskSampler((8, 6), min_context=6, max_context=9)
    ids = torch.arange(400)
    all_of, some_of = whole(3, ids), capped(3, ids)
    assert all_of.context_mask is not None
    assert some_of.context_mask is not None
    assert torch.equal(some_of.targets, all_of.targets)
    _check(capped, some_of)
    lengths = all_of.context_mask.sum(1)
    assert torch.equal(some_of.context_mask.sum(1), lengths.clamp(max=9))
    sides: Counter[int] = Counter()
    for b in range(len(ids)):
        by_row = all_of.context[b][all_of.context_mask[b]].tolist()
        by_column = sorted(by_row, key=lambda patch: (patch % 6, patch))
        kept = set(some_of.context[b][some_of.context_mask[b]].tolist())
        choices = [by_row[:9], by_row[-9:], by_column[:9], by_column[-9:]]
        matching = [side for side, choice in enumerate(choices) if set(choice) == kept]
        assert matching
        if len(matching) == 1:
            sides.update(matching)
    assert min(sides[side] for side in range(4)) > 0.18 * sides.total()
    assert torch.equal(capped(3, ids[7:9]).context[0], some_of.context[7])


def test_max_context_equal_to_min_context_needs_no_padding() -> None:
    masks = BlockMaskSampler((8, 8), min_context=9, max_context=9)(0, 32)
    assert masks.context_mask is None
    assert masks.context.shape == (32, 9)
    assert BlockMaskSampler((4, 4), min_context=4, max_context=4)(0, 0).context.shape[0] == 0


def test_max_context_below_min_context_is_refused() -> None:
    with pytest.raises(ValueError, match="max_context: expected at least min_context, 10, got 9"):
        BlockMaskSampler((14, 14), max_context=9)
