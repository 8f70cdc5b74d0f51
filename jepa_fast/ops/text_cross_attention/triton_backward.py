"""The backward kernels in Triton: scores are computed again, nothing of their size was kept.

The first goes like the forward kernel, over the captions for a tile of tokens, and gives dq; it
writes down of each softmax its highest score, its sum and what its gradient subtracts (delta). With
these the second needs no sums over words: a program takes words of one caption, over all tokens of
their image, and gives their dk and dv. Every sum has one order, and there are no atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_fast.ops._compile import CompileCase
from jepa_fast.ops._launch import distinct, launch, loop_bound, recorded_cases
from jepa_fast.ops._rows import without_gaps
from jepa_fast.ops._traffic import TrafficCase
from jepa_fast.ops.text_cross_attention.reference import score_scale
from jepa_fast.ops.text_cross_attention.triton import (
    COMPILED,
    CONFIGS,
    block_of_words,
    compiled_inputs,
    config_for,
    describe_words,
    head_constants,
    inverse_query_length,
    launch_options,
    load_chunk,
    sizes,
    store_chunk,
    strides,
    token_offsets,
)
from jepa_fast.ops.text_cross_attention.triton import compile_cases as forward_cases
from jepa_fast.perf.race import Cost


@triton.jit
def similarity_gradient(cosine, valid, counts, factor, tau, SIMILARITY: tl.constexpr):
    """Of the sparsity term by the cosines."""
    if SIMILARITY == "relu":
        slope = tl.where(cosine > 0.0, 1.0, 0.0)
    else:
        slope = 1.0 / (1.0 + tl.exp(-cosine / tau)) / tau
    return tl.where(valid & counts, slope * factor, 0.0)


@triton.jit
def load_gradient(
    grads,  # pointers to the rows of a head
    winners,  # as grads, for "max"
    exists,
    n,
    share,
    DTYPE: tl.constexpr,
    POOL: tl.constexpr,
    c: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Chunk c of the gradient that goes to caption n."""
    grad = load_chunk(grads, exists, c, CHUNK, HEAD)
    if POOL == "max":
        number = load_chunk(winners, exists, c, CHUNK, HEAD)
        grad = tl.where(number.to(tl.int32) == n, grad, 0.0)
    elif POOL == "mean":
        grad = grad * share
    return grad.to(DTYPE)


