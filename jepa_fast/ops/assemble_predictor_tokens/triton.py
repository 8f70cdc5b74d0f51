"""The Triton kernels: every token written once, every gradient read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_fast.ops import _configs
from jepa_fast.ops._checks import check_index_range
from jepa_fast.ops._compile import CompileCase
from jepa_fast.ops._launch import launch, recorded_cases, row_warps
from jepa_fast.ops._rows import without_gaps
from jepa_fast.ops._traffic import TrafficCase
from jepa_fast.ops._triton_rows import (
    block_of,
    columns_of,
    compensated_sum,
    compute_dtype,
    grid_of,
    sum_rows,
)
from jepa_fast.ops.assemble_predictor_tokens.reference import empty_tokens
from jepa_fast.perf.race import Cost

CONFIGS = Path(__file__).parent / "configs"


@triton.jit
def assemble_predictor_tokens_kernel(
    context,  # [B, Kc, d] by the strides below; d without gaps
    mask_token,  # [d]
    pos_embed,  # [N, d]
    context_index,  # [B, Kc]
    target_index,  # [B, M, Kt]
    out,  # [M * B, Kc + Kt, d]
    batch,
    kept,  # Kc
    hidden,  # Kt
    context_tiles,  # programs for context rows; those after them are for mask tokens
    width,
    image_stride,
    token_stride,
    COMPUTE: tl.constexpr,
    BLOCKS: tl.constexpr,  # M
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.program_id(0).to(tl.int64)
    images = tl.full([], 0, tl.int64) + batch  # products below can pass 2^31
    length = kept + hidden
    if tile < context_tiles:
        for i in tl.static_range(ROWS):
            row = tile * ROWS + i
            exists = row < images * kept
            inside = columns_of(exists, d, width)
            b, k = row // kept, row % kept
            at = tl.load(context_index + row, mask=exists, other=0).to(tl.int64)
            token = tl.load(
                context + b * image_stride + k * token_stride + d, mask=inside, other=0.0
            )
            position = tl.load(pos_embed + at * width + d, mask=inside, other=0.0)
            value = (token.to(COMPUTE) + position).to(out.dtype.element_ty)
            for m in tl.static_range(BLOCKS):
                place = (m * images + b) * length + k
                tl.store(out + place * width + d, value, mask=inside)
    else:
        mask = tl.load(mask_token + d, mask=d < width, other=0.0)
        for i in tl.static_range(ROWS):
            row = (tile - context_tiles) * ROWS + i
            exists = row < images * BLOCKS * hidden
            inside = columns_of(exists, d, width)
            b, m, k = row // hidden // BLOCKS, row // hidden % BLOCKS, row % hidden
            at = tl.load(target_index + row, mask=exists, other=0).to(tl.int64)
            position = tl.load(pos_embed + at * width + d, mask=inside, other=0.0)
            place = (m * images + b) * length + kept + k
            value = (mask + position).to(out.dtype.element_ty)
            tl.store(out + place * width + d, value, mask=inside)


@triton.jit
def sum_contexts_kernel(
    grad,  # [M * B, Kc + Kt, d] by the strides below; d without gaps
    out,  # [B, Kc, d]
    batch,
    kept,
    width,
    sequence_stride,
    token_stride,
    COMPUTE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    images = tl.full([], 0, tl.int64) + batch
    for i in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        inside = columns_of(row < images * kept, d, width)
        b, k = row // kept, row % kept
        total = tl.zeros([BLOCK], COMPUTE)
        for m in tl.static_range(BLOCKS):
            source = grad + (m * images + b) * sequence_stride + k * token_stride
            total += tl.load(source + d, mask=inside, other=0.0).to(COMPUTE)
        tl.store(out + row * width + d, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_masks_kernel(
    grad,  # as above
    out,  # [programs, d] float64: sums of the mask tokens' gradients, ROWS each
    rows,  # M * B * Kt
    kept,
    hidden,
    width,
    sequence_stride,
    token_stride,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    total = tl.zeros([BLOCK], COMPUTE)
    lost = tl.zeros([BLOCK], COMPUTE)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        source = grad + (row // hidden) * sequence_stride + (kept + row % hidden) * token_stride
        values = tl.load(source + d, mask=columns_of(row < rows, d, width), other=0.0).to(COMPUTE)
        total, lost = compensated_sum(total, lost, values)
    total = total.to(tl.float64) + lost.to(tl.float64)
    tl.store(out + tl.program_id(0).to(tl.int64) * width + d, total, mask=inside)


def assemble_predictor_tokens(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    context_index: Tensor,
    target_index: Tensor,
) -> Tensor:
    """As `reference.assemble_predictor_tokens`."""
    for name, index in (("context_index", context_index), ("target_index", target_index)):
        check_index_range("assemble_predictor_tokens", name, index, pos_embed.shape[0])
    (batch, blocks, hidden), (_, kept, width) = target_index.shape, context.shape
    out = empty_tokens(context, mask_token, pos_embed, target_index)
    wide = torch.promote_types(out.dtype, torch.float32)
    context = without_gaps(context)
    mask_token, pos_embed = mask_token.to(wide).contiguous(), pos_embed.to(wide).contiguous()
    config = _configs.lookup(CONFIGS, "forward", context.device)
    context_tiles, parts = grid_of(batch * kept, config, width)
    mask_tiles, _ = grid_of(batch * blocks * hidden, config, width)
    launch(
        assemble_predictor_tokens_kernel,
        (context_tiles + mask_tiles, parts),
        {
            "context": context,
            "mask_token": mask_token,
            "pos_embed": pos_embed,
            "context_index": context_index.contiguous(),
            "target_index": target_index.contiguous(),
            "out": out,
            "batch": batch,
            "kept": kept,
            "hidden": hidden,
            "context_tiles": context_tiles,
            "width": width,
            "image_stride": context.stride(0),
            "token_stride": context.stride(1),
        },
        {
            "COMPUTE": compute_dtype(out.dtype),
            "BLOCKS": blocks,
            "ROWS": config["rows"],
            "BLOCK": block_of(width),
        },
        row_warps(block_of(width), context, out),
    )
    return out


def assemble_predictor_tokens_backward(
    grad: Tensor, context_index: Tensor, target_index: Tensor, patches: int, needs: Sequence[bool]
) -> list[Tensor]:
    """As `reference.assemble_predictor_tokens_backward`."""
    grad = without_gaps(grad)
    grads = []
    if needs[0]:
        grads.append(_sum_contexts(grad, context_index, target_index, grad.dtype))
    if needs[1]:
        grads.append(_sum_masks(grad, context_index, target_index).to(grad.dtype))
    if needs[2]:
        grads.append(_sum_positions(grad, context_index, target_index, patches).to(grad.dtype))
    return grads


def _sum_contexts(
    grad: Tensor, context_index: Tensor, target_index: Tensor, dtype: torch.dtype
) -> Tensor:
    """[B, Kc, d]: a context token stands in all sequences of its image."""
    (batch, kept), blocks, width = context_index.shape, target_index.shape[1], grad.shape[2]
    out = grad.new_empty((batch, kept, width), dtype=dtype)
    config = _configs.lookup(CONFIGS, "context", grad.device)
    launch(
        sum_contexts_kernel,
        grid_of(batch * kept, config, width),
        {
            "grad": grad,
            "out": out,
            "batch": batch,
            "kept": max(kept, 1),
            "width": width,
            "sequence_stride": grad.stride(0),
            "token_stride": grad.stride(1),
        },
        {
            "COMPUTE": compute_dtype(dtype),
            "BLOCKS": blocks,
            "ROWS": config["rows"],
            "BLOCK": block_of(width),
        },
        row_warps(block_of(width), grad, out),
    )
    return out


def _sum_masks(grad: Tensor, context_index: Tensor, target_index: Tensor) -> Tensor:
    """[d] in float64: programs sum some rows each, and PyTorch their sums."""
    rows, width = target_index.numel(), grad.shape[2]
    config = _configs.lookup(CONFIGS, "mask_token", grad.device)
    grid = grid_of(rows, config, width)
    parts = grad.new_empty((grid[0], width), dtype=torch.float64)
    launch(
        sum_masks_kernel,
        grid,
        {
            "grad": grad,
            "out": parts,
            "rows": rows,
            "kept": context_index.shape[1],
            "hidden": max(target_index.shape[2], 1),
            "width": width,
            "sequence_stride": grad.stride(0),
            "token_stride": grad.stride(1),
        },
        {
            "COMPUTE": compute_dtype(grad.dtype),
            "ROWS": config["rows"],
            "BLOCK": block_of(width),
        },
        row_warps(block_of(width), grad),
    )
    return parts.sum(0)


def _sum_positions(
    grad: Tensor, context_index: Tensor, target_index: Tensor, patches: int
) -> Tensor:
    """[N, d] in float64. Fixed embeddings have no gradient, so two sums will do."""
    kept, width = context_index.shape[1], grad.shape[2]
    of_contexts, of_targets = (
        grad.new_empty((patches, width), dtype=torch.float64) for _ in range(2)
    )
    config = _configs.lookup(CONFIGS, "context", grad.device)
    contexts = _sum_contexts(grad, context_index, target_index, torch.float64)
    sum_rows(contexts, context_index, of_contexts, config)
    # As the sequences are: block-major.
    index = target_index.transpose(0, 1).flatten(0, 1)
    sum_rows(grad[:, kept:], index, of_targets, config)
    return of_contexts.add_(of_targets)


def compile_cases() -> list[CompileCase]:
    """I-JEPA's predictor with a context under autocast, in float32, and of an odd width."""

    def calls(dtype: torch.dtype, width: int) -> dict[str, Callable[[], object]]:
        context = torch.empty(4, 82, width, dtype=dtype)
        fixed = torch.empty(width), torch.empty(196, width)
        index = torch.zeros(4, 82, dtype=torch.int64), torch.zeros(4, 4, 33, dtype=torch.int64)
        grad = torch.empty(16, 82 + 33, width)
        needs = (True, True, True)
        backward = partial(assemble_predictor_tokens_backward, grad, *index, 196, needs)
        name = f"{str(dtype).removeprefix('torch.')}-{width}"
        return {
            f"assemble_predictor_tokens-{name}": partial(
                assemble_predictor_tokens, context, *fixed, *index
            ),
            f"assemble_predictor_tokens_backward-{name}": backward,
        }

    odd = calls(torch.float32, 63)
    wide = {**calls(torch.bfloat16, 384), **calls(torch.float32, 384)}
    return recorded_cases(CONFIGS, {**wide, **odd}, narrow=frozenset(odd))


def traffic_cases() -> list[TrafficCase]:
    """Two images with three blocks, in which no patch is named twice."""
    batch, kept, blocks, hidden, patches, width = 2, 5, 3, 2, 11, 80
    context, fixed = torch.ones(batch, kept, width), (torch.ones(width), torch.ones(patches, width))
    named = torch.stack([torch.randperm(patches) for _ in range(batch)])
    index = named[:, :kept], named[:, kept:].view(batch, blocks, hidden)
    tokens = batch * blocks * (kept + hidden) * width * 4
    contexts = context.numel() * 4
    indices = named.numel() * 8
    grad = torch.ones(blocks * batch, kept + hidden, width)
    needs = (True, True, False)
    return [
        TrafficCase(
            "assemble_predictor_tokens-float32",
            partial(assemble_predictor_tokens, context, *fixed, *index),
            # A position of each named patch; the table is the same for all images.
            Cost(read=contexts + (1 + patches) * width * 4 + indices, written=tokens),
        ),
        TrafficCase(
            "assemble_predictor_tokens_backward-float32",
            partial(assemble_predictor_tokens_backward, grad, *index, patches, needs),
            Cost(read=tokens, written=contexts + width * 4),
        ),
    ]
