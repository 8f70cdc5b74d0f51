"""Text cross-attention and its sparsity term, in plain PyTorch: the specification.

Sizes: B images, M sequences an image, R = M * B rows, T tokens a sequence, C captions of S words,
h heads of width e = d / h. The M sequences of an image lie side by side as P = M * T tokens, so
that its keys and values are read once and never replicated. Scores are kept as [B, h, C, S, P]: one
GEMM over all captions of an image makes them, and sums over words run along rows of tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Kernels know the pools by their places here.
POOLS = ("max", "mean", "none")
_EPSILON = 1e-8  # vectors shorter than this count as this long in a cosine
_MOST_SCORES = 2**20  # that statistics look at at once


def empty_outputs(
    q: Tensor, k: Tensor, residual: Tensor, pool: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, sparsity and winners that nobody has written yet."""
    rows, tokens, width = q.shape
    shape = (rows, k.shape[1], tokens, width) if pool == "none" else (rows, tokens, width)
    dtype = torch.promote_types(q.dtype, torch.float32)
    winner = q.new_empty(q.shape if pool == "max" else 0, dtype=torch.uint8)
    return residual.new_empty(shape), q.new_empty((), dtype=dtype), winner


def text_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor,
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    token_mask: Tensor | None,
    num_heads: int,
    scale: float | None,
    pool: str,
    similarity: str,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, sparsity, and which caption won each feature (for the backward pass of `"max"`).

    `y_n = softmax(scale * q k_n^T) v_n`, a caption n at a time; `scale` None is `1 / sqrt(e)`. The
    features are `residual + max_n y_n`, `residual + mean_n y_n`, or for `"none"` every
    `residual + y_n`.
    """
    rows, tokens, _ = q.shape
    batch = k.shape[0]
    valid = valid_words(k, word_mask, caption_mask)
    has_words = valid.any(3, keepdim=True)  # [B, 1, C, 1, 1]
    scale = score_scale(scale, q, num_heads)
    # Cosines see the scale only where a scaled query is shorter than _EPSILON: one product serves
    # the attention and the similarity.
    q = by_image(q, batch, num_heads) * scale
    k = by_head(k, num_heads, valid)
    v = by_head(v, num_heads, valid)

    scores = dot_products(q, k)
    attention = _attention(scores, valid)
    winner = scores.new_empty(0, dtype=torch.uint8)
    if pool == "max":
        y, winner = _highest(attention, v, has_words)
        winner = by_row(winner, rows, tokens)
    elif pool == "mean":
        # The sum over captions of their sums over words; a missing caption's values are zero.
        y = attention.flatten(2, 3).transpose(2, 3) @ v.flatten(2, 3)
        y = y / has_words.sum(2).clamp_min(1)
    else:
        y = attention.transpose(3, 4) @ v
        residual = residual[:, None]
    features = (residual + by_row(y, rows, tokens)).to(residual.dtype)

    weight = pair_weights(has_words, token_mask, batch, scores.shape[-1], scores.dtype)
    cosine = cosines(scores, q, k)
    sparsity = weighted(similarities(cosine, valid, similarity, tau).sum(3), weight) / num_heads
    return features, sparsity, winner


def text_cross_attention_backward(
    grad_features: Tensor,
    grad_sparsity: Tensor,
    winner: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    token_mask: Tensor | None,
    num_heads: int,
    scale: float | None,
    pool: str,
    similarity: str,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, by hand: autograd would run the whole forward pass again."""
    rows, tokens, _ = q.shape
    batch, captions = k.shape[:2]
    dtypes = (q.dtype, k.dtype, v.dtype)
    valid = valid_words(k, word_mask, caption_mask)
    has_words = valid.any(3, keepdim=True)
    scale = score_scale(scale, q, num_heads)
    q = by_image(q, batch, num_heads) * scale
    k = by_head(k, num_heads, valid)
    v = by_head(v, num_heads, valid)
    scores = dot_products(q, k)
    attention = _attention(scores, valid)

    dy = by_image(grad_features, batch, num_heads).to(scores.dtype)
    if pool == "max":
        index = by_image(winner, batch, num_heads)[:, :, None].long()
        every = dy.new_zeros(*scores.shape[:3], *dy.shape[2:])  # [B, h, C, P, e]
        dy = every.scatter_(2, index, dy[:, :, None])
    if pool == "mean":
        dy = dy / has_words.sum(2).clamp_min(1)
        dv = (attention.flatten(2, 3) @ dy).unflatten(2, (captions, -1))
        da = dot_products(dy, v)
    else:
        dv = attention @ dy
        da = v @ dy.transpose(3, 4)
    dv = dv * valid
    dscores = attention * (da - (attention * da).sum(3, keepdim=True))

    # cosine = score / (|q| |k|): once through the score, once through the lengths.
    weight = pair_weights(has_words, token_mask, batch, scores.shape[-1], scores.dtype) / num_heads
    cosine = cosines(scores, q, k)
    dcosine = _similarity_slopes(cosine, valid, similarity, tau)
    dcosine = dcosine * (grad_sparsity * weight)[:, :, :, None]
    shared = dcosine * cosine
    dscores = dscores + cosines(dcosine, q, k)
    flat = dscores.flatten(2, 3)  # [B, h, C * S, P]
    dq = flat.transpose(2, 3) @ k.flatten(2, 3)
    dq = dq - q * (shared.sum((2, 3)) * _inverse_length(q).square())[..., None]
    dk = (flat @ q).unflatten(2, (captions, -1))
    dk = dk - k * (shared.sum(4) * _inverse_length(k).square())[..., None]

    dq = by_row(dq * scale, rows, tokens)
    dk, dv = (x.movedim(1, 3).flatten(3) for x in (dk, dv))
    dq, dk, dv = (x.to(t).contiguous() for x, t in zip((dq, dk, dv), dtypes, strict=True))
    return dq, dk, dv


