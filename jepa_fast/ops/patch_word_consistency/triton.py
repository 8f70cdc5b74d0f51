"""Triton kernels: no similarity ever leaves registers; the backward pass keeps 8 bytes a pair of
token and word, the signs of all layers, for some images at a time.

A program takes a tile of tokens and words through all layers. Its deviations from the mean need the
mean first, and as many tiles as there are layers do not fit into registers, or only as tiles so
small that reading q and k would take longer than multiplying them again: so it goes through the
layers twice. Gradients need, of all that, two bits a layer; they are found once and then serve the
gradients of all layers, each one product more.

Words are taken in an order in which those that exist come first: tiles hold no padding, and words
that are padding are not read. The M sequences of an image are one row of tokens, which share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_fast.ops import _configs
from jepa_fast.ops._compile import CompileCase
from jepa_fast.ops._launch import TRITON_DTYPES, distinct, launch, most_registers, recorded_cases
from jepa_fast.ops._traffic import TrafficCase
from jepa_fast.perf.race import Cost

CONFIGS = Path(__file__).parent / "configs"

_ADDRESSES = 24  # of one launch
_ALIGNED = 16
_EPSILON: tl.constexpr = tl.constexpr(1e-8)  # as the reference's
_NARROW = 128  # heads up to this wide are the narrow ones
_SIGNS_AT_ONCE = 2**27  # bytes: the signs of as many images as fit are found at once


@triton.jit
def addresses_kernel(
    table,  # [COUNT] int64
    a0: tl.int64,
    a1: tl.int64,
    a2: tl.int64,
    a3: tl.int64,
    a4: tl.int64,
    a5: tl.int64,
    a6: tl.int64,
    a7: tl.int64,
    a8: tl.int64,
    a9: tl.int64,
    a10: tl.int64,
    a11: tl.int64,
    a12: tl.int64,
    a13: tl.int64,
    a14: tl.int64,
    a15: tl.int64,
    a16: tl.int64,
    a17: tl.int64,
    a18: tl.int64,
    a19: tl.int64,
    a20: tl.int64,
    a21: tl.int64,
    a22: tl.int64,
    a23: tl.int64,
    COUNT: tl.constexpr,
):
    """Puts numbers on the device without a copy from the host: for CUDA graphs, and no waiting."""
    addresses = (
        a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11,
        a12, a13, a14, a15, a16, a17, a18, a19, a20, a21, a22, a23,
    )  # fmt: skip
    for i in tl.static_range(COUNT):
        tl.store(table + i, addresses[i])


@triton.jit
def _layer(table, layer, DTYPE: tl.constexpr):
    """The tensor whose address is in the table."""
    return tl.multiple_of(tl.load(table + layer).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _tokens(
    p, image, mask, batch, sequences, tokens, sequence_stride, token_stride, MASKED: tl.constexpr
):
    """Of the tokens `p` of an image's sequences: number, offset, whether it exists and counts."""
    sequence = p // tokens
    t = p % tokens
    row = sequence.to(tl.int64) * batch + image
    number = row * tokens + t
    exists = sequence < sequences
    counts = exists
    if MASKED:
        counts = exists & (tl.load(mask + number, mask=exists, other=0) != 0)
    return number, row * sequence_stride + t.to(tl.int64) * token_stride, exists, counts


@triton.jit
def _words(j, image, order, present, words, image_stride, word_stride):
    """Of the words at places `j` in an image's order, `present` of which count: the same."""
    exists = j < words
    word = tl.load(order + image * words + j, mask=exists, other=0).to(tl.int64)
    return image * words + word, image * image_stride + word * word_stride, exists, j < present


