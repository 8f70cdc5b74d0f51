"""The forward kernel in Triton: attention to every caption, their pool and the sparsity term.

A program takes a tile of one image's tokens, of all its sequences, and one head. It goes over the
image's captions: scores, softmax over all words of the caption at once, values, and the pool, which
stays in registers. Heads are cut into chunks of a power of two: a head of width 384 is three
products of width 128.

Sizes: B images, M sequences an image, T tokens a sequence, P = M * T tokens an image; token p of
image b is token p % T of row p // T * B + b. C captions of S words, h heads of width e.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_fast.ops import _configs
from jepa_fast.ops._compile import CompileCase
from jepa_fast.ops._launch import distinct, launch, loop_bound, most_registers, recorded_cases
from jepa_fast.ops._rows import without_gaps
from jepa_fast.ops._traffic import TrafficCase
from jepa_fast.ops.text_cross_attention import contract
from jepa_fast.ops.text_cross_attention.reference import empty_outputs, score_scale
from jepa_fast.perf.race import Cost

CONFIGS = Path(__file__).parent / "configs"
EPSILON: tl.constexpr = tl.constexpr(1e-8)  # vectors shorter than this count as this long
_TINY: tl.constexpr = tl.constexpr(1e-38)
_SHORTEST_DOT = 16  # tensor cores take no fewer words
_TIGHT = 101_376  # shared memory of sm_86, sm_89 and sm_120


@triton.jit
def chunk_mask(there, c: tl.constexpr, CHUNK: tl.constexpr, HEAD: tl.constexpr):
    """What of chunk c of a head there is, in the rows that are there."""
    mask = there[:, None]
    if HEAD % CHUNK != 0:
        mask = mask & (tl.arange(0, CHUNK) < HEAD - c * CHUNK)[None, :]
    return mask


@triton.jit
def load_chunk(rows, there, c: tl.constexpr, CHUNK: tl.constexpr, HEAD: tl.constexpr):
    """Chunk c of a head's rows, which begin at the pointers `rows`; 0 where they are not there."""
    # In this order, as all chunks then share their addresses but for a constant.
    places = rows[:, None] + tl.arange(0, CHUNK)[None, :] + c * CHUNK
    return tl.load(places, mask=chunk_mask(there, c, CHUNK, HEAD), other=0.0)


@triton.jit
def store_chunk(rows, there, value, c: tl.constexpr, CHUNK: tl.constexpr, HEAD: tl.constexpr):
    """Stores chunk c of a head's rows, which begin at the pointers `rows`."""
    places = rows[:, None] + tl.arange(0, CHUNK)[None, :] + c * CHUNK
    value = value.to(rows.dtype.element_ty)
    tl.store(places, value, mask=chunk_mask(there, c, CHUNK, HEAD))


