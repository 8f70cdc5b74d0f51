"""The Triton kernels: each tensor is read or written once, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_fast.ops import _configs
from jepa_fast.ops._autograd import spread
from jepa_fast.ops._compile import CompileCase
from jepa_fast.ops._launch import launch, recorded_cases, row_warps
from jepa_fast.ops._rows import without_gaps
from jepa_fast.ops._traffic import TrafficCase
from jepa_fast.ops._triton_rows import columns_of
from jepa_fast.ops.affine_coupling.reference import empty_gradients, empty_outputs
from jepa_fast.perf.race import Cost

CONFIGS = Path(__file__).parent / "configs"


@triton.jit
def hyperbolic_tangent(x):
    """As csrc/common/exponential.h has it."""
    size = tl.abs(x)
    square = x * x
    # Near 0 the exponential's form would cancel.
    p = -5.70498174e-3
    p = p * square + 2.06390824e-2
    p = p * square - 5.37397154e-2
    p = p * square + 1.33314416e-1
    p = p * square - 3.33332807e-1
    near = size + size * (square * p)
    # Beyond 20 it is 1, and the exponential may overflow.
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.where(size > 20.0, 20.0, size)) + 1.0)
    tangent = tl.where(size < 0.625, near, far)
    return tl.where(x < 0.0, -tangent, tangent)


@triton.jit
def affine_coupling_kernel(
    x,  # [T, D], as raw_scale and shift, by the strides below; D without gaps
    raw_scale,
    shift,
    mask,  # [D]
    y,  # [T, D]
    logdet,  # [T]
    tokens,  # T
    width,  # D
    x_stride,
    raw_scale_stride,
    shift_stride,
    scale,  # the bound of log-scales, negative for the inverse
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.arange(0, BLOCK)
    passes = tl.load(mask + d, mask=d < width, other=1) != 0
    for i in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        exists = row < tokens
        inside = columns_of(exists, d, width)
        raw = tl.load(raw_scale + row * raw_scale_stride + d, mask=inside, other=0.0)
        offset = tl.load(shift + row * shift_stride + d, mask=inside, other=0.0)
        value = tl.load(x + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
        tangent = hyperbolic_tangent(tl.where(passes, 0.0, raw.to(tl.float32)))
        offset = tl.where(passes, 0.0, offset.to(tl.float32))
        factor = tl.exp(scale * tangent)
        result = (value - offset) * factor if INVERSE else value * factor + offset
        tl.store(y + row * width + d, result.to(y.dtype.element_ty), mask=inside)
        tl.store(logdet + row, scale * tl.sum(tangent, 0), mask=exists)


@triton.jit
def affine_coupling_backward_kernel(
    grad_y,  # [T, D], as x, raw_scale and shift, by the strides below; D without gaps
    grad_logdet,  # [T]
    x,
    raw_scale,
    shift,
    mask,  # [D]
    grad_x,  # [T, D], or None, as the next two
    grad_raw_scale,
    grad_shift,
    tokens,  # T
    width,  # D
    grad_stride,
    x_stride,
    raw_scale_stride,
    shift_stride,
    scale,  # the bound of log-scales, negative for the inverse
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.arange(0, BLOCK)
    passes = tl.load(mask + d, mask=d < width, other=1) != 0
    for i in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        exists = row < tokens
        inside = columns_of(exists, d, width)
        raw = tl.load(raw_scale + row * raw_scale_stride + d, mask=inside, other=0.0)
        upstream = tl.load(grad_y + row * grad_stride + d, mask=inside, other=0.0).to(tl.float32)
        tangent = hyperbolic_tangent(tl.where(passes, 0.0, raw.to(tl.float32)))
        along = upstream * tl.exp(scale * tangent)
        place = row * width + d
        if grad_x is not None:
            tl.store(grad_x + place, along.to(grad_x.dtype.element_ty), mask=inside)
        if grad_raw_scale is not None:
            value = tl.load(x + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
            if INVERSE:
                offset = tl.load(shift + row * shift_stride + d, mask=inside, other=0.0)
                value = value - offset.to(tl.float32)
            of_row = tl.load(grad_logdet + row, mask=exists, other=0.0)
            slope = (along * value + of_row) * scale * (1.0 - tangent * tangent)
            slope = tl.where(passes, 0.0, slope)
            tl.store(grad_raw_scale + place, slope.to(grad_raw_scale.dtype.element_ty), mask=inside)
        if grad_shift is not None:
            slope = tl.where(passes, 0.0, -along if INVERSE else upstream)
            tl.store(grad_shift + place, slope.to(grad_shift.dtype.element_ty), mask=inside)


def affine_coupling(
    x: Tensor, raw_scale: Tensor, shift: Tensor, mask: Tensor, scale_bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.affine_coupling`."""
    y, logdet = empty_outputs(x)
    x, raw_scale, shift = without_gaps(x), without_gaps(raw_scale), without_gaps(shift)
    tokens, width = x.shape
    rows = _configs.lookup(CONFIGS, "forward", x.device)["rows"]
    launch(
        affine_coupling_kernel,
        (triton.cdiv(tokens, rows),),
        {
            "x": x,
            "raw_scale": raw_scale,
            "shift": shift,
            "mask": mask.contiguous(),
            "y": y,
            "logdet": logdet,
            "tokens": tokens,
            "width": width,
            "x_stride": x.stride(0),
            "raw_scale_stride": raw_scale.stride(0),
            "shift_stride": shift.stride(0),
            "scale": _signed(scale_bound, inverse),
        },
        {"INVERSE": inverse, "ROWS": rows, "BLOCK": _block(width)},
        row_warps(_block(width), x, raw_scale),
    )
    return y, logdet


