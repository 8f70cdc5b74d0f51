"""The Triton kernel: gather, LayerNorm, loss and gradient of a token, with both rows read once."""

from __future__ import annotations

from collections.abc import Callable
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
from jepa_fast.ops._triton_rows import columns_of, compute_dtype
from jepa_fast.ops.latent_loss.reference import empty_slope
from jepa_fast.perf.race import Cost

CONFIGS = Path(__file__).parent / "configs"


@triton.jit
def latent_loss_kernel(
    prediction,  # [M * B, Kt, D] by the strides below; D without gaps
    teacher,  # [B, N, D] by the strides below; D without gaps
    index,  # [B, M, Kt]
    mask,  # [B, M, Kt], or index again without one
    losses,  # [M * B * Kt]
    slope,  # [M * B, Kt, D], or losses again without it
    count,  # [1] tokens that count, float64
    tokens,  # M * B * Kt
    batch,
    hidden,  # Kt
    width,
    sequence_stride,
    token_stride,
    image_stride,
    patch_stride,
    beta,
    eps,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MASKED: tl.constexpr,
    SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCKS: tl.constexpr,  # M
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.arange(0, BLOCK)
    columns = tl.cast(width, COMPUTE)  # a width of 1 is a constant, without methods
    of_tokens = 1.0 / tl.load(count)
    of_elements = (of_tokens / width).to(COMPUTE)
    of_tokens = of_tokens.to(COMPUTE)
    for i in tl.static_range(ROWS):
        token = tl.program_id(0).to(tl.int64) * ROWS + i
        sequence, k = token // hidden, token % hidden
        b, m = sequence % batch, sequence // batch
        place = (b * BLOCKS + m) * hidden + k
        exists = token < tokens
        counts = exists
        if MASKED:
            counts = exists & (tl.load(mask + place, mask=exists, other=0) != 0)
        patch = tl.load(index + place, mask=exists, other=0).to(tl.int64)
        # Tokens that do not count are not read.
        present = columns_of(counts, d, width)
        target = tl.load(
            teacher + b * image_stride + patch * patch_stride + d, mask=present, other=0.0
        ).to(COMPUTE)
        predicted = tl.load(
            prediction + sequence * sequence_stride + k * token_stride + d,
            mask=present,
            other=0.0,
        ).to(COMPUTE)
        if NORMALIZE:
            about = tl.sum(target, 0) / columns
            centred = tl.where(present, target - about, 0.0)
            # What the mean's rounding has left. Of single numbers, float64 costs nothing.
            rest = tl.sum(centred, 0).to(tl.float64) / width
            variance = tl.sum(centred * centred, 0).to(tl.float64) / width - rest * rest
            scale = (1.0 / tl.sqrt(variance + eps)).to(COMPUTE)
            target = (target - (about.to(tl.float64) + rest).to(COMPUTE)) * scale
        # Tokens that do not count have residual 0, and so do columns beyond the width.
        residual = tl.where(present, predicted - target, 0.0)
        distance = tl.abs(residual)
        if KIND == "smooth_l1":
            near = tl.where(beta < distance, beta, distance)
            loss = tl.sum(near * (distance - 0.5 * near), 0) / (beta * columns)
            direction = residual / beta
            direction = tl.where(direction > 1.0, 1.0, direction)
            direction = tl.where(direction < -1.0, -1.0, direction) * of_elements
        elif KIND == "l1":
            loss = tl.sum(distance, 0) / columns
            sign = tl.where(residual > 0.0, 1.0, tl.where(residual < 0.0, -1.0, residual))
            direction = sign * of_elements
        elif KIND == "l2":
            loss = tl.sum(residual * residual, 0) / columns
            direction = 2.0 * residual * of_elements
        else:
            loss = tl.sqrt(tl.sum(residual * residual, 0))
            # The subgradient 0 where the residual is 0.
            direction = residual / tl.where(loss == 0.0, 1.0, loss) * of_tokens
        tl.store(losses + token, loss, mask=exists)
        if SLOPE:
            value = direction.to(slope.dtype.element_ty)
            tl.store(slope + token * width + d, value, mask=columns_of(exists, d, width))


def latent_loss(
    prediction: Tensor,
    teacher: Tensor,
    target_index: Tensor,
    target_mask: Tensor | None,
    kind: str,
    normalize_target: bool,
    beta: float,
    eps: float,
    with_slope: bool,
) -> tuple[Tensor, Tensor]:
    """As `reference.latent_loss_and_slope`."""
    check_index_range("latent_loss", "target_index", target_index, teacher.shape[1])
    wide = torch.promote_types(prediction.dtype, torch.float32)
    slope = empty_slope(prediction, with_slope)
    batch, blocks, hidden = target_index.shape
    tokens, width = target_index.numel(), prediction.shape[2]
    losses = prediction.new_empty(tokens, dtype=wide)
    if target_mask is None:
        count = torch.full((1,), max(tokens, 1), dtype=torch.float64, device=prediction.device)
    else:
        target_mask = target_mask.contiguous()
        count = target_mask.sum().clamp(min=1).to(torch.float64).view(1)
    prediction, teacher = without_gaps(prediction), without_gaps(teacher)
    target_index = target_index.contiguous()
    config = _configs.lookup(CONFIGS, "forward", prediction.device)
    block = max(16, triton.next_power_of_2(width))
    launch(
        latent_loss_kernel,
        (triton.cdiv(tokens, config["rows"]),),
        {
            "prediction": prediction,
            "teacher": teacher,
            "index": target_index,
            "mask": target_index if target_mask is None else target_mask,
            "losses": losses,
            "slope": slope if with_slope else losses,
            "count": count,
            "tokens": tokens,
            "batch": batch,
            "hidden": max(hidden, 1),
            "width": width,
            "sequence_stride": prediction.stride(0),
            "token_stride": prediction.stride(1),
            "image_stride": teacher.stride(0),
            "patch_stride": teacher.stride(1),
            "beta": float(beta),
            "eps": float(eps),
        },
        {
            "KIND": "l1" if kind == "smooth_l1" and beta == 0 else kind,
            "NORMALIZE": normalize_target,
            "MASKED": target_mask is not None,
            "SLOPE": with_slope,
            "COMPUTE": compute_dtype(prediction.dtype),
            "BLOCKS": blocks,
            "ROWS": config["rows"],
            "BLOCK": block,
        },
        row_warps(block, prediction, teacher),
    )
    return (losses.sum(dtype=torch.float64) / count[0]).to(wide), slope


def compile_cases() -> list[CompileCase]:
    """The kinds of the methods, a ViT-L under autocast and a ViT-S in float32."""

    def call(dtype: torch.dtype, width: int, kind: str, masked: bool, with_slope: bool) -> object:
        index = torch.zeros(4, 4, 33, dtype=torch.int64)
        mask = torch.ones(index.shape, dtype=torch.bool) if masked else None
        prediction = torch.empty(16, 33, width, dtype=dtype)
        teacher = torch.empty(4, 196, width, dtype=dtype)
        return latent_loss(prediction, teacher, index, mask, kind, True, 1.0, 1e-5, with_slope)

    brain, single = torch.bfloat16, torch.float32
    wide: dict[str, Callable[[], object]] = {
        "latent_loss-bfloat16-1024-smooth_l1": partial(call, brain, 1024, "smooth_l1", False, True),
        "latent_loss-bfloat16-1024-l2_norm-masked": partial(
            call, brain, 1024, "l2_norm", True, True
        ),
        "latent_loss-float32-384-l1": partial(call, single, 384, "l1", False, True),
        "latent_loss-float32-384-l2-forward": partial(call, single, 384, "l2", False, False),
    }
    odd = {"latent_loss-float32-63-smooth_l1": partial(call, single, 63, "smooth_l1", False, True)}
    return recorded_cases(CONFIGS, {**wide, **odd}, narrow=frozenset(odd))


def traffic_cases() -> list[TrafficCase]:
    """Blocks without a patch in common, with the gradient and without."""
    batch, blocks, hidden, width = 2, 2, 3, 80
    prediction, teacher = torch.ones(blocks * batch, hidden, width), torch.ones(batch, 9, width)
    index = torch.stack([torch.randperm(9)[: blocks * hidden] for _ in range(batch)])
    index = index.view(batch, blocks, hidden)
    rows, numbers = prediction.numel() * 4, index.numel()
    read = Cost(read=2 * rows + numbers * 8 + 8, written=numbers * 4)
    call = partial(latent_loss, prediction, teacher, index, None, "smooth_l1", True, 1.0, 1e-5)
    return [
        TrafficCase("latent_loss-forward", partial(call, False), read),
        TrafficCase("latent_loss-with-gradient", partial(call, True), read + Cost(written=rows)),
    ]
