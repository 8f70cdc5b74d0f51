"""MaskCollator: the public I-JEPA collator's masks, index for index."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from jepa_fast.masks import MaskCollator

# Masks that the public code drew, and a number from the global generator right after.
FROZEN = json.loads((Path(__file__).parent / "ijepa_collator_masks.json").read_text())
PAPER: dict[str, Any] = {
    "npred": 4,
    "enc_mask_scale": (0.85, 1.0),
    "pred_mask_scale": (0.15, 0.2),
    "aspect_ratio": (0.75, 1.5),
    "min_keep": 10,
}


def _at_step(collator: MaskCollator, step: int) -> MaskCollator:
    for _ in range(step):
        collator.step()
    return collator


@pytest.mark.parametrize("case", FROZEN, ids=lambda case: str(case["arguments"]))
def test_frozen_masks(case: dict[str, Any]) -> None:
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in case["arguments"].items()}
    collator = _at_step(MaskCollator(**arguments), case["step"])
    torch.manual_seed(case["seed"])
    batch, contexts, targets = collator([torch.zeros(3)] * case["batch"])
    assert batch.shape == (case["batch"], 3)
    assert [mask.tolist() for mask in contexts] == case["contexts"]
    assert [mask.tolist() for mask in targets] == case["targets"]
    assert all(mask.dtype == torch.int64 for mask in contexts + targets)
    assert torch.randint(0, 10**9, (1,)).item() == case["next_draw"]


class _Endless(Exception):
    """The described procedure would never return."""


def _described(
    height: int,
    width: int,
    batch: int,
    step: int,
    *,
    enc_mask_scale: tuple[float, float],
    pred_mask_scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
    nenc: int,
    npred: int,
    min_keep: int,
    allow_overlap: bool,
) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """The reference procedure, from its description: (contexts, targets), by block, by image."""
    generator = torch.Generator()
    generator.manual_seed(step)

    def draw_size(scale, aspect):
        u = torch.rand(1, generator=generator).item()
        keep = int(height * width * (scale[0] + u * (scale[1] - scale[0])))
        ratio = aspect[0] + u * (aspect[1] - aspect[0])
        h, w = round(math.sqrt(keep * ratio)), round(math.sqrt(keep / ratio))
        return min(h, height - 1), min(w, width - 1)

    def draw_block(size, outside_of):
        failures = 0
        while True:
            top = torch.randint(0, height - size[0], (1,)).item()
            left = torch.randint(0, width - size[1], (1,)).item()
            block = {
                y * width + x
                for y in range(top, top + size[0])
                for x in range(left, left + size[1])
            }
            dropped = failures // 20
            mask = block.difference(*outside_of[: max(len(outside_of) - dropped, 0)])
            if len(mask) > min_keep:
                return block, sorted(mask)
            failures += 1
            if dropped > len(outside_of):
                raise _Endless

    target_size = draw_size(pred_mask_scale, aspect_ratio)
    context_size = draw_size(enc_mask_scale, (1.0, 1.0))
    contexts: list[list[list[int]]] = [[] for _ in range(nenc)]
    targets: list[list[list[int]]] = [[] for _ in range(npred)]
    for _ in range(batch):
        blocks = []
        for m in range(npred):
            block, mask = draw_block(target_size, [])
            blocks.append(block)
            targets[m].append(mask)
        for n in range(nenc):
            _, mask = draw_block(context_size, [] if allow_overlap else blocks)
            contexts[n].append(mask)
    shortest = min((len(mask) for block in contexts for mask in block), default=0)
    return [[mask[:shortest] for mask in block] for block in contexts], targets


_scales = st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)).map(lambda pair: tuple(sorted(pair)))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(2, 12),
    width=st.integers(2, 12),
    batch=st.integers(1, 5),
    step=st.integers(0, 50),
    seed=st.integers(0, 2**32),
    options=st.fixed_dictionaries(
        {
            "enc_mask_scale": _scales,
            "pred_mask_scale": _scales,
            "aspect_ratio": st.tuples(st.floats(0.3, 1), st.floats(1, 3)),
            "nenc": st.integers(1, 2),
            "npred": st.integers(1, 4),
            "min_keep": st.integers(0, 8),
            "allow_overlap": st.booleans(),
        }
    ),
)
def test_as_described(
    height: int, width: int, batch: int, step: int, seed: int, options: dict[str, Any]
) -> None:
    collator = MaskCollator((height * 4, width * 4), 4, **options)
    _at_step(collator, step)
    torch.manual_seed(seed)
    try:
        expected = _described(height, width, batch, step, **options)
    except _Endless:
        with pytest.raises(ValueError, match=r"(enc|pred)_mask_scale: expected blocks of more"):
            collator([0] * batch)
        return
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    _, contexts, targets = collator([0] * batch)
    assert [mask.tolist() for mask in contexts] == expected[0]
    assert [mask.tolist() for mask in targets] == expected[1]
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_share_the_step_counter(start: str, workers: int) -> None:
    collator = MaskCollator(**PAPER)
    loader: DataLoader[int] = DataLoader(
        range(12),  # type: ignore[arg-type]
        batch_size=2,
        num_workers=workers,
        collate_fn=collator,
        multiprocessing_context=start,
    )
    lengths = Counter(targets[0].shape[1] for _, _, targets in loader)
    alone = MaskCollator(**PAPER)
    assert lengths == Counter(alone([0])[2][0].shape[1] for _ in range(6))
    assert collator.step() == 6


def test_where_the_reference_never_returns() -> None:
    small = PAPER | {"input_size": 32, "patch_size": 4}
    collator = MaskCollator(**(small | {"pred_mask_scale": (0.15, 0.15)}))
    with pytest.raises(ValueError, match=r"pred_mask_scale: .* raise pred_mask_scale, or lower"):
        collator([0])
    collator = MaskCollator(**(small | {"enc_mask_scale": (0.1, 0.1), "min_keep": 7}))
    with pytest.raises(ValueError, match=r"enc_mask_scale: .* 2x2 = 4 .* lower min_keep below 4"):
        collator([0])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="input_size: expected at least 2x2 patches"):
        MaskCollator(16)
    with pytest.raises(ValueError, match="enc_mask_scale: expected 0 < low <= high"):
        MaskCollator(enc_mask_scale=(0.5, 0.1))
    with pytest.raises(ValueError, match="aspect_ratio: expected 0 < low <= high"):
        MaskCollator(aspect_ratio=(0.0, 1.0))
    with pytest.raises(ValueError, match="batch: expected at least one sample"):
        MaskCollator()([])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_size": 224.0}, TypeError, "input_size: expected an int, or two as"),
        ({"input_size": (224, 224, 3)}, ValueError, r"input_size: expected \(height, width\)"),
        ({"patch_size": 0}, ValueError, "patch_size: expected at least 1, got 0"),
        ({"patch_size": -16}, ValueError, "patch_size: expected at least 1, got -16"),
        ({"patch_size": 16.0}, TypeError, "patch_size: expected an int, got float 16.0"),
        ({"enc_mask_scale": (1.0, 2.0)}, ValueError, "enc_mask_scale: expected .* high <= 1"),
        ({"pred_mask_scale": 0.2}, TypeError, "pred_mask_scale: expected a pair of .* got 0.2"),
        ({"aspect_ratio": (1.0, math.inf)}, ValueError, "aspect_ratio: .* both finite"),
        ({"nenc": -1}, ValueError, "nenc: expected at least 0, got -1"),
        ({"npred": -1}, ValueError, "npred: expected at least 0, got -1"),
        ({"npred": 4.0}, TypeError, "npred: expected an int, got float 4.0"),
        ({"min_keep": 4.5}, TypeError, "min_keep: expected an int, got float 4.5"),
        ({"allow_overlap": "no"}, TypeError, "allow_overlap: expected True or False, got 'no'"),
    ],
)
def test_arguments_that_would_fail_later(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MaskCollator(**options)
