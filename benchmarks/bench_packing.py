"""I-JEPA's training step on contexts of different lengths: cut, padded or packed.

All providers see the same images and, in turn, the same batches of drawn masks, whose block sizes
differ by step as in a run; they differ in what becomes of contexts of different lengths:

- `truncated`: cut to the shortest of the batch, as the public collator does;
- `padded`: padded to the longest of the batch, and masked;
- `padded_static`: padded to the longest that can be drawn, so that every step has that length;
- `ours`: packed, to a fixed number of tokens;
- `packed_to_fit`: packed, to the tokens that the batch has, another number in every step.

`truncated` does less than the others, whose losses and gradients are the same: it is timed as a
variant, and the record has the context tokens of an image beside the times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from bench_step import (
    Step,
    assert_as_accurate,
    assert_same_loss,
    host_memory,  # noqa: F401  pytest finds it here
    make_model,
    networks,
    seeded,
)
from cases import PACKING_STEPS, Computed, packing_step_cost, packing_step_flops
from plain import TOLERANCE
from torch import Tensor

from jepa_fast.masks import BlockMasks, BlockMaskSampler, PackedMasks, pack_masks, packing_budget
from jepa_fast.nn.packed import Sequences, choose_backend
from jepa_fast.perf import Case, Race, benchmark

_SEED = 0
_CHECKED_IMAGES = 4
Masks = BlockMasks | PackedMasks


@benchmark(PACKING_STEPS)
def bench_packing_step(case: Case, device: str) -> Race:
    """I-JEPA on contexts of different lengths."""
    drawn = [draw(case, step) for step in range(case["batches"])]
    arranged = arrangements(case)
    made = {name: [arrange(masks) for masks in drawn] for name, arrange in arranged.items()}
    images = _images(case).to(device)
    model = make_model(_as_ijepa(case), device)
    steps: dict[str, Any] = {
        name: Step(
            case, device, copy.deepcopy(model), Batches(images, [each.to(device) for each in masks])
        )
        for name, masks in made.items()
    }
    numbers = {name: _numbers(case, masks, device) for name, masks in made.items()}

    def check() -> None:
        for name, step in steps.items():
            want = steps["padded"].first_loss
            if name != "truncated" and step.first_loss is not None and want is not None:
                assert_same_loss(name, step.first_loss, want, case.dtype)
        check_packing(case, device)

    return Race(
        ours=steps["ours"],
        others={name: steps[name] for name in ("padded", "padded_static")},
        check=check,
        cost=packing_step_cost(
            round(numbers["ours"]["step_flops"] * case["B"]),
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            taught=sum(p.numel() for p in networks(model)[0].parameters()),
        ),
        backend="auto",
        variants={name: steps[name] for name in ("truncated", "packed_to_fit")},
        numbers=numbers,
    )


# What becomes of the contexts.


def arrangements(case: Case) -> dict[str, Callable[[BlockMasks], Masks]]:
    """By provider: masks as they are drawn, padded to the longest, to what it takes."""
    sampler = _sampler(case)
    budget = packing_budget(sampler, case["B"])
    return {
        "ours": lambda masks: _one_pack(masks, *budget),
        "truncated": truncated,
        "padded": lambda masks: masks,
        "padded_static": lambda masks: padded_to(masks, sampler.longest_context),
        "packed_to_fit": lambda masks: _one_pack(masks, int(_lengths(masks).sum()) + 1),
    }


def truncated(masks: BlockMasks) -> BlockMasks:
    """Every context's first patches, as many as the shortest has."""
    shortest = int(_lengths(masks).min())
    return replace(masks, context=masks.context[:, :shortest].contiguous(), context_mask=None)


def padded_to(masks: BlockMasks, length: int) -> BlockMasks:
    """Contexts of so many slots."""
    more = (0, length - masks.context.shape[1])
    mask = F.pad(masks.filled(), more)
    return replace(masks, context=F.pad(masks.context, more), context_mask=mask)


def _one_pack(masks: BlockMasks, *budget: int) -> PackedMasks:
    # The budget is of steps that include those raced here, so none of them needs a second pack.
    (pack,) = pack_masks(masks, *budget)
    return pack


def _lengths(masks: BlockMasks) -> Tensor:
    return masks.filled().sum(1)


# What goes into a step.


