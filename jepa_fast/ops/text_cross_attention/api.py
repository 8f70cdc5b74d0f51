"""The public function `text_cross_attention`, and statistics of its attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jepa_fast.ops._autocast import without_autocast
from jepa_fast.ops._autograd import OperatorFunction, applied, differentiable_once
from jepa_fast.ops._checks import (
    check_choice,
    check_dim,
    check_integer,
    check_mask,
    check_positive,
    check_same_size,
    check_vectors,
)
from jepa_fast.ops.text_cross_attention import contract, reference

SIMILARITIES = ("relu", "softplus")
MOST_CAPTIONS = 256  # the winning caption of "max" is kept in one byte


class _TextCrossAttention(OperatorFunction):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, residual: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return contract.FORWARD.call(q, k, v, residual, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, _, word_mask, caption_mask, token_mask, *ctx.options = inputs
        winner = output[2]
        ctx.mark_non_differentiable(winner)
        ctx.save_for_backward(winner, q, k, v, word_mask, caption_mask, token_mask)

    @staticmethod
    @differentiable_once("text_cross_attention")
    def backward(
        ctx: Any, saved: Any, grad_features: Tensor, grad_sparsity: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        grads = contract.BACKWARD.call(grad_features, grad_sparsity, *saved, *ctx.options)
        every_caption = grad_features.ndim == 4
        grad_residual = grad_features.sum(1) if every_caption else grad_features
        return *grads, grad_residual, *[None] * 9


def text_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor,
    word_mask: Tensor | None = None,
    caption_mask: Tensor | None = None,
    num_heads: int = 1,
    scale: float | None = None,
    pool: str = "max",
    token_mask: Tensor | None = None,
    similarity: str = "relu",
    tau: float = 0.1,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attends from every token to the words of each caption on its own, then pools the captions.

    `y_n = residual + softmax(scale * q k_n^T) v_n` for caption n; the features are the elementwise
    maximum or the mean over n, or all of them. The sparsity term is the mean, over heads and over
    pairs of token and caption, of `sum_w O[w]` with `O = relu(cos(q, k_n[w]))`.

    Row r of `q` and `residual` belongs to image `r % B` (block-major), so that all M sequences of
    an image share its keys and values. Words that are masked, and captions that are masked or have
    no words, enter nothing. An image without captions passes `residual` through and does not count
    in the sparsity.

    Args:
        q: [R, T, d] queries, R a multiple of B; any strides, as for all tensors here.
        k: [B, C, S, d] keys, at least one caption and one word.
        v: [B, C, S, d] values. `q`, `k` and `v` share a floating dtype.
        residual: [R, T, d], of any floating dtype.
        word_mask: [B, C, S] bool, False at padding; None: every word is there.
        caption_mask: [B, C] bool, False at padding; None: every caption is there.
        num_heads: h, a divisor of d; a head has width e = d / h.
        scale: positive and finite; the default is `1 / sqrt(e)`. In a cosine vectors shorter than
            1e-8 count as this long, and queries are measured with their scale: one that makes them
            so short lowers the sparsity term.
        pool: `"max"` (ties: the lowest caption), `"mean"`, or `"none"`.
        token_mask: [R, T] bool, False at tokens that do not count in the sparsity; None: all do.
        similarity: `"relu"`, or `"softplus"` for `O = softplus(cos / tau)`, which has a gradient
            where every cosine is negative.
        tau: positive and finite.
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`.

    Returns:
        Features [R, T, d], or [R, C, T, d] for `pool="none"` (`residual` where there is no
        caption), in the dtype of `residual`; and the sparsity term, a scalar in float32 (float64
        for float64 queries). Everything is computed in float32 or wider.

    Raises:
        TypeError: a mask is not bool; `q`, `k` and `v` differ in dtype; they or `residual` are not
            dense floating tensors (of more than a byte a number); `num_heads` is no integer;
            `scale` or `tau` is no number. A tensor is none: multiply `q` by what is learned.
        ValueError: a shape does not fit, an unknown name, a scale or `tau` that is not positive and
            finite, more than 256 captions for `"max"`.
        BackendError: the requested backend cannot serve the call.

    Source: TC-JEPA, arXiv 2605.03245, the text conditioner and its sparsity regulariser.
    """
    op = "text_cross_attention"
    check_words(op, "q", q, "k", k, word_mask, caption_mask, token_mask, num_heads)
    check_values(op, ("q", q), ("k", k), ("v", v), ("residual", residual))
    check_choice(op, "pool", pool, reference.POOLS)
    check_similarity(op, similarity, tau)
    scale = checked_scale(op, scale)
    if pool == "max" and k.shape[1] > MOST_CAPTIONS:
        raise ValueError(
            f"{op}: pool='max' takes at most {MOST_CAPTIONS} captions, got {k.shape[1]}; sample "
            "fewer"
        )
    features, sparsity, _ = applied(
        _TextCrossAttention,
        q, k, v, residual, word_mask, caption_mask, token_mask,
        num_heads, scale, pool, similarity, tau, backend,
    )  # fmt: skip
    return features, sparsity