@triton.jit
def token_offsets(p, image, batch, tokens, row_stride, token_stride):
    """Where the tokens p of an image begin in a tensor [M * B, T, ...]."""
    p = p.to(tl.int32)  # division in 64 bits is slow
    row = (p // tokens).to(tl.int64) * batch + image
    return row * row_stride + (p % tokens).to(tl.int64) * token_stride


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to the last digits of small values, too."""
    small = tl.exp(-tl.abs(x))
    one_more = 1.0 + small
    # log(1 + small) loses the digits of small that 1 + small does; this puts them back.
    exact = tl.where(one_more == 1.0, 1.0, one_more - 1.0)
    log1p = tl.where(one_more == 1.0, small, tl.log(one_more) * (small / exact))
    return tl.where(x > 0.0, x, 0.0) + log1p


@triton.jit
def describe_words_kernel(
    k,  # [B, C, S, h * e] by the strides below
    word_mask,  # [B, C, S], or k again without one
    caption_mask,  # [B, C], or k again without one
    counted,  # [B] tokens that count in the sparsity
    inverse,  # [B, C, h, S]: 1 / |k|, 0 where there is no word
    pairs,  # [B, C] pairs of the caption, if it has words, and a token that counts
    captions,
    words,
    image_stride,
    caption_stride,
    word_stride,
    WORD_MASK: tl.constexpr,
    CAPTION_MASK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WORDS: tl.constexpr,
):
    place = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    image, n = place // captions, place % captions
    w = tl.arange(0, WORDS)
    there = w < words
    valid = there
    if WORD_MASK:
        valid = valid & (tl.load(word_mask + place * words + w, mask=there, other=0) != 0)
    if CAPTION_MASK:
        valid = valid & (w < tl.where(tl.load(caption_mask + place) != 0, words, 0))
    rows = (
        k + image * image_stride + n * caption_stride + head * HEAD + w.to(tl.int64) * word_stride
    )
    square = tl.zeros([WORDS], tl.float32)
    for c in tl.static_range(CHUNKS):
        key = load_chunk(rows, valid, c, CHUNK, HEAD).to(tl.float32)
        square += tl.sum(key * key, 1)
    length = tl.sqrt(square)
    found = 1.0 / tl.where(length < EPSILON, EPSILON, length)
    # A length beyond float32's range, or NaN, still is a word's.
    found = tl.where(valid, tl.where(found >= _TINY, found, _TINY), 0.0)
    tl.store(inverse + (place * HEADS + head) * words + w, found, mask=there)
    has_words = tl.max(valid.to(tl.int32), 0) > 0
    number = tl.where(has_words, tl.load(counted + image), 0)
    tl.store(pairs + place, number, mask=head == 0)


@triton.jit
def text_cross_attention_kernel(
    q,  # [M * B, T, h * e] by the strides below, as all that have strides; h * e without gaps
    k,  # [B, C, S, h * e]
    v,  # [B, C, S, h * e]
    residual,  # [M * B, T, h * e]
    inverse,  # [B, C, h, S], of describe_words_kernel
    token_mask,  # [M * B, T], or q again without one
    features,  # [M * B, T, h * e], or [M * B, C, T, h * e]
    winner,  # [M * B, T, h * e], or features again without
    sparsity,  # a sum a program
    batch,
    patches,  # P
    tokens,  # T
    captions,  # C
    words,  # S
    tiles,  # of tokens of an image
    q_row_stride,
    q_token_stride,
    residual_row_stride,
    residual_token_stride,
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
    caption_step = image * 0 + captions  # products below can pass 2^31
    token_step = image * 0 + tokens
    word_step = image * 0 + words

    queries = q + token_offsets(p, image, batch, tokens, q_row_stride, q_token_stride) + head * HEAD
    query = ()
    square = tl.zeros([TOKENS], tl.float32)
    for c in tl.static_range(CHUNKS):
        chunk = load_chunk(queries, exists, c, CHUNK, HEAD)
        query += (chunk,)
        square += tl.sum(chunk.to(tl.float32) * chunk.to(tl.float32), 1)
    inverse_q = inverse_query_length(square, scale)

    start: tl.constexpr = float("-inf") if POOL == "max" else 0.0
    best = ()
    for _ in tl.static_range(CHUNKS):
        best += (tl.full([TOKENS, CHUNK], start, tl.float32),)
    # The winners of three chunks lie in one integer, a byte each: a third of the registers.
    winners = ()
    for _ in tl.static_range((CHUNKS + 2) // 3):
        winners += (tl.zeros([TOKENS, CHUNK], tl.int32),)

    w = tl.arange(0, WORDS)
    word_there = w < words
    keys = k + image * k_image_stride + head * HEAD + w.to(tl.int64) * k_word_stride
    values = v + image * v_image_stride + head * HEAD + w.to(tl.int64) * v_word_stride
    lengths = inverse + (image * caption_step * HEADS + head) * words + w
    similar = tl.zeros([TOKENS], tl.float32)
    present = tl.zeros([], tl.int32)
    for n in range(captions):
        inverse_k = tl.load(lengths, mask=word_there, other=0.0)
        valid = inverse_k > 0.0
        here = tl.max(inverse_k, 0) > 0.0
        score = tl.zeros([TOKENS, WORDS], tl.float32)
        for c in tl.static_range(CHUNKS):
            key = load_chunk(keys, word_there, c, CHUNK, HEAD)
            score = tl.dot(query[c], tl.trans(key), score, input_precision="ieee")

        cosine = score * inverse_q[:, None] * inverse_k[None, :]
        if SIMILARITY == "relu":
            found = tl.where(cosine <= 0.0, 0.0, cosine)  # NaN stays
        else:
            found = softplus(cosine / tau)
        similar += tl.sum(tl.where(valid[None, :], found, 0.0), 1)

        score = tl.where(valid[None, :], score * scale, float("-inf"))
        highest = tl.where(here, tl.max(score, 1), 0.0)
        share = tl.exp(score - highest[:, None])
        total = tl.sum(share, 1)
        share = share.to(v.dtype.element_ty)
        inverse_total = 1.0 / tl.where(here, total, 1.0)
        new_best = ()
        new_winners = winners
        for c in tl.static_range(CHUNKS):
            # A missing word's values are not read: they could be NaN.
            value = load_chunk(values, valid, c, CHUNK, HEAD)
            y = tl.dot(share, value, input_precision="ieee") * inverse_total[:, None]
            if POOL == "max":
                y = tl.where(here, y, float("-inf"))
                wins = (y > best[c]) | (y != y)
                new_best += (tl.where(wins, y, best[c]),)
                new_winners = with_winner(new_winners, wins, n, c)
            elif POOL == "mean":
                new_best += (best[c] + y,)
            else:
                new_best += (best[c],)
                column = head * HEAD
                before = residual + column
                before += token_offsets(
                    p, image, batch, tokens, residual_row_stride, residual_token_stride
                )
                after = features + column + n * token_step * width
                after += token_offsets(
                    p, image, batch, tokens, caption_step * token_step * width, width
                )
                y += load_chunk(before, exists, c, CHUNK, HEAD).to(tl.float32)
                store_chunk(after, exists, y, c, CHUNK, HEAD)
        best = new_best
        winners = new_winners
        present += here.to(tl.int32)
        keys += k_caption_stride
        values += v_caption_stride
        lengths += word_step * HEADS

    if POOL != "none":
        before = residual + head * HEAD
        before += token_offsets(p, image, batch, tokens, residual_row_stride, residual_token_stride)
        after = token_offsets(p, image, batch, tokens, token_step * width, width) + head * HEAD
        for c in tl.static_range(CHUNKS):
            y = best[c]
            if POOL == "max":
                y = tl.where(present > 0, y, 0.0)
                number = (winners[c // 3] >> (8 * (c % 3))) & 255
                store_chunk(winner + after, exists, number, c, CHUNK, HEAD)
            else:
                y = y / tl.where(present > 0, present, 1).to(tl.float32)
            y += load_chunk(before, exists, c, CHUNK, HEAD).to(tl.float32)
            store_chunk(features + after, exists, y, c, CHUNK, HEAD)
    counts = exists
    if TOKEN_MASK:
        at = token_mask + token_offsets(p, image, batch, tokens, token_step, 1)
        counts = exists & (tl.load(at, mask=exists, other=0) != 0)
    tl.store(sparsity + tl.program_id(0), tl.sum(tl.where(counts, similar, 0.0), 0))


@triton.jit
def inverse_query_length(square, scale):
    """1 / |q|; as the reference has it, it is scaled queries that have a least length."""
    length, least = tl.sqrt(square), EPSILON / scale
    return 1.0 / tl.where(length < least, least, length)


@triton.jit
def with_winner(winners, wins, n, c: tl.constexpr):
    """The winners of all chunks, n where it wins in chunk c."""
    found = ()
    for i in tl.static_range(len(winners)):
        if i == c // 3:
            shift: tl.constexpr = 8 * (c % 3)
            others = winners[i] & ~(255 << shift)
            found += (tl.where(wins, others | (n << shift), winners[i]),)
        else:
            found += (winners[i],)
    return found


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
    room: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.text_cross_attention`; `room` is the shared memory of a block in bytes, that of
    the GPU if None."""
    if room is None and q.is_cuda:
        room = contract.room(q.device)
    features, sparsity, winner = empty_outputs(q, k, residual, pool)
    rows, tokens, _ = q.shape
    batch, captions, words = k.shape[:3]
    q, k, v, residual = map(without_gaps, (q, k, v, residual))
    ahead = contract.shared_memory(q.shape[2] // num_heads, words, loading_ahead=True)
    tight = ("tight",) if room is not None and room < ahead else ()
    config = config_for("forward", q, num_heads, words, (*tight, similarity, pool))
    inverse, pairs = describe_words(q, k, word_mask, caption_mask, token_mask, num_heads)
    patches = rows // max(batch, 1) * tokens
    tiles = triton.cdiv(patches, config["tokens"])
    partial_sums = q.new_empty(batch * num_heads * tiles, dtype=torch.float32)
    launch(
        text_cross_attention_kernel,
        (batch * num_heads * tiles,),
        {
            "q": q,
            "k": k,
            "v": v,
            "residual": residual,
            "inverse": inverse,
            "token_mask": q if token_mask is None else token_mask.contiguous(),
            "features": features,
            "winner": winner if pool == "max" else features,
            "sparsity": partial_sums,
            **sizes(q, k, tiles),
            "captions": loop_bound(captions),
            **strides(q=q, residual=residual, k=k, v=v),
            "scale": score_scale(scale, q, num_heads),
            "tau": float(tau),
        },
        {
            "POOL": pool,
            "SIMILARITY": similarity,
            "TOKEN_MASK": token_mask is not None,
            **head_constants(q, num_heads, config),
            "TOKENS": config["tokens"],
            "WORDS": block_of_words(words),
        },
        **launch_options(config),
    )
    sparsity.copy_(partial_sums.sum(dtype=torch.float64) / pairs.sum().clamp(min=1) / num_heads)
    return features, sparsity, winner


def describe_words(
    q: Tensor,
    k: Tensor,
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    token_mask: Tensor | None,
    num_heads: int,
) -> tuple[Tensor, Tensor]:
    """Inverse lengths of the words [B, C, h, S], 0 where there is none; pairs a caption [B, C]."""
    batch, captions, words = k.shape[:3]
    config = config_for("forward", q, num_heads, words)
    if token_mask is None:
        counted = torch.full((batch,), q[::batch, :, 0].numel() if batch else 0, device=q.device)
    else:
        counted = token_mask.view(q.shape[0] // max(batch, 1), batch, q.shape[1]).sum((0, 2))
    inverse = k.new_empty((batch, captions, num_heads, words), dtype=torch.float32)
    pairs = counted.new_empty((batch, captions))
    launch(
        describe_words_kernel,
        (batch * captions * num_heads,),
        {
            "k": k,
            "word_mask": k if word_mask is None else word_mask.contiguous(),
            "caption_mask": k if caption_mask is None else caption_mask.contiguous(),
            "counted": counted,
            "inverse": inverse,
            "pairs": pairs,
            "captions": captions,
            "words": words,
            "image_stride": k.stride(0),
            "caption_stride": k.stride(1),
            "word_stride": k.stride(2),
        },
        {
            "WORD_MASK": word_mask is not None,
            "CAPTION_MASK": caption_mask is not None,
            **head_constants(q, num_heads, config),
            "WORDS": block_of_words(words),
        },
        4,
    )
    return inverse, pairs


def config_for(
    kernel: str,
    q: Tensor,
    num_heads: int,
    words: int | None = None,
    variants: Sequence[str] = (),
) -> _configs.Config:
    """The launch config of a kernel by the width of its heads and, where it takes all words of a
    caption at once, by their number; a variant's own, where there is one."""
    head = q.shape[2] // num_heads
    key = f"{kernel}-{next((str(most) for most in (64, 128) if head <= most), 'wide')}"
    if words is not None:
        key += "-64" if block_of_words(words) <= 64 else "-128"
    return _configs.lookup(CONFIGS, key, q.device, variants)


def launch_options(config: _configs.Config) -> dict[str, int]:
    """Warps, stages and, where a config says so, the most registers a thread."""
    return {
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
        **most_registers(config),
    }


def head_constants(q: Tensor, num_heads: int, config: _configs.Config) -> dict[str, int]:
    """How heads are cut into chunks: the widest that divide a head, else padded.

    Where not every warp has tokens of its own, chunks are wider than the tile has tokens: of a
    product that is no wider than high, Triton gives warps rows alone, and some have others' again.
    """
    head, widest = q.shape[2] // num_heads, config["chunk"]
    narrowest = _SHORTEST_DOT
    if config["tokens"] < _SHORTEST_DOT * config["num_warps"]:
        narrowest = 2 * config["tokens"]
    if head <= widest:
        chunk = max(narrowest, triton.next_power_of_2(head))
    else:
        chunk = widest
        while chunk > narrowest and head % chunk:
            chunk //= 2
        if head % chunk:
            chunk = widest
    return {
        "HEADS": num_heads,
        "HEAD": head,
        "CHUNK": chunk,
        "CHUNKS": triton.cdiv(head, chunk),
    }


def block_of_words(words: int) -> int:
    """The words of a caption that a program takes at once: all."""
    return max(_SHORTEST_DOT, triton.next_power_of_2(words))


def sizes(q: Tensor, k: Tensor, tiles: int) -> dict[str, int]:
    """The sizes that the kernels take, by their names there."""
    rows, tokens, _ = q.shape
    batch, captions, words = k.shape[:3]
    return {
        "batch": batch,
        "patches": rows // max(batch, 1) * tokens,
        "tokens": tokens,
        "captions": captions,
        "words": words,
        "tiles": tiles,
    }


def strides(**tensors: Tensor) -> dict[str, int]:
    """The strides of all dimensions but the last, by the kernels' names of them."""
    names = {3: ("row", "token"), 4: ("image", "caption", "word")}
    return {
        f"{tensor}_{name}_stride": stride
        for tensor, value in tensors.items()
        for name, stride in zip(names[value.ndim], value.stride(), strict=False)
    }


COMPILED: tuple[tuple[str, torch.dtype, int, int, str, str, bool], ...] = (
    ("1x384-max", torch.bfloat16, 1, 64, "max", "relu", True),  # TC-JEPA's
    ("1x384-128-words-none", torch.bfloat16, 1, 128, "none", "relu", True),
    ("16x24-mean", torch.float16, 16, 64, "mean", "softplus", False),
    ("6x64-max", torch.bfloat16, 6, 64, "max", "relu", True),
    ("6x64-128-words-max", torch.bfloat16, 6, 128, "max", "relu", True),
    ("4x96-max", torch.bfloat16, 4, 64, "max", "relu", True),
    ("3x128-softplus", torch.bfloat16, 3, 64, "max", "softplus", True),
    ("3x128-128-words-max", torch.float16, 3, 128, "max", "relu", True),
)
"""Names of compile cases; their dtype, heads, words, pool, similarity, and whether masked: every
config, and with it each dtype and every option once, not their product."""


def compiled_inputs(
    dtype: torch.dtype, words: int, masked: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Queries, keys and the masks of a compile case."""
    q, k = torch.empty(16, 116, 384, dtype=dtype), torch.empty(4, 8, words, 384, dtype=dtype)
    if not masked:
        return q, k, (None, None, None)
    of_words, of_captions = (torch.ones(k.shape[:n], dtype=torch.bool) for n in (3, 2))
    return q, k, (of_words, of_captions, torch.ones(q.shape[:2], dtype=torch.bool))


def compile_cases() -> list[CompileCase]:
    """Those of `COMPILED`."""

    def call(
        dtype: torch.dtype,
        heads: int,
        words: int,
        pool: str,
        similarity: str,
        masked: bool,
        room: int | None = None,
    ) -> object:
        q, k, masks = compiled_inputs(dtype, words, masked)
        residual = torch.empty(q.shape)
        return text_cross_attention(
            q, k, k, residual, *masks, heads, None, pool, similarity, 0.1, room
        )

    calls: dict[str, Callable[[], object]] = {
        f"text_cross_attention-{case[0]}": partial(call, *case[1:]) for case in COMPILED
    }
    tight = partial(call, torch.bfloat16, 1, 64, "max", "relu", True, room=_TIGHT)
    calls["text_cross_attention-1x384-tight"] = tight
    # What belongs to single words and tokens takes narrow accesses beside those of rows.
    return distinct(recorded_cases(CONFIGS, calls, narrow=frozenset(calls)))


def traffic_cases() -> list[TrafficCase]:
    """Two images of two sequences, and captions of full length."""
    q, k = torch.ones(4, 38, 80), torch.ones(2, 3, 20, 80)
    masks = (None, None, None)
    call = partial(text_cross_attention, q, k, k.clone(), q.clone(), *masks, 1, None)
    read, written = (2 * q.numel() + 2 * k.numel()) * 4, q.numel() * 4
    return [
        TrafficCase(
            "text_cross_attention-max",
            partial(call, "max", "relu", 0.1),
            Cost(read=read, written=written + q.numel() + 4),
        ),
        TrafficCase(
            "text_cross_attention-none",
            partial(call, "none", "relu", 0.1),
            Cost(read=read, written=3 * written + 4),
        ),
    ]
