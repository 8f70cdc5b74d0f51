"""text_cross_attention at TC-JEPA's shapes, against all scores at once and torch's attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from cases import CAPTIONS, text_cross_attention_cost
from plain import PLAIN, Other, backend_of, drawn_words, operator_race, values
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

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
    others = {"sdpa": Other(_sdpa, exact=_features)}
    if why := _why_no_flex_attention(device, arguments):
        why_not = {"flex_attention": why}
    else:
        others["flex_attention"] = Other(_compiled_flex_attention, exact=_features)
        why_not = {}
    return operator_race(
        case,
        device,
        text_cross_attention_cost(case, backward, int(word_mask.sum())),
        arguments,
        backend=backend_of("text_cross_attention", *arguments, *_MASKS, *_OPTIONS),
        grads=grads if backward else [],
        others=others,
        why_not=why_not,
    )


def _features(*arguments: Tensor) -> Tensor:
    return PLAIN["text_cross_attention"](*arguments)[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, residual: Tensor, word_mask: Tensor) -> Tensor:
    """torch's fused attention, captions in its batch, and a maximum over them.

    It does less than ours: it gives no scores, so that the regularisers would take another product
    of all queries and words.
    """
    mask = word_mask.flatten(0, 1)[:, None, None]
    attended = F.scaled_dot_product_attention(*_by_caption(q, k, v), mask)
    return residual + _highest(attended, q, k)


def flex_attention_features(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor,
    word_mask: Tensor,
    attend: Callable[..., Any] = flex_attention,
) -> Tensor:
    """The same by FlexAttention, which leaves missing words out; they are others in every batch."""
    by_caption = _by_caption(q, k, v)
    mask = word_mask.flatten(0, 1)

    def is_word(b: Tensor, h: Tensor, token: Tensor, word: Tensor) -> Tensor:
        return mask[b, word]

    queries, keys, _ = by_caption
    blocks = create_block_mask(
        is_word, len(queries), None, queries.shape[2], keys.shape[2], device=str(q.device)
    )
    return residual + _highest(attend(*by_caption, block_mask=blocks), q, k)


@functools.cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


def _compiled_flex_attention(*arguments: Tensor) -> Tensor:
    return flex_attention_features(*arguments, attend=_compiled())


def _why_no_flex_attention(device: str, arguments: Sequence[Tensor]) -> str:
    """Why FlexAttention cannot race; empty if it can."""
    if device == "cpu":
        return "compiled for a CPU it has no backward pass"
    try:
        _compiled_flex_attention(*arguments).sum().backward()
    except (RuntimeError, NotImplementedError, ValueError) as error:  # it takes not every width
        return str(error).strip().partition("\n")[0]
    for each in arguments:
        each.grad = None
    return ""


def _by_caption(q: Tensor, *of_words: Tensor) -> tuple[Tensor, ...]:
    """Captions in the batch: queries [B * C, 1, M * T, d], and keys or values [B * C, 1, S, d]."""
    batch, captions = of_words[0].shape[:2]
    queries = q.unflatten(0, (-1, batch)).transpose(0, 1).flatten(1, 2)
    queries = queries[:, None].expand(-1, captions, -1, -1).flatten(0, 1)
    return queries[:, None], *(x.flatten(0, 1)[:, None] for x in of_words)


def _highest(attended: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The maximum over captions, back in rows [M * B, T, d]."""
    y = attended.view(*k.shape[:2], -1, *q.shape[1:]).amax(1)  # [B, M, T, d]
    return y.transpose(0, 1).flatten(0, 1)
