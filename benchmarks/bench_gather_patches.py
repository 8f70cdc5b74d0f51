"""gather_patches at I-JEPA's shapes, against torch.gather, compiled, and index_select."""

from __future__ import annotations

import torch
from cases import VIT_L, VIT_S, gather_patches_cost
from plain import Other, backend_of, distinct_patches, drawn_patches, operator_race, values
from torch import Tensor

from jepa_fast.perf import Case, Race, benchmark

_SMALL = {"B": 32, "N": 64, "M": 1, "K": 27, "D": 384}
_CONTEXT_S = {"B": VIT_S["B"], "N": VIT_S["N"], "M": 1, "K": VIT_S["Kc"], "D": VIT_S["D"]}
_CONTEXT_L = {"B": VIT_L["B"], "N": VIT_L["N"], "M": 1, "K": VIT_L["Kc"], "D": VIT_L["D"]}
_TARGETS_L = {**_CONTEXT_L, "M": VIT_L["M"], "K": VIT_L["Kt"]}


@benchmark(
    [
        Case("gather_patches", "small", _SMALL, quick=True),
        Case("gather_patches", "context-vit-s", _CONTEXT_S, devices=("cpu",)),
        Case("gather_patches", "context-vit-l", _CONTEXT_L, "bfloat16", ("cuda",)),
        Case("gather_patches", "targets-vit-l", _TARGETS_L, "bfloat16", ("cuda",)),
    ]
)
def bench_gather_patches(case: Case, device: str) -> Race:
    """Forward and backward."""
    return _race(case, device, backward=True)


@benchmark(
    [
        Case("gather_patches", "forward-context-vit-s", _CONTEXT_S, devices=("cpu",)),
    ]
)
def bench_gather_patches_forward(case: Case, device: str) -> Race:
    """The forward pass alone."""
    return _race(case, device, backward=False)


def _race(case: Case, device: str, backward: bool) -> Race:
    batch, patches, width = case["B"], case["N"], case["D"]
    x = values(batch, patches, width, dtype=case.dtype, device=device, grad=backward)
    # The context is one list of patches an image, targets are M.
    shape = (batch, case["K"]) if case["M"] == 1 else (batch, case["M"], case["K"])
    index = drawn_patches(*shape, patches=patches, device=device)
    grad = values(*shape, width, dtype=case.dtype, device=device, seed=1)
    return operator_race(
        case,
        device,
        gather_patches_cost(case, backward, distinct_patches(index)),
        (x, index),
        backend=backend_of("gather_patches", x, index),
        grads=[grad] if backward else [],
        others={"index_select": Other(_index_select)},
    )


def _index_select(x: Tensor, index: Tensor) -> Tensor:
    """Of the rows of all images, which takes rows of the flattened batch."""
    first = torch.arange(len(x), device=x.device) * x.shape[1]
    rows = index + first.view(-1, *[1] * (index.ndim - 1))
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*index.shape, -1)
