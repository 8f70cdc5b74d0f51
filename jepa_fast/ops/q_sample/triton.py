"""The Triton kernels: noise is drawn in registers, and drawn again where it is predicted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_fast.ops import _configs
from jepa_fast.ops._compile import CompileCase
from jepa_fast.ops._launch import launch, recorded_cases, row_warps
from jepa_fast.ops._normal import GROUP
from jepa_fast.ops._rows import without_gaps
from jepa_fast.ops._traffic import TrafficCase
from jepa_fast.ops._triton_normal import normals
from jepa_fast.ops._triton_rows import compute_dtype
from jepa_fast.ops.q_sample.reference import empty_slope
from jepa_fast.perf.race import Cost

CONFIGS = Path(__file__).parent / "configs"


@triton.jit
def noise_columns(target, x, columns, width, e, signal, noise, COMPUTE: tl.constexpr):
    inside = columns < width
    wide = tl.load(target + columns, mask=inside, other=0.0).to(COMPUTE)
    value = signal * wide + noise * e.to(COMPUTE)
    tl.store(x + columns, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def q_sample_kernel(
    target,  # [T, D] by the stride below; D without gaps
    signal,  # [n * T]
    noise,  # [n * T]
    seed,  # [1]
    x,  # [n * T, D]
    tokens,  # T
    width,
    token_stride,
    first_row,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64) * (BLOCK // 64) + tl.arange(0, BLOCK // 64)[:, None]
    lane = tl.arange(0, 16)[None, :]
    drawn = tl.load(seed).to(tl.uint64)
    e0, e1, e2, e3 = normals(drawn, token + first_row, group, lane)
    kept = tl.load(signal + token).to(COMPUTE)
    added = tl.load(noise + token).to(COMPUTE)
    source = target + token % tokens * token_stride
    row = x + token * width
    columns = group * 64 + lane
    noise_columns(source, row, columns, width, e0, kept, added, COMPUTE)
    noise_columns(source, row, columns + 16, width, e1, kept, added, COMPUTE)
    noise_columns(source, row, columns + 32, width, e2, kept, added, COMPUTE)
    noise_columns(source, row, columns + 48, width, e3, kept, added, COMPUTE)


@triton.jit
def squares_of_columns(
    prediction,
    target,
    slope,
    columns,
    width,
    e,
    factor,
    TARGET: tl.constexpr,
    SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    inside = columns < width
    wanted = e.to(COMPUTE)
    if TARGET:
        wanted = tl.load(target + columns, mask=inside, other=0.0).to(COMPUTE) - wanted
    predicted = tl.load(prediction + columns, mask=inside, other=0.0).to(COMPUTE)
    residual = tl.where(inside, predicted - wanted, 0.0)
    if SLOPE:
        value = (residual * factor).to(slope.dtype.element_ty)
        tl.store(slope + columns, value, mask=inside)
    return residual * residual


@triton.jit
def denoising_loss_kernel(
    prediction,  # [n * T, D]
    target,  # [T, D] by the stride below; D without gaps; prediction again without one
    seed,  # [1]
    sums,  # [n * T, programs of a row]
    slope,  # [n * T, D], or sums again without it
    factor,  # [1] of the slope
    tokens,  # T
    width,
    token_stride,
    first_row,
    TARGET: tl.constexpr,
    SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64) * (BLOCK // 64) + tl.arange(0, BLOCK // 64)[:, None]
    lane = tl.arange(0, 16)[None, :]
    e0, e1, e2, e3 = normals(tl.load(seed).to(tl.uint64), token + first_row, group, lane)
    row = prediction + token * width
    goal = target + token % tokens * token_stride
    out = slope
    if SLOPE:
        out = slope + token * width
    f = tl.load(factor).to(COMPUTE)
    c = group * 64 + lane
    total = squares_of_columns(row, goal, out, c, width, e0, f, TARGET, SLOPE, COMPUTE)
    total += squares_of_columns(row, goal, out, c + 16, width, e1, f, TARGET, SLOPE, COMPUTE)
    total += squares_of_columns(row, goal, out, c + 32, width, e2, f, TARGET, SLOPE, COMPUTE)
    total += squares_of_columns(row, goal, out, c + 48, width, e3, f, TARGET, SLOPE, COMPUTE)
    place = token * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + place, tl.sum(tl.sum(total, 1), 0))


def q_sample(target: Tensor, signal: Tensor, noise: Tensor, seed: Tensor, first_row: int) -> Tensor:
    """As `reference.q_sample`."""
    tokens, width = target.shape
    rows = signal.numel()
    target = without_gaps(target)
    x = target.new_empty((*signal.shape, width))
    block = _block("q_sample", target, width)
    launch(
        q_sample_kernel,
        (rows, triton.cdiv(width, block)),
        {
            "target": target,
            "signal": signal.contiguous(),
            "noise": noise.contiguous(),
            "seed": seed,
            "x": x,
            "tokens": max(tokens, 1),
            "width": width,
            "token_stride": target.stride(0),
            "first_row": first_row,
        },
        {"COMPUTE": compute_dtype(target.dtype), "BLOCK": block},
        row_warps(block // 4, target),
    )
    return x


def denoising_loss(
    prediction: Tensor, target: Tensor | None, seed: Tensor, first_row: int, with_slope: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.denoising_loss_and_slope`."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    tokens, width = prediction.shape[-2:]
    prediction = prediction.contiguous()
    other = prediction if target is None else without_gaps(target)
    slope = empty_slope(prediction, with_slope)
    block = _block("denoising_loss", prediction, width)
    rows, programs = prediction.shape[:-1].numel(), triton.cdiv(width, block)
    sums = prediction.new_empty((rows, programs), dtype=wide)
    count = max(prediction.numel(), 1)
    factor = torch.full((1,), 2 / count, dtype=torch.float64, device=prediction.device)
    launch(
        denoising_loss_kernel,
        (rows, programs),
        {
            "prediction": prediction,
            "target": other,
            "seed": seed,
            "sums": sums,
            "slope": slope if with_slope else sums,
            "factor": factor,
            "tokens": max(tokens, 1),
            "width": width,
            "token_stride": other.stride(-2),
            "first_row": first_row,
        },
        {
            "TARGET": target is not None,
            "SLOPE": with_slope,
            "COMPUTE": compute_dtype(prediction.dtype),
            "BLOCK": block,
        },
        row_warps(block // 4, prediction, other),
    )
    return (sums.sum(dtype=torch.float64) / count).to(wide), slope


def _block(key: str, rows: Tensor, width: int) -> int:
    """Columns of a program: whole groups of numbers that are drawn together."""
    most = _configs.lookup(CONFIGS, key, rows.device)["block"]
    return max(GROUP, min(most, triton.next_power_of_2(width)))


def compile_cases() -> list[CompileCase]:
    """A ViT-L's width under autocast, a ViT-S's in float32, and an odd one."""

    def noised(dtype: torch.dtype, width: int) -> object:
        level = torch.empty(2, 64)
        seed = torch.zeros(1, dtype=torch.int64)
        return q_sample(torch.empty(64, width, dtype=dtype), level, level, seed, 0)

    def loss(dtype: torch.dtype, width: int, with_target: bool, with_slope: bool) -> object:
        target = torch.empty(64, width) if with_target else None
        seed = torch.zeros(1, dtype=torch.int64)
        prediction = torch.empty(2, 64, width, dtype=dtype)
        return denoising_loss(prediction, target, seed, 0, with_slope)

    brain, single = torch.bfloat16, torch.float32
    wide: dict[str, Callable[[], object]] = {
        "q_sample-float32-384": partial(noised, single, 384),
        "q_sample-bfloat16-1024": partial(noised, brain, 1024),
        "denoising_loss-bfloat16-1024-velocity": partial(loss, brain, 1024, True, True),
        "denoising_loss-float32-384": partial(loss, single, 384, False, True),
        "denoising_loss-float32-384-forward": partial(loss, single, 384, False, False),
    }
    odd = {"denoising_loss-float32-63-velocity": partial(loss, single, 63, True, True)}
    return recorded_cases(CONFIGS, {**wide, **odd}, narrow=frozenset(odd))


def traffic_cases() -> list[TrafficCase]:
    """Two draws a token, with the noise drawn twice and moved nowhere."""
    draws, tokens, width = 2, 3, 80
    target, prediction = torch.ones(tokens, width), torch.ones(draws, tokens, width)
    signal, noise = torch.ones(2, draws, tokens)
    seed = torch.zeros(1, dtype=torch.int64)
    rows, numbers, small = prediction.nbytes, draws * tokens * 4, 8
    noised = Cost(target.nbytes + 2 * numbers + small, rows)
    read = Cost(rows + 2 * small, numbers)
    return [
        TrafficCase("q_sample-float32", partial(q_sample, target, signal, noise, seed, 0), noised),
        TrafficCase(
            "denoising_loss-forward",
            partial(denoising_loss, prediction, None, seed, 0, False),
            read,
        ),
        TrafficCase(
            "denoising_loss-velocity-with-gradient",
            partial(denoising_loss, prediction, target, seed, 0, True),
            read + Cost(target.nbytes, rows),
        ),
    ]