def attention_statistics(
    q: Tensor,
    k: Tensor,
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    token_mask: Tensor | None,
    num_heads: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Share of positive cosines; mean entropy of the attention over its maximum, `log(words)`."""
    batch = k.shape[0]
    valid = valid_words(k, word_mask, caption_mask)
    scale = score_scale(scale, q, num_heads)
    q, k = by_image(q, batch, num_heads), by_head(k, num_heads, valid)
    has_words = valid.any(3, keepdim=True)
    weight = pair_weights(has_words, token_mask, batch, q.shape[2], q.dtype) / num_heads
    words = valid.sum(3)  # [B, 1, C, 1]
    positive, relative = q.new_zeros(()), q.new_zeros(())
    for part in _parts_of_tokens(q, k):
        scores, of_pair = dot_products(q[:, :, part], k), weight[..., part]
        # A missing word's score is zero, never positive.
        positive = positive + weighted((scores > 0).sum(3), of_pair)
        entropy = torch.special.entr(_attention(scores * scale, valid)).sum(3)
        entropy = torch.where(words > 1, entropy / words.clamp_min(2).log(), 1.0)
        relative = relative + weighted(entropy, of_pair)
    counted = (weight * words).sum() * num_heads
    return positive / counted.clamp_min(_EPSILON), relative


def _parts_of_tokens(q: Tensor, k: Tensor) -> list[slice]:
    """Stretches of the tokens P that have at most `_MOST_SCORES` scores; in compiled code, whose
    graph would repeat what is done with each, all of them.
    """
    tokens = q.shape[2]
    if torch.compiler.is_compiling() or tokens == 0:
        return [slice(0, tokens)]
    length = max(1, _MOST_SCORES // max(1, k[..., 0].numel()))
    return [slice(start, start + length) for start in range(0, tokens, length)]


def weighted(of_pairs: Tensor, weight: Tensor) -> Tensor:
    """Sum of what pairs have, times their weights; nothing of pairs that have none, be it NaN."""
    return (of_pairs * weight).masked_fill(weight == 0, 0).sum()


def valid_words(k: Tensor, word_mask: Tensor | None, caption_mask: Tensor | None) -> Tensor:
    """[B, 1, C, S, 1] bool: the words that exist, of captions that exist."""
    if word_mask is None:
        word_mask = k.new_ones(k.shape[:3], dtype=torch.bool)
    if caption_mask is not None:
        word_mask = word_mask & caption_mask[..., None]
    return word_mask[:, None, :, :, None]


def by_image(x: Tensor, batch: int, num_heads: int) -> Tensor:
    """Block-major rows [M * B, ..., T, d] to [B, h, ..., M * T, e], in float32 or wider."""
    rows, *middle, tokens, width = x.shape
    blocks = rows // max(batch, 1)
    x = x.reshape(blocks, batch, *middle, tokens, num_heads, width // num_heads)
    x = x.movedim((1, -2, 0), (0, 1, -3))
    return _widened(x.reshape(*x.shape[:-3], blocks * tokens, width // num_heads))


def by_row(x: Tensor, rows: int, tokens: int) -> Tensor:
    """[B, h, ..., M * T, e] back to block-major rows [M * B, ..., T, d]."""
    batch, heads, *middle, _, head_dim = x.shape
    blocks = rows // max(batch, 1)
    x = x.reshape(batch, heads, *middle, blocks, tokens, head_dim)
    return x.movedim((0, 1, -3), (1, -2, 0)).reshape(rows, *middle, tokens, heads * head_dim)


def by_head(x: Tensor, num_heads: int, valid: Tensor) -> Tensor:
    """Words [B, C, S, d] to [B, h, C, S, e] in float32 or wider, zero where there is no word."""
    x = x.unflatten(3, (num_heads, x.shape[3] // num_heads)).movedim(3, 1)
    return _widened(x.masked_fill(~valid, 0))


def score_scale(scale: float | None, q: Tensor, num_heads: int) -> float:
    """What scores are multiplied by: `1 / sqrt(e)` unless given."""
    return (q.shape[2] // num_heads) ** -0.5 if scale is None else scale


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def dot_products(q: Tensor, k: Tensor) -> Tensor:
    """[B, h, C, S, P] products of q [B, h, P, e] and k [B, h, C, S, e]."""
    return (k.flatten(2, 3) @ q.transpose(2, 3)).unflatten(2, k.shape[2:4])


def _attention(scores: Tensor, valid: Tensor) -> Tensor:
    """Softmax over the words of each caption; uniform in a caption without words."""
    absent = scores.new_zeros(valid.shape).masked_fill(~valid, _lowest(scores))
    return (scores + absent).softmax(3)


def _highest(attention: Tensor, v: Tensor, has_words: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over captions of `attention v` [B, h, P, e], and the (lowest) caption it is from."""
    # A caption without words has uniform attention, over values so low that it cannot win.
    v = v.masked_fill(~has_words, _lowest(v))
    every = (attention.transpose(3, 4) @ v).unbind(2)
    highest = every[0]
    winner = torch.zeros_like(highest, dtype=torch.uint8)
    # On a CPU max(dim) with indices takes several times as long as these elementwise passes.
    for n, y in enumerate(every[1:], start=1):
        wins = y > highest
        winner = torch.maximum(winner, wins.to(torch.uint8) * n)
        highest = torch.maximum(highest, y)
    return highest * has_words.any(2), winner


def _lowest(x: Tensor) -> float:
    return torch.finfo(x.dtype).min / 2  # half, so that sums do not overflow


def _inverse_length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).clamp_min(_EPSILON).reciprocal()


