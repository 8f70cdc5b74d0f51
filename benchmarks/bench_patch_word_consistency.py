"""patch_word_consistency over a predictor's layers, against all similarities in one tensor."""

from __future__ import annotations

import torch
from cases import LAYERS, patch_word_consistency_cost
from plain import backend_of, drawn_words, operator_race, values

from jepa_fast.perf import Case, Race, benchmark

_SMALL = {"B": 1, "M": 2, "T": 38, "C": 3, "S": 16, "d": 96, "L": 3}
_OPTIONS = (1, "relu", 0.1)


@benchmark(
    [
        Case("patch_word_consistency", "small", _SMALL, quick=True),
        Case("patch_word_consistency", "1-image", {**LAYERS, "B": 1}, devices=("cpu",)),
        Case("patch_word_consistency", "32-images", {**LAYERS, "B": 32}, "bfloat16", ("cuda",)),
    ]
)
def bench_patch_word_consistency(case: Case, device: str) -> Race:
    """Forward and backward, of the queries and keys of all layers."""
    layers = case["L"]
    tokens = (case["M"] * case["B"], case["T"], case["d"])
    words = (case["B"], case["C"], case["S"], case["d"])
    queries, keys = (
        [
            values(*shape, dtype=case.dtype, device=device, seed=first + layer, grad=True)
            for layer in range(layers)
        ]
        for first, shape in ((0, tokens), (layers, words))
    )
    word_mask = drawn_words(case["B"], case["C"], case["S"], device)
    return operator_race(
        case,
        device,
        patch_word_consistency_cost(case, backward=True, present=int(word_mask.sum())),
        (queries, keys, word_mask),
        backend=backend_of(
            "patch_word_consistency", queries, keys, word_mask, None, None, *_OPTIONS
        ),
        grads=[torch.ones((), device=device)],
    )