def attention_statistics(
    q: Tensor,
    k: Tensor,
    word_mask: Tensor | None = None,
    caption_mask: Tensor | None = None,
    num_heads: int = 1,
    scale: float | None = None,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How alive a text attention is. Plain PyTorch without gradient, waits for no device.

    Looks at some tokens after the other, so that no more than 2**20 scores are there at a time.

    Args: as for `text_cross_attention`.

    Returns:
        The share of patch-word cosines that are positive (near 0: `relu` similarities are dead),
        and the mean entropy of the attention as a share of its maximum, the logarithm of the
        caption's number of words (near 1: attention is uniform; captions of one word count as 1).
        Two scalars, 0 where no image has a caption.

    Raises:
        TypeError, ValueError: as `text_cross_attention`.
    """
    check_words(
        "attention_statistics", "q", q, "k", k, word_mask, caption_mask, token_mask, num_heads
    )
    scale = checked_scale("attention_statistics", scale)
    if k.dtype != q.dtype:
        raise TypeError(
            f"attention_statistics: q and k must have one dtype, got {q.dtype} and {k.dtype}; "
            "convert one of them"
        )
    with without_autocast(q):
        return reference.attention_statistics(
            q.detach(), k.detach(), word_mask, caption_mask, token_mask, num_heads, scale
        )


def check_words(
    op: str,
    query: str,
    q: Tensor,
    key: str,
    k: Tensor,
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    token_mask: Tensor | None,
    num_heads: int,
) -> None:
    """Raises unless queries [R, T, d], keys [B, C, S, d] and their masks fit each other."""
    for argument, tensor, dims, layout in (
        (query, q, 3, "[R, T, d]"),
        (key, k, 4, "[B, C, S, d]"),
    ):
        check_dim(op, argument, tensor, dims, layout)
        check_vectors(op, argument, tensor)
    check_same_size(op, query, q, 2, key, k, 3)
    batch, captions, words, width = k.shape
    if captions < 1 or words < 1:
        raise ValueError(
            f"{op}: {key} must hold at least one caption and one word, got shape {list(k.shape)}; "
            "pad with masked ones"
        )
    if q.shape[0] % max(batch, 1) or (batch == 0 and q.shape[0] > 0):
        raise ValueError(
            f"{op}: {query}.shape[0] must be a multiple of the {batch} images of {key} "
            f"(block-major rows), got {q.shape[0]}"
        )
    if width < 1:
        raise ValueError(
            f"{op}: {query} must have a width of at least 1, got shape {list(q.shape)}"
        )
    check_integer(op, "num_heads", num_heads)
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"{op}: num_heads must be a positive divisor of the width {width}, got {num_heads}"
        )
    for argument, mask, shape in (
        ("word_mask", word_mask, k.shape[:3]),
        ("caption_mask", caption_mask, k.shape[:2]),
        ("token_mask", token_mask, q.shape[:2]),
    ):
        if mask is not None:
            check_mask(op, argument, mask, shape)


def check_values(
    op: str,
    query: tuple[str, Tensor],
    key: tuple[str, Tensor],
    value: tuple[str, Tensor],
    residual: tuple[str, Tensor],
) -> None:
    """Raises unless values and residual, named, fit the keys and queries of `check_words`."""
    for (argument, tensor), (like, other) in ((residual, query), (value, key)):
        check_vectors(op, argument, tensor)
        if tensor.shape != other.shape:
            raise ValueError(
                f"{op}: {argument} must have the shape of {like}, {list(other.shape)}, "
                f"got {list(tensor.shape)}"
            )
    q, k, v = query[1].dtype, key[1].dtype, value[1].dtype
    if not q == k == v:
        raise TypeError(
            f"{op}: {query[0]}, {key[0]} and {value[0]} must have one dtype, got {q}, {k} and {v}; "
            "convert them first"
        )


def checked_scale(op: str, scale: float | None) -> float | None:
    """`scale` as a float, or None. Raises unless it is None or a positive and finite number."""
    if scale is None:
        return None
    check_positive(op, "scale", scale, learned="multiply q by it and pass scale=1.0")
    return scale if isinstance(scale, float) else float(scale)  # symbolic ones are floats


def check_similarity(op: str, similarity: str, tau: float) -> None:
    """Raises for an unknown similarity, or a `tau` that is no positive and finite number."""
    check_choice(op, "similarity", similarity, SIMILARITIES)
    check_positive(op, "tau", tau)