@dataclass
class Batches:
    """The same images with the next masks at every step, in place of `bench_step.Inputs`."""

    images: Tensor
    masks: Sequence[Masks]
    _next: int = 0

    def arguments(self) -> dict[str, Any]:
        """What the model is called with."""
        masks = self.masks[self._next]
        self._next = (self._next + 1) % len(self.masks)
        return {"images": self.images, "masks": masks}


def _sampler(case: Case) -> BlockMaskSampler:
    side = case["pixels"] // case["patch"]
    return BlockMaskSampler(side, case["M"], min_context=case["Kmin"], seed=_SEED)


def draw(case: Case, step: int) -> BlockMasks:
    return _sampler(case)(step, case["B"])


def _images(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(case["B"], 3, case["pixels"], case["pixels"], generator=generator)


def _as_ijepa(case: Case) -> Case:
    return replace(case, operator="ijepa_step")


# What a step takes.


def _numbers(case: Case, masks: Sequence[Masks], device: str) -> dict[str, float]:
    """Context tokens and flops an image, means over the batches."""
    images = case["B"]
    found = []
    for each in masks:
        computed = computed_of(case, each, device)
        flops = packing_step_flops(case, computed)
        found.append(
            {
                "context_tokens_used": _used(each) / images,
                "context_tokens_computed": computed.context / images,
                **{f"{name}_flops": value / images for name, value in flops.items()},
            }
        )
    return {name: fmean(each[name] for each in found) for name in found[0]}


def _used(masks: Masks) -> int:
    if isinstance(masks, PackedMasks):
        return int(masks.context_offsets[-2])
    return int(_lengths(masks).sum())


def computed_of(case: Case, masks: Masks, device: str) -> Computed:
    """What a step on such masks works on."""
    images, blocks, patches = masks.targets.shape
    predictions = images * blocks * patches
    if isinstance(masks, PackedMasks):
        context = Sequences(masks.context_offsets, len(masks.context), masks.longest)
        both = masks.longest + patches
        predictor = Sequences(masks.predictor_offsets, len(masks.predictor), both)
        pairs = _pairs(predictor, case, "d", "predictor_heads", device)
        return Computed(
            context=context.tokens,
            context_pairs=_pairs(context, case, "D", "heads", device),
            predictor=predictor.tokens,
            predictor_pairs=pairs,
            last_pairs=pairs,
            predictions=predictions,
        )
    slots = masks.context.shape[1]
    both = slots + patches
    return Computed(
        context=images * slots,
        context_pairs=images * slots**2,
        predictor=images * blocks * both,
        predictor_pairs=images * blocks * both**2,
        last_pairs=predictions * both,
        predictions=predictions,
    )


def _pairs(sequences: Sequences, case: Case, width: str, heads: str, device: str) -> int:
    """Queries and keys that packed attention multiplies, by the backend that it has there."""
    dtype = getattr(torch, case.dtype)
    query = torch.empty(1, case[heads], case[width] // case[heads], device=device, dtype=dtype)
    if choose_backend(query) == "sdpa":  # which pads
        return (len(sequences.offsets) - 2) * (sequences.longest + 1) ** 2
    offsets, _ = sequences.bounded_offsets()
    return int(offsets.long().diff().square().sum())


# Whether it is right.


def check_packing(case: Case, device: str) -> None:
    """Loss and gradients of packed and padded steps against the padded one, on some images.

    All are judged by the padded step in float64.

    Raises:
        AssertionError: one is off.
    """
    case = replace(case, sizes={**case.sizes, "B": min(case["B"], _CHECKED_IMAGES)})
    images, drawn = _images(case).to(device), draw(case, 0)
    model = make_model(_as_ijepa(case), device)

    def outcome(case: Case, model: Any, images: Tensor, masks: Masks) -> dict[str, Tensor]:
        batches: Any = Batches(images, [masks.to(device)])
        step = Step(case, device, model, batches)
        with seeded():
            loss = step.backward()
        grads = {n: p.grad for n, p in step.model.named_parameters() if p.grad is not None}
        return {"the loss": loss, **grads}

    made = {name: arrange(drawn) for name, arrange in arrangements(case).items()}
    del made["truncated"]
    found = {
        name: outcome(case, copy.deepcopy(model), images, masks) for name, masks in made.items()
    }
    wide = replace(case, dtype="float64")
    exact = outcome(wide, model.double(), images.double(), drawn)
    padded = found.pop("padded")
    allowed = TOLERANCE[case.dtype]
    for name, ours in found.items():
        try:
            assert_as_accurate(ours, padded, exact, loss=allowed, gradients=allowed)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