@triton.jit
def text_cross_attention_dq_kernel(
    q,  # [M * B, T, h * e] by the strides below, as all that have strides; h * e without gaps
    k,  # [B, C, S, h * e]
    v,  # [B, C, S, h * e]
    grad,  # [M * B, T, h * e], or [M * B, C, T, h * e]
    winner,  # [M * B, T, h * e], or q again without
    inverse,  # [B, C, h, S], of describe_words_kernel
    token_mask,  # [M * B, T], or q again without one
    share,  # [B] one over the number of captions, or q again if not "mean"
    factor,  # [1] of the sparsity's gradient
    dq,  # [M * B, T, h * e]
    highest,  # [B, C, h, P] highest scores
    inverse_totals,  # [B, C, h, P] of the softmax, 1 / sum of exp(score - highest)
    delta,  # [B, C, h, P]
    inverse_lengths,  # [B, h, P] of the queries
    batch,
    patches,  # P
    tokens,  # T
    captions,  # C
    words,  # S
    tiles,  # of tokens of an image
    q_row_stride,
    q_token_stride,
    grad_row_stride,
    grad_caption_stride,
    grad_token_stride,
    k_image_stride,
    k_caption_stride,
    k_word_stride,
    v_image_stride,
    v_caption_stride,
    v_word_stride,
    scale,
    tau,
    POOL: tl.constexpr,
    SIMILARITY: tl.constexpr,
    TOKEN_MASK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,  # e
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
):
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    head = (tl.program_id(0) // tiles % HEADS).to(tl.int64)
    image = (tl.program_id(0) // tiles // HEADS).to(tl.int64)
    p = tile * TOKENS + tl.arange(0, TOKENS)
    exists = p < patches
    width: tl.constexpr = HEADS * HEAD
    dtype: tl.constexpr = q.dtype.element_ty
    caption_step = image * 0 + captions  # products below can pass 2^31
    token_step = image * 0 + tokens
    word_step = image * 0 + words
    patch_step = image * 0 + patches

    queries = q + token_offsets(p, image, batch, tokens, q_row_stride, q_token_stride) + head * HEAD
    grads = grad + head * HEAD
    grads += token_offsets(p, image, batch, tokens, grad_row_stride, grad_token_stride)
    contiguous = token_offsets(p, image, batch, tokens, token_step * width, width) + head * HEAD
    winners = winner + contiguous
    query = ()
    result = ()
    square = tl.zeros([TOKENS], tl.float32)
    for c in tl.static_range(CHUNKS):
        chunk = load_chunk(queries, exists, c, CHUNK, HEAD)
        query += (chunk,)
        result += (tl.zeros([TOKENS, CHUNK], tl.float32),)
        square += tl.sum(chunk.to(tl.float32) * chunk.to(tl.float32), 1)
    inverse_q = inverse_query_length(square, scale)
    tl.store(inverse_lengths + (image * HEADS + head) * patch_step + p, inverse_q, mask=exists)
    share_of_caption = 1.0
    if POOL == "mean":
        share_of_caption = tl.load(share + image)
    counts = exists
    if TOKEN_MASK:
        at = token_mask + token_offsets(p, image, batch, tokens, token_step, 1)
        counts = exists & (tl.load(at, mask=exists, other=0) != 0)
    sparsity_factor = tl.load(factor)

    w = tl.arange(0, WORDS)
    word_there = w < words
    keys = k + image * k_image_stride + head * HEAD + w.to(tl.int64) * k_word_stride
    values = v + image * v_image_stride + head * HEAD + w.to(tl.int64) * v_word_stride
    lengths = inverse + (image * caption_step * HEADS + head) * words + w
    statistics = (image * caption_step * HEADS + head) * patch_step + p
    along = tl.zeros([TOKENS], tl.float32)
    for n in range(captions):
        inverse_k = tl.load(lengths, mask=word_there, other=0.0)
        valid = inverse_k > 0.0
        here = tl.max(inverse_k, 0) > 0.0
        score = tl.zeros([TOKENS, WORDS], tl.float32)
        dshare = tl.zeros([TOKENS, WORDS], tl.float32)
        for c in tl.static_range(CHUNKS):
            # What stands at missing words is not read: it could be NaN.
            key = load_chunk(keys, valid, c, CHUNK, HEAD)
            score = tl.dot(query[c], tl.trans(key), score, input_precision="ieee")
        for c in tl.static_range(CHUNKS):
            dy = load_gradient(
                grads, winners, exists, n, share_of_caption, dtype, POOL, c, CHUNK, HEAD
            )
            value = load_chunk(values, valid, c, CHUNK, HEAD)
            dshare = tl.dot(dy, tl.trans(value), dshare, input_precision="ieee")

        scaled = tl.where(valid[None, :], score * scale, float("-inf"))
        most = tl.where(here, tl.max(scaled, 1), 0.0)
        attention = tl.exp(scaled - most[:, None])
        inverse_total = 1.0 / tl.where(here, tl.sum(attention, 1), 1.0)
        attention *= inverse_total[:, None]
        subtracted = tl.sum(attention * dshare, 1)
        tl.store(highest + statistics, most, mask=exists)
        tl.store(inverse_totals + statistics, inverse_total, mask=exists)
        tl.store(delta + statistics, subtracted, mask=exists)

        by_lengths = inverse_q[:, None] * inverse_k[None, :]
        cosine = score * by_lengths
        dcosine = similarity_gradient(
            cosine, valid[None, :], counts[:, None], sparsity_factor, tau, SIMILARITY
        )
        along += tl.sum(dcosine * cosine, 1)
        dscore = attention * (dshare - subtracted[:, None]) * scale + dcosine * by_lengths
        dscore = dscore.to(dtype)
        new = ()
        for c in tl.static_range(CHUNKS):
            # Read once more: kept from above, they would take the registers of what is summed up.
            key = load_chunk(keys, valid, c, CHUNK, HEAD)
            new += (tl.dot(dscore, key, result[c], input_precision="ieee"),)
        result = new
        keys += k_caption_stride
        values += v_caption_stride
        lengths += word_step * HEADS
        statistics += HEADS * patch_step
        if POOL == "none":
            grads += grad_caption_stride

    along *= inverse_q * inverse_q
    for c in tl.static_range(CHUNKS):
        chunk = load_chunk(queries, exists, c, CHUNK, HEAD).to(tl.float32)
        store_chunk(dq + contiguous, exists, result[c] - chunk * along[:, None], c, CHUNK, HEAD)


@triton.jit
def text_cross_attention_dkv_kernel(
    q,  # as text_cross_attention_dq_kernel's
    k,
    v,
    grad,
    winner,
    inverse,
    token_mask,
    share,
    factor,
    highest,
    inverse_totals,
    delta,
    inverse_lengths,
    dk,  # [B, C, S, h * e]
    dv,  # [B, C, S, h * e]
    batch,
    patches,
    tokens,
    captions,
    words,
    tiles,  # of tokens of an image
    word_tiles,  # of words of a caption
    q_row_stride,
    q_token_stride,
    grad_row_stride,
    grad_caption_stride,
    grad_token_stride,
    k_image_stride,
    k_caption_stride,
    k_word_stride,
    v_image_stride,
    v_caption_stride,
    v_word_stride,
    scale,
    tau,
    POOL: tl.constexpr,
    SIMILARITY: tl.constexpr,
    TOKEN_MASK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
):
    word_tile = tl.program_id(0) % word_tiles
    head = (tl.program_id(0) // word_tiles % HEADS).to(tl.int64)
    place = (tl.program_id(0) // word_tiles // HEADS).to(tl.int64)
    image, n = place // captions, place % captions
    width: tl.constexpr = HEADS * HEAD
    dtype: tl.constexpr = q.dtype.element_ty
    token_step = image * 0 + tokens  # products below can pass 2^31
    patch_step = image * 0 + patches
    w = (image * 0 + word_tile) * WORDS + tl.arange(0, WORDS)
    word_there = w < words
    inverse_k = tl.load(inverse + (place * HEADS + head) * words + w, mask=word_there, other=0.0)
    valid = inverse_k > 0.0
    keys = k + image * k_image_stride + n * k_caption_stride + head * HEAD + w * k_word_stride
    values = v + image * v_image_stride + n * v_caption_stride + head * HEAD + w * v_word_stride
    key = ()
    value = ()
    # Transposed, so that the products have as many rows as tensor cores like, with few words, too.
    dkeys = ()
    dvalues = ()
    for c in tl.static_range(CHUNKS):
        # What stands at missing words is not read: it could be NaN.
        key += (load_chunk(keys, valid, c, CHUNK, HEAD),)
        value += (load_chunk(values, valid, c, CHUNK, HEAD),)
        dkeys += (tl.zeros([CHUNK, WORDS], tl.float32),)
        dvalues += (tl.zeros([CHUNK, WORDS], tl.float32),)
    share_of_caption = 1.0
    if POOL == "mean":
        share_of_caption = tl.load(share + image)
    sparsity_factor = tl.load(factor)
    grads = grad + head * HEAD
    if POOL == "none":
        grads += n * grad_caption_stride
    along = tl.zeros([WORDS], tl.float32)
    for tile in range(tiles):
        p = (patch_step * 0 + tile) * TOKENS + tl.arange(0, TOKENS)
        exists = p < patches
        queries = q + token_offsets(p, image, batch, tokens, q_row_stride, q_token_stride)
        queries += head * HEAD
        rows = grads + token_offsets(p, image, batch, tokens, grad_row_stride, grad_token_stride)
        winners = winner + head * HEAD
        winners += token_offsets(p, image, batch, tokens, token_step * width, width)
        query = ()
        score = tl.zeros([TOKENS, WORDS], tl.float32)
        for c in tl.static_range(CHUNKS):
            query += (load_chunk(queries, exists, c, CHUNK, HEAD),)
            score = tl.dot(query[c], tl.trans(key[c]), score, input_precision="ieee")
        statistics = (place * HEADS + head) * patch_step + p
        most = tl.load(highest + statistics, mask=exists, other=0.0)
        inverse_total = tl.load(inverse_totals + statistics, mask=exists, other=0.0)
        attention = tl.exp(score * scale - most[:, None]) * inverse_total[:, None]
        attention = tl.where(exists[:, None] & valid[None, :], attention, 0.0)
        weights = attention.to(dtype)
        dshare = tl.zeros([TOKENS, WORDS], tl.float32)
        new_dvalues = ()
        for c in tl.static_range(CHUNKS):
            dy = load_gradient(
                rows, winners, exists, n, share_of_caption, dtype, POOL, c, CHUNK, HEAD
            )
            dshare = tl.dot(dy, tl.trans(value[c]), dshare, input_precision="ieee")
            dvalue = tl.dot(tl.trans(dy), weights, dvalues[c], input_precision="ieee")
            new_dvalues += (dvalue,)
        dvalues = new_dvalues

        subtracted = tl.load(delta + statistics, mask=exists, other=0.0)
        at = inverse_lengths + (image * HEADS + head) * patch_step + p
        inverse_q = tl.load(at, mask=exists, other=0.0)
        counts = exists
        if TOKEN_MASK:
            at = token_mask + token_offsets(p, image, batch, tokens, token_step, 1)
            counts = exists & (tl.load(at, mask=exists, other=0) != 0)
        by_lengths = inverse_q[:, None] * inverse_k[None, :]
        cosine = score * by_lengths
        dcosine = similarity_gradient(
            cosine, valid[None, :], counts[:, None], sparsity_factor, tau, SIMILARITY
        )
        along += tl.sum(dcosine * cosine, 0)
        dscore = attention * (dshare - subtracted[:, None]) * scale + dcosine * by_lengths
        dscore = dscore.to(dtype)
        new_dkeys = ()
        for c in tl.static_range(CHUNKS):
            dkey = tl.dot(tl.trans(query[c]), dscore, dkeys[c], input_precision="ieee")
            new_dkeys += (dkey,)
        dkeys = new_dkeys

    places = (place * words + w) * width + head * HEAD
    along *= inverse_k * inverse_k
    for c in tl.static_range(CHUNKS):
        chunk = load_chunk(keys, valid, c, CHUNK, HEAD).to(tl.float32)
        dkey = tl.trans(dkeys[c]) - chunk * along[:, None]
        store_chunk(dk + places, word_there, dkey, c, CHUNK, HEAD)
        store_chunk(dv + places, word_there, tl.trans(dvalues[c]), c, CHUNK, HEAD)


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
    """As `reference.text_cross_attention_backward`."""
    batch, captions, words = k.shape[:3]
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    # Programs read the gradient many times, so it is best read in the narrow dtype.
    q, k, v, grad = map(without_gaps, (q, k, v, grad_features.to(q.dtype)))
    config = config_for("dq", q, num_heads, words)
    inverse, pairs = describe_words(q, k, word_mask, caption_mask, token_mask, num_heads)
    factor = grad_sparsity.float() / pairs.sum().clamp(min=1) / num_heads
    share = q
    if pool == "mean":
        share = 1 / (inverse[:, :, 0] > 0).any(2).sum(1).clamp(min=1)
    patches = q.shape[0] // max(batch, 1) * q.shape[1]
    shape = (batch, captions, num_heads, patches)
    written = {
        "highest": inverse.new_empty(shape),
        "inverse_totals": inverse.new_empty(shape),
        "delta": inverse.new_empty(shape),
        "inverse_lengths": inverse.new_empty((batch, num_heads, patches)),
    }
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "grad": grad,
        "winner": winner.contiguous() if pool == "max" else q,
        "inverse": inverse,
        "token_mask": q if token_mask is None else token_mask.contiguous(),
        "share": share,
        "factor": factor.view(1),
    }
    steps = {
        **strides(q=q, k=k, v=v),
        "grad_row_stride": grad.stride(0),
        "grad_caption_stride": grad.stride(1),
        "grad_token_stride": grad.stride(-2),
        "scale": score_scale(scale, q, num_heads),
        "tau": float(tau),
    }
    constants = {
        "POOL": pool,
        "SIMILARITY": similarity,
        "TOKEN_MASK": token_mask is not None,
    }
    tiles = triton.cdiv(patches, config["tokens"])
    launch(
        text_cross_attention_dq_kernel,
        (batch * num_heads * tiles,),
        {
            **tensors,
            "dq": grads[0],
            **written,
            **sizes(q, k, tiles),
            "captions": loop_bound(captions),
            **steps,
        },
        {
            **constants,
            **head_constants(q, num_heads, config),
            "TOKENS": config["tokens"],
            "WORDS": block_of_words(words),
        },
        **launch_options(config),
    )
    config = config_for("dkv", q, num_heads)
    tiles = triton.cdiv(patches, config["tokens"])
    block = min(block_of_words(words), config["words"])
    word_tiles = triton.cdiv(words, block)
    launch(
        text_cross_attention_dkv_kernel,
        (batch * captions * num_heads * word_tiles,),
        {
            **tensors,
            **written,
            "dk": grads[1],
            "dv": grads[2],
            **sizes(q, k, tiles),
            "tiles": loop_bound(tiles),
            "word_tiles": word_tiles,
            **steps,
        },
        {
            **constants,
            **head_constants(q, num_heads, config),
            "TOKENS": config["tokens"],
            "WORDS": block,
        },
        **launch_options(config),
    )
    return grads


def compile_cases() -> list[CompileCase]:
    """As the forward kernel's; the words are described as there."""

    def call(
        dtype: torch.dtype, heads: int, words: int, pool: str, similarity: str, masked: bool
    ) -> object:
        q, k, masks = compiled_inputs(dtype, words, masked)
        grad = torch.empty((16, 8, 116, 384) if pool == "none" else q.shape)
        winner = torch.zeros(q.shape, dtype=torch.uint8)
        return text_cross_attention_backward(
            grad, torch.ones(()), winner, q, k, k, *masks, heads, None, pool, similarity, tau=0.1
        )

    calls: dict[str, Callable[[], object]] = {
        f"text_cross_attention_backward-{case[0]}": partial(call, *case[1:]) for case in COMPILED
    }
    # What belongs to single words and tokens takes narrow accesses beside those of rows.
    cases = recorded_cases(CONFIGS, calls, narrow=frozenset(calls))
    return distinct(cases, known=forward_cases())


def traffic_cases() -> list[TrafficCase]:
    """As the forward kernel's."""
    q, k = torch.ones(4, 38, 80), torch.ones(2, 3, 20, 80)
    winner = torch.zeros(q.shape, dtype=torch.uint8)
    call = partial(
        text_cross_attention_backward, q.clone(), torch.ones(()), winner, q, k, k.clone(),
        None, None, None, 1, None, "max", "relu", 0.1,
    )  # fmt: skip
    inputs = (q.numel() + 2 * k.numel()) * 4
    least = Cost(read=inputs + q.numel() * 5 + 4, written=inputs)
    return [TrafficCase("text_cross_attention_backward-max", call, least)]