def unit_length(x: Tensor) -> Tensor:
    """`x / |x|` over the last dimension; a zero vector stays zero."""
    return F.normalize(x, dim=-1, eps=_EPSILON)


def cosines(scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """`scores / (|q| |k|)`, [B, h, C, S, P]."""
    return scores * _inverse_length(q)[:, :, None, None] * _inverse_length(k)[..., None]


def similarities(cosine: Tensor, valid: Tensor, similarity: str, tau: float) -> Tensor:
    """The O of the regularisers: `relu(cos)` or `softplus(cos / tau)`, zero where no word is."""
    if similarity == "relu":
        return cosine.relu()  # a missing word's k is zero, and so is its cosine
    return F.softplus(cosine / tau) * valid


def _similarity_slopes(cosine: Tensor, valid: Tensor, similarity: str, tau: float) -> Tensor:
    if similarity == "relu":
        return (cosine > 0).to(cosine.dtype)
    return torch.sigmoid(cosine / tau) * valid / tau


def pair_weights(
    has_words: Tensor, token_mask: Tensor | None, batch: int, tokens: int, dtype: torch.dtype
) -> Tensor:
    """[B, 1, C, P]: one over their number for pairs of an existing caption and token, else 0."""
    pairs = has_words[:, :, :, :, 0].expand(-1, -1, -1, tokens)
    if token_mask is not None:
        pairs = pairs & by_image(token_mask[..., None], batch, 1)[:, :, None, :, 0]
    return pairs.to(dtype) / pairs.sum().clamp_min(1)