def affine_coupling_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    scale_bound: float,
    inverse: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """As `reference.affine_coupling_backward`."""
    grads = empty_gradients((x, raw_scale, shift), needs)
    grad_x, grad_raw_scale, grad_shift = spread(grads, needs)
    grad_y, x = without_gaps(grad_y), without_gaps(x)
    raw_scale, shift = without_gaps(raw_scale), without_gaps(shift)
    tokens, width = x.shape
    rows = _configs.lookup(CONFIGS, "backward", x.device)["rows"]
    launch(
        affine_coupling_backward_kernel,
        (triton.cdiv(tokens, rows),),
        {
            "grad_y": grad_y,
            "grad_logdet": grad_logdet.contiguous(),
            "x": x,
            "raw_scale": raw_scale,
            "shift": shift,
            "mask": mask.contiguous(),
            "grad_x": grad_x,
            "grad_raw_scale": grad_raw_scale,
            "grad_shift": grad_shift,
            "tokens": tokens,
            "width": width,
            "grad_stride": grad_y.stride(0),
            "x_stride": x.stride(0),
            "raw_scale_stride": raw_scale.stride(0),
            "shift_stride": shift.stride(0),
            "scale": _signed(scale_bound, inverse),
        },
        {"INVERSE": inverse, "ROWS": rows, "BLOCK": _block(width)},
        row_warps(_block(width), x, raw_scale),
    )
    return grads


def _signed(scale_bound: float, inverse: bool) -> float:
    return float(-scale_bound if inverse else scale_bound)


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def compile_cases() -> list[CompileCase]:
    """A ViT-L in float32, halves of a ViT-S under autocast, and an odd width."""

    brain, single = torch.bfloat16, torch.float32
    upstream, needs = torch.empty(32), (True, True, True)
    calls: dict[str, Callable[[], object]] = {}
    for name, raw_dtype, width, inverse in (
        ("float32-1024", single, 1024, False),
        ("bfloat16-192", brain, 192, False),
        ("float32-63-inverse", single, 63, True),
    ):
        x, mask = torch.empty(32, width), torch.zeros(width, dtype=torch.bool)
        raw_scale, shift = torch.empty(32, 2 * width, dtype=raw_dtype).chunk(2, -1)
        inputs = (x, raw_scale, shift, mask, 2.0, inverse)
        calls[f"affine_coupling-{name}"] = partial(affine_coupling, *inputs)
        calls[f"affine_coupling_backward-{name}"] = partial(
            affine_coupling_backward, x, upstream, *inputs, needs
        )
    odd = frozenset(name for name in calls if "-63-" in name)
    return recorded_cases(CONFIGS, calls, narrow=odd)


def traffic_cases() -> list[TrafficCase]:
    """A mask that every other coordinate passes: rows are read whole."""
    tokens, width = 5, 80
    x, grad_y = torch.ones(tokens, width), torch.ones(tokens, width)
    raw_scale, shift = torch.ones(tokens, 2 * width).chunk(2, -1)
    mask = torch.arange(width) % 2 == 0
    inputs = (x, raw_scale, shift, mask, 2.0, False)
    rows, upstream = tokens * width * 4, tokens * 4
    needs = (True, True, True)
    return [
        TrafficCase(
            "affine_coupling-forward",
            partial(affine_coupling, *inputs),
            Cost(read=3 * rows + width, written=rows + upstream),
        ),
        TrafficCase(
            "affine_coupling_backward-all-gradients",
            partial(affine_coupling_backward, grad_y, torch.ones(tokens), *inputs, needs),
            Cost(read=3 * rows + width + upstream, written=3 * rows),
        ),
    ]
