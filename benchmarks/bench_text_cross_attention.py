"""text_cross_attention at TC-JEPA's shapes, against all scores at once and torch's attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import CAPTIONS, text_cross_attention_cost
from plain import PLAIN, Other, backend_of, drawn_words, operator_race, values
from torch import Tensor

from jepa_fast.perf import Case, Race, benchmark

_SMALL = {"B": 2, "M": 2, "T": 38, "C": 3, "S": 16, "d": 96}
_FOUR = {**CAPTIONS, "B": 4}
_MASKS = (None, None)  # of captions and of tokens: all count
_OPTIONS = (1, None, "max", "relu", 0.1)


@benchmark(
    [
        Case("text_cross_attention", "small", _SMALL, quick=True),
        Case("text_cross_attention", "4-images", _FOUR, devices=("cpu",)),
        Case("text_cross_attention", "256-images", CAPTIONS, "bfloat16", ("cuda",)),
    ]
)
def bench_text_cross_attention(case: Case, device: str) -> Race:
    """Forward and backward, the sparsity included."""
    return _race(case, device, backward=True)


@benchmark([Case("text_cross_attention", "forward-4-images", _FOUR, devices=("cpu",))])
def bench_text_cross_attention_forward(case: Case, device: str) -> Race:
    """The forward pass alone."""
    return _race(case, device, backward=False)


def _race(case: Case, device: str, backward: bool) -> Race:
    tokens = (case["M"] * case["B"], case["T"], case["d"])
    words = (case["B"], case["C"], case["S"], case["d"])
    q = values(*tokens, dtype=case.dtype, device=device, grad=backward)
    k, v = (
        values(*words, dtype=case.dtype, device=device, seed=seed, grad=backward) for seed in (1, 2)
    )
    residual = values(*tokens, device=device, seed=3, grad=backward)
    word_mask = drawn_words(case["B"], case["C"], case["S"], device)
    arguments = (q, k, v, residual, word_mask)
    grads = [values(*tokens, device=device, seed=4), torch.ones((), device=device)]
    return operator_race(
        case,
        device,
        text_cross_attention_cost(case, backward, int(word_mask.sum())),
        arguments,
        backend=backend_of("text_cross_attention", *arguments, *_MASKS, *_OPTIONS),
        grads=grads if backward else [],
        others={"sdpa": Other(_sdpa, exact=_features)},
    )


def _features(*arguments: Tensor) -> Tensor:
    return PLAIN["text_cross_attention"](*arguments)[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, residual: Tensor, word_mask: Tensor) -> Tensor:
    """torch's fused attention, captions in its batch, and a maximum over them.

    It does less than ours: it gives no scores, so that the regularisers would take another product
    of all queries and words.
    """
    batch, captions, words, width = k.shape
    queries = q.unflatten(0, (-1, batch)).transpose(0, 1).flatten(1, 2)  # [B, M * T, d]
    queries = queries[:, None].expand(-1, captions, -1, -1).flatten(0, 1)
    attended = F.scaled_dot_product_attention(
        queries[:, None],
        k.reshape(-1, 1, words, width),
        v.reshape(-1, 1, words, width),
        word_mask.reshape(-1, 1, 1, words),
    )
    y = attended.view(batch, captions, -1, *q.shape[1:]).amax(1)  # [B, M, T, d]
    return residual + y.transpose(0, 1).flatten(0, 1)