@triton.jit
def inverse_lengths_kernel(
    table,  # [LAYERS] addresses of [outer, inner, HEADS * E] by the strides below
    inverse,  # [LAYERS, HEADS, rows]
    rows,  # outer * inner
    inner,
    outer_stride,
    inner_stride,
    DTYPE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One over the length of each row of each head."""
    part = tl.program_id(0) % (LAYERS * HEADS)
    layer = part // HEADS
    row = (tl.program_id(0) // (LAYERS * HEADS)).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    outer = row // inner
    offset = outer * outer_stride + (row - outer * inner) * inner_stride
    e = tl.arange(0, BLOCK)
    x = tl.load(
        _layer(table, layer, DTYPE)
        + (part % HEADS).to(tl.int64) * E
        + offset[:, None]
        + e[None, :],
        mask=exists[:, None] & (e < E)[None, :],
        other=0.0,
    )
    # An error of a length is one of its whole row. Of single numbers, float64 costs nothing.
    x = x.to(tl.float64) if DTYPE == tl.float32 else x.to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, 1).to(tl.float64))
    # Not tl.maximum, which drops NaN.
    length = tl.where(length < _EPSILON, _EPSILON, length)
    found = (1.0 / length).to(tl.float32)
    tl.store(inverse + part.to(tl.int64) * rows + row, found, mask=exists)


@triton.jit
def _similarity(cosine, inverse_tau, RELU: tl.constexpr):
    if RELU:
        found = tl.where(cosine <= 0.0, 0.0, cosine)  # NaN stays
    else:
        x = cosine * inverse_tau
        # max(x, 0) + log(1 + exp(-|x|)); the series where 1 + y would lose digits of y.
        y = tl.exp(-tl.abs(x))
        logarithm = tl.where(y < 1e-3, y - 0.5 * y * y, tl.log(1.0 + y))
        found = tl.where(x > 0.0, x, 0.0) + logarithm
    return found


@triton.jit
def _slope(cosine, inverse_tau, RELU: tl.constexpr):
    if RELU:
        found = tl.where(cosine > 0.0, 1.0, 0.0)
    else:
        found = inverse_tau / (1.0 + tl.exp(-cosine * inverse_tau))
    return found


@triton.jit
def _layer_similarity(
    queries,
    keys,
    q_offset,
    k_offset,
    q_inverse,  # pointers to those of head 0
    k_inverse,
    q_rows,  # to the next head
    k_rows,
    token_counts,
    word_counts,
    inverse_tau,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    RELU: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """O of one layer, averaged over heads, [TOKENS, WORDS]."""
    result = tl.zeros([TOKENS, WORDS], tl.float32)
    for head in range(HEADS):
        cosine = tl.zeros([TOKENS, WORDS], tl.float32)
        for first in tl.range(0, E, CHUNK, num_stages=STAGES):
            e = first + tl.arange(0, CHUNK)
            q_mask = token_counts[:, None]
            k_mask = word_counts[None, :]
            if E % CHUNK != 0:
                q_mask = q_mask & (e < E)[None, :]
                k_mask = k_mask & (e < E)[:, None]
            column = tl.cast(head, tl.int64) * E + e
            q = tl.load(queries + q_offset[:, None] + column[None, :], mask=q_mask, other=0.0)
            k = tl.load(keys + k_offset[None, :] + column[:, None], mask=k_mask, other=0.0)
            cosine = tl.dot(q, k, cosine, input_precision="ieee")
        of_head = tl.cast(head, tl.int64)
        q_scale = tl.load(q_inverse + of_head * q_rows, mask=token_counts, other=0.0)
        k_scale = tl.load(k_inverse + of_head * k_rows, mask=word_counts, other=0.0)
        cosine = cosine * q_scale[:, None] * k_scale[None, :]
        result += _similarity(cosine, inverse_tau, RELU)
    return result / HEADS if HEADS > 1 else result


@triton.jit(do_not_specialize=["first_image"])
def deviations_kernel(
    table,  # [2 * LAYERS] addresses of queries, then of keys
    order,  # [B, words] int32, words that exist first
    present,  # [B] how many do
    token_mask,  # [M * B, tokens], or order again without one
    q_inverse,  # [LAYERS, HEADS, q_rows]
    k_inverse,  # [LAYERS, HEADS, k_rows]
    losses,  # [images, token_tiles, word_tiles]; with SIGNS above again
    above,  # [images, P, W] int32, P and W whole tiles; without SIGNS losses again
    below,  # the same
    first_image,
    batch,
    sequences,  # M
    tokens,
    words,
    q_sequence_stride,
    q_token_stride,
    k_image_stride,
    k_word_stride,
    q_rows,  # M * B * tokens
    k_rows,  # B * words
    token_tiles,
    word_tiles,
    signs_tokens,  # P
    signs_words,  # W
    inverse_tau,
    DTYPE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    RELU: tl.constexpr,
    MASKED: tl.constexpr,
    SIGNS: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile's sum of |O^l - mean_l O^l| over layers; or with SIGNS, for the gradients, bit l of
    `above` where O^l is above the mean, of `below` where it is below, and in the highest byte of
    `above` how many more are above than below. O = 0 below the mean, which has no slope if it is a
    relu's, is marked by both bits; with several heads, each its slope, the gradients find it again.
    """
    tile = tl.program_id(0)
    w = tile % word_tiles
    t = tile // word_tiles % token_tiles
    group_image = (tile // word_tiles // token_tiles).to(tl.int64)
    image = first_image + group_image
    there = tl.load(present + image)
    if w * WORDS >= there:
        if not SIGNS:
            tl.store(losses + tile, 0.0)
        return
    p = t.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    j = w.to(tl.int64) * WORDS + tl.arange(0, WORDS)
    q_number, q_offset, _, q_counts = _tokens(
        p, image, token_mask, batch, sequences, tokens, q_sequence_stride, q_token_stride, MASKED
    )
    k_number, k_offset, _, k_counts = _words(
        j, image, order, there, words, k_image_stride, k_word_stride
    )

    total = tl.zeros([TOKENS, WORDS], tl.float32)
    for layer in range(LAYERS):
        total += _layer_similarity(
            _layer(table, layer, DTYPE),
            _layer(table + LAYERS, layer, DTYPE),
            q_offset,
            k_offset,
            q_inverse + tl.cast(layer, tl.int64) * HEADS * q_rows + q_number,
            k_inverse + tl.cast(layer, tl.int64) * HEADS * k_rows + k_number,
            q_rows,
            k_rows,
            q_counts,
            k_counts,
            inverse_tau,
            HEADS,
            E,
            RELU,
            TOKENS,
            WORDS,
            CHUNK,
            STAGES,
        )
    mean = tl.div_rn(total, tl.full([TOKENS, WORDS], LAYERS, tl.float32))
    deviation = tl.zeros([TOKENS, WORDS], tl.float32)
    higher = tl.zeros([TOKENS, WORDS], tl.int32)
    lower = tl.zeros([TOKENS, WORDS], tl.int32)
    for layer in range(LAYERS):
        found = _layer_similarity(
            _layer(table, layer, DTYPE),
            _layer(table + LAYERS, layer, DTYPE),
            q_offset,
            k_offset,
            q_inverse + tl.cast(layer, tl.int64) * HEADS * q_rows + q_number,
            k_inverse + tl.cast(layer, tl.int64) * HEADS * k_rows + k_number,
            q_rows,
            k_rows,
            q_counts,
            k_counts,
            inverse_tau,
            HEADS,
            E,
            RELU,
            TOKENS,
            WORDS,
            CHUNK,
            STAGES,
        )
        if SIGNS:
            is_higher = (found > mean).to(tl.int32)
            is_lower = (found < mean).to(tl.int32)
            flat = ((found < mean) & (found == 0.0)).to(tl.int32)
            higher += ((is_higher | flat) << layer) + ((is_higher - is_lower) << 24)
            lower += is_lower << layer
        else:
            deviation += tl.abs(found - mean)
    pairs = q_counts[:, None] & k_counts[None, :]
    if SIGNS:
        place = (group_image * signs_tokens + p)[:, None] * signs_words + j[None, :]
        tl.store(above + place, tl.where(pairs, higher, 0))
        tl.store(below + place, tl.where(pairs, lower, 0))
    else:
        tl.store(losses + tile, tl.sum(tl.sum(tl.where(pairs, deviation, 0.0), 1), 0))


@triton.jit(do_not_specialize=["first_image"])
def gradients_kernel(
    table,  # [4 * LAYERS] addresses of queries, keys, and the gradients of both
    order,  # this and the following as above
    present,
    token_mask,
    q_inverse,
    k_inverse,
    above,
    below,
    factor,  # [1] float64, of all gradients
    first_image,
    batch,
    sequences,
    tokens,
    words,
    q_sequence_stride,
    q_token_stride,
    k_image_stride,
    k_word_stride,
    q_rows,
    k_rows,
    row_tiles,
    signs_tokens,
    signs_words,
    inverse_tau,
    DTYPE: tl.constexpr,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    RELU: tl.constexpr,
    MASKED: tl.constexpr,
    OF_KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOW: tl.constexpr,  # a head's columns, the first LOW and the next HIGH: powers of 2, HIGH or 0
    HIGH: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,  # how many columns to take; None: those that exist
):
    """Gradients of a layer's head at some of its rows x, tokens, over all columns y, words; with
    OF_KEYS the other way round:

        g = sum_y (L s - sum_l s) O'(cos) y / |y|,    s = sign(O - mean)
        gradient = factor (g - x (x g) / |x|^2) / |x|
    """
    part = tl.program_id(0) % (LAYERS * HEADS)
    layer = part // HEADS
    head = (part % HEADS).to(tl.int64)
    tile = tl.program_id(0) // (LAYERS * HEADS)
    group_image = (tile // row_tiles).to(tl.int64)
    image = first_image + group_image
    there = tl.load(present + image)
    first_row = (tile % row_tiles).to(tl.int64) * ROWS
    i = first_row + tl.arange(0, ROWS)
    q = _layer(table, layer, DTYPE) + head * E
    k = _layer(table + LAYERS, layer, DTYPE) + head * E
    of_q = q_inverse + part.to(tl.int64) * q_rows
    of_k = k_inverse + part.to(tl.int64) * k_rows
    signs = group_image * signs_tokens * signs_words
    if OF_KEYS:
        number, offset, exists, counts = _words(
            i, image, order, there, words, k_image_stride, k_word_stride
        )
        xs, ys, x_inverse, y_inverse = k, q, of_k, of_q
        end = tl.where(first_row < there, sequences * tokens, 0)
        gradient = _layer(table + 3 * LAYERS, layer, DTYPE)
    else:
        number, offset, exists, counts = _tokens(
            i, image, token_mask, batch, sequences, tokens, q_sequence_stride, q_token_stride,
            MASKED,
        )  # fmt: skip
        xs, ys, x_inverse, y_inverse = q, k, of_q, of_k
        end = there
        gradient = _layer(table + 2 * LAYERS, layer, DTYPE)
    KNOWN: tl.constexpr = RELU and HEADS == 1  # from the signs: what slope a similarity has
    low = tl.arange(0, LOW)
    g_low = tl.zeros([ROWS, LOW], tl.float32)
    if HIGH > 0:
        high = LOW + tl.arange(0, HIGH)
        g_high = tl.zeros([ROWS, HIGH], tl.float32)
    x_scale = tl.load(x_inverse + number, mask=counts, other=0.0)
    if not KNOWN:
        x_low = _rows(xs, offset, counts, low, E, "")
        if HIGH > 0:
            x_high = _rows(xs, offset, counts, high, E, "")

    for first in tl.range(0, end if WHOLE is None else WHOLE, COLUMNS, num_stages=STAGES):
        j = first + tl.arange(0, COLUMNS)
        if OF_KEYS:
            y_number, y_offset, _, y_counts = _tokens(
                j, image, token_mask, batch, sequences, tokens, q_sequence_stride, q_token_stride,
                MASKED,
            )  # fmt: skip
            place = signs + i[:, None] + j.to(tl.int64)[None, :] * signs_words
        else:
            y_number, y_offset, _, y_counts = _words(
                j, image, order, there, words, k_image_stride, k_word_stride
            )
            place = signs + i.to(tl.int64)[:, None] * signs_words + j[None, :]
        y_scale = tl.load(y_inverse + y_number, mask=y_counts, other=0.0)
        y_low = _rows(ys, y_offset, y_counts, low, E, "")
        if HIGH > 0:
            y_high = _rows(ys, y_offset, y_counts, high, E, "")

        # Beyond what counts these are any numbers, small ones, of which nothing remains.
        higher = tl.load(above + place)
        lower = tl.load(below + place)
        is_higher = (higher >> layer) & 1
        is_lower = (lower >> layer) & 1
        slope = LAYERS * tl.where(is_lower != 0, -1, is_higher) - (higher >> 24)
        if KNOWN:
            slope = tl.where((is_higher & is_lower) != 0, 0, slope).to(tl.float32)
        else:
            cosine = tl.dot(x_low, tl.trans(y_low), input_precision="ieee")
            if HIGH > 0:
                cosine = tl.dot(x_high, tl.trans(y_high), cosine, input_precision="ieee")
            cosine = cosine * x_scale[:, None] * y_scale[None, :]
            slope = slope.to(tl.float32) * _slope(cosine, inverse_tau, RELU)
        if DTYPE == tl.float16:  # in which 1 / |y| might overflow
            y_low = (y_low.to(tl.float32) * y_scale[:, None]).to(DTYPE)
            if HIGH > 0:
                y_high = (y_high.to(tl.float32) * y_scale[:, None]).to(DTYPE)
        else:
            slope = slope * y_scale[None, :]
        g_low = tl.dot(slope.to(DTYPE), y_low, g_low, input_precision="ieee")
        if HIGH > 0:
            g_high = tl.dot(slope.to(DTYPE), y_high, g_high, input_precision="ieee")

    # Rows are read again for each use, which keeps them out of the registers until then.
    x_low = _rows(xs, offset, counts, low, E, "evict_last").to(tl.float32)
    along = tl.sum(g_low * x_low, 1)
    if HIGH > 0:
        x_high = _rows(xs, offset, counts, high, E, "evict_last").to(tl.float32)
        along += tl.sum(g_high * x_high, 1)
    # A length below the smallest counts as that, and does not change.
    along = tl.where(x_scale < 1.0 / _EPSILON, along * x_scale * x_scale, 0.0)
    x_scale = (x_scale.to(tl.float64) * tl.load(factor)).to(tl.float32)
    gradient += number[:, None] * (HEADS * E) + head * E
    x_low = _rows(xs, offset, counts, low, E, "evict_first").to(tl.float32)
    g_low = tl.where(counts[:, None], (g_low - x_low * along[:, None]) * x_scale[:, None], 0.0)
    mask = exists[:, None] & (low < E)[None, :]
    tl.store(gradient + low[None, :], g_low.to(DTYPE), mask=mask)
    if HIGH > 0:
        x_high = _rows(xs, offset, counts, high, E, "evict_first").to(tl.float32)
        g_high = (g_high - x_high * along[:, None]) * x_scale[:, None]
        g_high = tl.where(counts[:, None], g_high, 0.0)
        mask = exists[:, None] & (high < E)[None, :]
        tl.store(gradient + high[None, :], g_high.to(DTYPE), mask=mask)


@triton.jit
def _rows(x, offset, counts, e, E: tl.constexpr, EVICT: tl.constexpr):
    """[rows, columns e], zero in rows that do not count."""
    mask = counts[:, None] & (e < E)[None, :]
    return tl.load(x + offset[:, None] + e[None, :], mask=mask, other=0.0, eviction_policy=EVICT)


def patch_word_consistency(
    q_layers: Sequence[Tensor],
    k_layers: Sequence[Tensor],
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    token_mask: Tensor | None,
    num_heads: int,
    similarity: str,
    tau: float,
) -> Tensor:
    """As `reference.patch_word_consistency`."""
    masks = (word_mask, caption_mask, token_mask)
    if not q_layers[0].numel() or not k_layers[0].numel():
        return q_layers[0].new_zeros((), dtype=torch.float32)
    call = _Call.of(q_layers, k_layers, *masks, num_heads, similarity, tau)
    config = call.config("loss")
    tiles = call.tiles(config)
    losses = call.pairs.new_empty(call.batch, *tiles, dtype=torch.float32)
    outputs = {"losses": losses, "above": losses, "below": losses}
    _launch_deviations(call, range(call.batch), config, outputs, (0, 0))
    return (losses.sum(dtype=torch.float64) / (call.pairs * call.layers)).float()


def patch_word_consistency_backward(
    grad: Tensor,
    q_layers: Sequence[Tensor],
    k_layers: Sequence[Tensor],
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    token_mask: Tensor | None,
    num_heads: int,
    similarity: str,
    tau: float,
) -> list[Tensor]:
    """Gradients of all queries, then of all keys."""
    masks = (word_mask, caption_mask, token_mask)
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in q_layers]
    gradients += [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in k_layers]
    if not q_layers[0].numel() or not k_layers[0].numel():
        return [gradient.zero_() for gradient in gradients]
    call = _Call.of(q_layers, k_layers, *masks, num_heads, similarity, tau, gradients)
    # A similarity's gradient is (L s - sum_l s) / L of the deviation's, a head's 1 / h of that.
    factor = grad.double() / (call.pairs * call.layers**2 * num_heads)
    factor = factor.view(1)
    for_signs = call.config("signs")
    for_gradients = call.config("gradients")
    # Whole tiles of either kernel; all sides are powers of 2.
    side = max(for_gradients["rows"], for_gradients["columns"])
    size = (
        _whole(call.tokens, max(for_signs["tokens"], side)),
        _whole(call.words, max(for_signs["words"], side)),
    )
    step = max(1, min(call.batch, _SIGNS_AT_ONCE // (8 * size[0] * size[1])))
    above, below = call.pairs.new_empty(2, step, *size, dtype=torch.int32)
    outputs = {"losses": above, "above": above, "below": below}
    for first in range(0, call.batch, step):
        images = range(first, min(first + step, call.batch))
        _launch_deviations(call, images, for_signs, outputs, size)
        for of_keys in (False, True):
            _launch_gradients(call, images, for_gradients, outputs, size, factor, of_keys)
    return gradients


@dataclass(frozen=True)
class _Call:
    """What the launches of a call share.

    Args:
        tensors: whose addresses the kernels get, so that none is freed before the launches.
        arguments, constants: of the kernels.
        pairs: how many pairs of a token and a caption count, at least 1.
        batch, tokens, words, layers, head_dim: B, M * T, C * S, L, e.
        bits: of a number.
    """

    tensors: list[Tensor]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    pairs: Tensor
    batch: int
    tokens: int
    words: int
    layers: int
    head_dim: int
    bits: int

    @classmethod
    def of(
        cls,
        q_layers: Sequence[Tensor],
        k_layers: Sequence[Tensor],
        word_mask: Tensor | None,
        caption_mask: Tensor | None,
        token_mask: Tensor | None,
        num_heads: int,
        similarity: str,
        tau: float,
        gradients: Sequence[Tensor] = (),
    ) -> _Call:
        """Puts addresses, the words' order and inverse lengths on the device."""
        valid = torch.ones(k_layers[0].shape[:3], dtype=torch.bool, device=k_layers[0].device)
        if word_mask is not None:
            valid = valid & word_mask
        if caption_mask is not None:
            valid = valid & caption_mask[..., None]
        # An image's words in one row: copied where captions lie apart.
        q_layers, k_layers = _aligned(q_layers), _aligned([k.flatten(1, 2) for k in k_layers])
        q, k = q_layers[0], k_layers[0]
        rows, tokens, width = q.shape
        batch, words, _ = k.shape
        sequences, head_dim = rows // batch, width // num_heads
        order = torch.argsort((~valid).flatten(1).to(torch.uint8), dim=1, stable=True)
        order = order.to(torch.int32)
        counted = valid.any(2).sum(1)  # captions of each image, then pairs
        if token_mask is None:
            counted = counted * (sequences * tokens)
        else:
            token_mask = token_mask.contiguous()
            counted = counted * token_mask.view(sequences, batch, tokens).sum((0, 2))
        constants = {
            "DTYPE": TRITON_DTYPES[q.dtype],
            "LAYERS": len(q_layers),
            "HEADS": num_heads,
            "E": head_dim,
        }
        tensors = [*q_layers, *k_layers, *gradients]
        table = _addresses(tensors)
        arguments = {
            "table": table,
            "order": order,
            "present": valid.sum((1, 2), dtype=torch.int32),
            "token_mask": order if token_mask is None else token_mask,
            "q_inverse": _inverse_lengths(table, q, constants),
            "k_inverse": _inverse_lengths(table[len(q_layers) :], k, constants),
            "batch": batch,
            "sequences": sequences,
            "tokens": tokens,
            "words": words,
            "q_sequence_stride": q.stride(0),
            "q_token_stride": q.stride(1),
            "k_image_stride": k.stride(0),
            "k_word_stride": k.stride(1),
            "q_rows": rows * tokens,
            "k_rows": batch * words,
            "inverse_tau": 1.0 / tau,
        }
        constants |= {"RELU": similarity == "relu", "MASKED": token_mask is not None}
        return cls(
            tensors,
            arguments,
            constants,
            counted.sum().clamp(min=1),
            batch,
            sequences * tokens,
            words,
            len(q_layers),
            head_dim,
            8 * q.dtype.itemsize,
        )

    def config(self, kernel: str) -> _configs.Config:
        width = "wide" if self.head_dim > _NARROW else "narrow"
        return _configs.lookup(CONFIGS, f"{kernel}-{self.bits}-{width}", self.pairs.device)

    def tiles(self, config: _configs.Config) -> tuple[int, int]:
        return triton.cdiv(self.tokens, config["tokens"]), triton.cdiv(self.words, config["words"])


def _aligned(layers: Sequence[Tensor]) -> Sequence[Tensor]:
    """The layers, or copies: all of the same strides, rows in one piece, addresses as rows need."""
    strides = layers[0].stride()
    fit = strides[-1] == 1 and all(
        x.stride() == strides and x.data_ptr() % _ALIGNED == 0 for x in layers
    )
    return layers if fit else [x.clone(memory_format=torch.contiguous_format) for x in layers]


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    """[tensors] int64 on their device."""
    table = torch.empty(len(tensors), dtype=torch.int64, device=tensors[0].device)
    for first in range(0, len(tensors), _ADDRESSES):
        addresses = [x.data_ptr() for x in tensors[first : first + _ADDRESSES]]
        count = len(addresses)
        addresses += addresses[-1:] * (_ADDRESSES - count)
        launch(
            addresses_kernel,
            (1,),
            {"table": table[first:], **{f"a{i}": each for i, each in enumerate(addresses)}},
            {"COUNT": count},
            1,
        )
    return table


def _inverse_lengths(table: Tensor, x: Tensor, constants: dict[str, Any]) -> Tensor:
    """[L, h, rows] float32 of the table's first layers, which are like `x` [outer, inner, d]."""
    outer, inner, _ = x.shape
    rows = outer * inner
    inverse = table.new_empty(constants["LAYERS"], constants["HEADS"], rows, dtype=torch.float32)
    config = _configs.lookup(CONFIGS, "lengths", x.device)
    block = max(16, triton.next_power_of_2(constants["E"]))
    at_once = max(1, config["elements"] // block)
    launch(
        inverse_lengths_kernel,
        (constants["LAYERS"] * constants["HEADS"] * triton.cdiv(rows, at_once),),
        {
            "table": table,
            "inverse": inverse,
            "rows": rows,
            "inner": inner,
            "outer_stride": x.stride(0),
            "inner_stride": x.stride(1),
        },
        {**constants, "BLOCK": block, "ROWS": at_once},
        config["num_warps"],
    )
    return inverse


def _launch_deviations(
    call: _Call,
    images: range,
    config: _configs.Config,
    outputs: dict[str, Tensor],
    signs_size: tuple[int, int],
) -> None:
    """Losses of these images, or signs into [images, *signs_size] where that is not empty."""
    tiles = call.tiles(config)
    launch(
        deviations_kernel,
        (len(images) * tiles[0] * tiles[1],),
        {
            **call.arguments,
            **outputs,
            "first_image": images.start,
            "token_tiles": tiles[0],
            "word_tiles": tiles[1],
            "signs_tokens": signs_size[0],
            "signs_words": signs_size[1],
        },
        {
            **call.constants,
            "SIGNS": signs_size[1] > 0,
            "TOKENS": config["tokens"],
            "WORDS": config["words"],
            "CHUNK": _chunk(call.head_dim, config["chunk"]),
            "STAGES": config["num_stages"],
        },
        config["num_warps"],
        **most_registers(config),
    )


def _launch_gradients(
    call: _Call,
    images: range,
    config: _configs.Config,
    signs: dict[str, Tensor],
    signs_size: tuple[int, int],
    factor: Tensor,
    of_keys: bool,
) -> None:
    """Gradients of the queries, or the keys, of these images."""
    rows, whole = (call.words, call.tokens) if of_keys else (call.tokens, call.words)
    tiles = triton.cdiv(rows, config["rows"])
    low, high = _two_powers(call.head_dim)
    launch(
        gradients_kernel,
        (len(images) * tiles * call.layers * call.constants["HEADS"],),
        {
            **call.arguments,
            "above": signs["above"],
            "below": signs["below"],
            "factor": factor,
            "first_image": images.start,
            "row_tiles": tiles,
            "signs_tokens": signs_size[0],
            "signs_words": signs_size[1],
        },
        {
            **call.constants,
            "OF_KEYS": of_keys,
            "ROWS": config["rows"],
            "COLUMNS": config["columns"],
            "LOW": low,
            "HIGH": high,
            "STAGES": config["num_stages"],
            # Interpreted loops take no number from a tensor; what does not count adds nothing.
            "WHOLE": whole if triton.knobs.runtime.interpret else None,
        },
        config["num_warps"],
        **most_registers(config),
    )


def _whole(size: int, tile: int) -> int:
    return triton.cdiv(size, tile) * tile


def _chunk(head_dim: int, most: int) -> int:
    """Columns that a product takes at once: the most with which it takes the fewest in all."""
    sizes = [size for size in (128, 64, 32) if size <= most]
    return min(sizes, key=lambda size: (_whole(head_dim, size), -size))


def _two_powers(head_dim: int) -> tuple[int, int]:
    """Powers of 2, from 16 on, whose sum is at least the width, as little above it as can be."""
    whole = max(16, triton.next_power_of_2(head_dim))
    low = whole // 2
    high = max(16, triton.next_power_of_2(max(head_dim - low, 1)))
    return (low, high) if low >= 16 and low + high < whole else (whole, 0)


def compile_cases() -> list[CompileCase]:
    """Every config, and with it each dtype and every option once: not their product."""

    def call(dtype: torch.dtype, width: int, heads: int, plain: bool, backward: bool) -> object:
        tokens, batch, layers = torch.empty(4, 48, width, dtype=dtype), 2, 12
        q = [torch.empty_like(tokens) for _ in range(layers)]
        k = torch.empty(batch, 2, 64, 2 * layers, width, dtype=dtype).unbind(3)[::2]
        mask = None if plain else torch.ones(tokens.shape[:2], dtype=torch.bool)
        options = (None, None, mask, heads, "relu" if plain else "softplus", 0.1)
        if backward:
            return patch_word_consistency_backward(torch.ones(()), q, k, *options)
        return patch_word_consistency(q, k, *options)

    calls: dict[str, Callable[[], object]] = {}
    for backward in (False, True):
        for dtype, width, heads, plain in (
            (torch.bfloat16, 384, 1, True),  # TC-JEPA's
            (torch.bfloat16, 384, 16, False),
            (torch.float16, 480, 6, True),
            (torch.float32, 384, 1, False),
            (torch.float32, 384, 6, True),
        ):
            operator = f"patch_word_consistency{'_backward' if backward else ''}"
            key = f"{operator}-{str(dtype).removeprefix('torch.')}-{width}-{heads}"
            key += "" if plain else "-softplus-masked"
            calls[key] = partial(call, dtype, width, heads, plain, backward)
    # All read numbers a row: of words in their order, and lengths.
    return distinct(recorded_cases(CONFIGS, calls, narrow=frozenset(calls)))


def traffic_cases() -> list[TrafficCase]:
    """Tokens and words of several tiles, one caption without words."""
    batch, sequences, tokens, captions, words, width, layers = 2, 2, 40, 2, 20, 32, 3
    q = [torch.ones(sequences * batch, tokens, width) for _ in range(layers)]
    k = [torch.ones(batch, captions, words, width) for _ in range(layers)]
    mask = torch.ones(batch, captions, words, dtype=torch.bool)
    mask[0, 1] = False
    inputs = sum(x.nbytes for x in (*q, *k))
    options = (mask, None, None, 1, "relu", 0.1)
    return [
        TrafficCase(
            "patch_word_consistency-float32",
            partial(patch_word_consistency, q, k, *options),
            Cost(read=inputs + mask.nbytes, written=4),
        ),
        TrafficCase(
            "patch_word_consistency_backward-float32",
            partial(patch_word_consistency_backward, torch.ones(()), q, k, *options),
            Cost(read=inputs + mask.nbytes + 4, written=inputs),
        ),
    ]
