"""The Triton kernels: products that leave out tiles in which no output sees an input.

Weights are masked once, in a copy; what remains is to skip the tiles of it that are all zero. Tiles
are those in memory. For each tile of columns of the result there is a list of the tiles that count
in its sums, made on the device: where degrees ascend, in one run or in several, or descend, half of
all tiles remain; where they are shuffled, none may be skipped.
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
from jepa_fast.ops._launch import distinct, launch, recorded_cases
from jepa_fast.ops._rows import as_matrix, without_gaps
from jepa_fast.ops._traffic import TrafficCase
from jepa_fast.ops._triton_rows import columns_of
from jepa_fast.perf.race import Cost

CONFIGS = Path(__file__).parent / "configs"
_HIGHEST: tl.constexpr = tl.constexpr(2**63 - 1)


@triton.jit
def extreme_degree(degree, place, size, LOWEST: tl.constexpr):
    """The lowest or the highest of the degrees at these places."""
    there = place < size
    value = tl.load(degree + place, mask=there, other=0).to(tl.int64)
    if LOWEST:
        return tl.min(tl.where(there, value, _HIGHEST), 0)
    return tl.max(tl.where(there, value, -_HIGHEST), 0)


@triton.jit
def sees(out_degree, in_degree, STRICT: tl.constexpr):
    if STRICT:
        return out_degree > in_degree
    return out_degree >= in_degree


@triton.jit
def bound_degrees_kernel(degree, bound, size, LOWEST: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(bound + tl.program_id(0), extreme_degree(degree, place, size, LOWEST))


@triton.jit
def list_tiles_kernel(
    degree,  # of the columns of the result
    bound,  # [tiles]: the lowest or highest degree of what is summed over
    listed,  # [programs, tiles]: the tiles that count, first
    number,  # [programs]: how many they are
    size,
    tiles,
    OUTPUTS: tl.constexpr,  # columns of the result are outputs
    STRICT: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    own = extreme_degree(degree, program * BLOCK + tl.arange(0, BLOCK), size, not OUTPUTS)
    there = tile < tiles
    other = tl.load(bound + tile, mask=there, other=0)
    if OUTPUTS:
        counts = there & sees(own, other, STRICT)
    else:
        counts = there & sees(other, own, STRICT)
    before = tl.cumsum(counts.to(tl.int32), 0) - 1
    tl.store(listed + program * tiles + before, tile, mask=counts)
    tl.store(number + program, tl.sum(counts.to(tl.int32), 0))


@triton.jit
def masked_product_kernel(
    x,  # [T, K] by its stride
    weight,  # [N, K], or [K, N]; masked
    bias,  # [N], or x again without one
    listed,  # [tiles of N, tiles of K]
    number,  # [tiles of N]
    out,  # [T, N]
    tokens,
    columns,  # N
    depth,  # K
    column_tiles,
    depth_tiles,
    x_stride,
    weight_stride,
    TRANSPOSED: tl.constexpr,  # weight is [N, K]
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,  # of `fixed_steps`
):
    # One tile of columns after the other: these programs share their rows of x.
    tile = (tl.program_id(0) % column_tiles).to(tl.int64)
    t = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tile * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = t < tokens, n < columns
    row = x + t[:, None] * x_stride
    if TRANSPOSED:
        column = weight + n[None, :] * weight_stride
    else:
        column = weight + n[None, :]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    steps = tl.load(number + tile)
    tiles = listed + tile * depth_tiles
    depth_tile = tl.load(tiles, mask=steps > 0, other=0)
    for step in range(steps if STEPS < 0 else STEPS):
        k = depth_tile.to(tl.int64) * DEPTH + tl.arange(0, DEPTH)
        if STEPS >= 0:
            in_depth = columns_of(step < steps, k, depth)
        else:
            in_depth = k < depth
        left = tl.load(row + k[None, :], mask=in_rows[:, None] & in_depth[None, :], other=0.0)
        if TRANSPOSED:
            places = column + k[:, None]
        else:
            places = column + k[:, None] * weight_stride
        right = tl.load(places, mask=in_depth[:, None] & in_columns[None, :], other=0.0)
        # One step ahead, so that the tiles themselves can be read ahead, too.
        depth_tile = tl.load(tiles + step + 1, mask=step + 1 < steps, other=0)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    if BIAS:
        sums += tl.load(bias + n, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    place = out + t[:, None] * columns + n[None, :]
    value = sums.to(out.dtype.element_ty)
    tl.store(place, value, mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def masked_weight_gradient_kernel(
    grad,  # [T, O] by its stride
    x,  # [T, I] by its stride
    in_degree,
    out_degree,
    dweight,  # [O, I]
    tokens,
    inputs,
    outputs,
    input_tiles,
    grad_stride,
    x_stride,
    STRICT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEPS: tl.constexpr,  # of `fixed_steps`
):
    i = (tl.program_id(0) % input_tiles).to(tl.int64) * INPUTS + tl.arange(0, INPUTS)
    o = (tl.program_id(0) // input_tiles).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    in_inputs, in_outputs = i < inputs, o < outputs
    highest = extreme_degree(out_degree, o, outputs, False)
    lowest = extreme_degree(in_degree, i, inputs, True)
    steps = tl.where(sees(highest, lowest, STRICT), tl.cdiv(tokens, TOKENS), 0)
    sums = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    t = tl.arange(0, TOKENS)
    left = grad + o[:, None] + t[None, :].to(tl.int64) * grad_stride
    right = x + i[None, :] + t[:, None].to(tl.int64) * x_stride
    # Strides of 1 are constants, without methods.
    left_step = tl.cast(grad_stride, tl.int64) * TOKENS
    right_step = tl.cast(x_stride, tl.int64) * TOKENS
    remaining = tokens
    for step in range(steps if STEPS < 0 else STEPS):
        if STEPS >= 0:
            there = columns_of(step < steps, t, remaining)
        else:
            there = t < remaining
        of_grad = tl.load(left, mask=in_outputs[:, None] & there[None, :], other=0.0)
        of_x = tl.load(right, mask=there[:, None] & in_inputs[None, :], other=0.0)
        sums = tl.dot(of_grad, of_x, sums, input_precision="ieee")
        remaining -= TOKENS
        left += left_step
        right += right_step
    row = tl.load(out_degree + o, mask=in_outputs, other=0)
    column = tl.load(in_degree + i, mask=in_inputs, other=0)
    counts = sees(row[:, None], column[None, :], STRICT)
    place = dweight + o[:, None] * inputs + i[None, :]
    value = tl.where(counts, sums, 0.0).to(dweight.dtype.element_ty)
    tl.store(place, value, mask=in_outputs[:, None] & in_inputs[None, :])


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degree: Tensor,
    out_degree: Tensor,
    strict: bool,
) -> Tensor:
    """As `reference.masked_linear`."""
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    _multiply(as_matrix(x), weight, bias, in_degree, out_degree, strict, out, forward=True)
    return out


def masked_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degree: Tensor,
    out_degree: Tensor,
    strict: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, weight and bias, those marked in `needs`."""
    grads = []
    rows = as_matrix(grad)
    if needs[0]:
        dx = x.new_empty(x.shape)
        _multiply(rows, weight, None, in_degree, out_degree, strict, dx, forward=False)
        grads.append(dx)
    if needs[1]:
        grads.append(_weight_gradient(rows, as_matrix(x), in_degree, out_degree, strict))
    if bias is not None and needs[2]:
        grads.append(rows.sum(0, dtype=torch.float32).to(bias.dtype))
    return grads


def config_for(kernel: str, weight: Tensor) -> _configs.Config:
    """The launch config: tiles are smaller where rows are read a number at a time."""
    aligned = all(size * weight.dtype.itemsize % 16 == 0 for size in weight.shape)
    return _configs.lookup(CONFIGS, kernel if aligned else f"{kernel}-narrow", weight.device)


def fixed_steps(most: int) -> int:
    """Of a loop that on a GPU has as many steps as its kernel found, `most` at the most: -1 there.

    The interpreter of Triton 3.6 takes no loops to numbers, only to constants.
    """
    return most if triton.knobs.runtime.interpret else -1


def _multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degree: Tensor,
    out_degree: Tensor,
    strict: bool,
    out: Tensor,
    forward: bool,
) -> None:
    """Writes x times the masked weight, transposed in the forward pass, and the bias, to `out`."""
    config = config_for("product", weight)
    x, in_degree, out_degree = without_gaps(x), in_degree.contiguous(), out_degree.contiguous()
    row = out_degree.unsqueeze(1)
    mask = row > in_degree if strict else row >= in_degree
    masked = torch.where(mask, weight, 0.0).contiguous()
    outer, inner = (out_degree, in_degree) if forward else (in_degree, out_degree)
    columns, depth = len(outer), len(inner)
    column_tiles = triton.cdiv(columns, config["columns"])
    depth_tiles = triton.cdiv(depth, config["depth"])
    bound = inner.new_empty(depth_tiles, dtype=torch.int64)
    listed = inner.new_empty((column_tiles, depth_tiles), dtype=torch.int32)
    number = listed.new_empty(column_tiles)
    launch(
        bound_degrees_kernel,
        (depth_tiles,),
        {"degree": inner, "bound": bound, "size": depth},
        {"LOWEST": forward, "BLOCK": config["depth"]},
        1,
    )
    launch(
        list_tiles_kernel,
        (column_tiles,),
        {
            "degree": outer,
            "bound": bound,
            "listed": listed,
            "number": number,
            "size": columns,
            "tiles": depth_tiles,
        },
        {
            "OUTPUTS": forward,
            "STRICT": strict,
            "BLOCK": config["columns"],
            "TILES": triton.next_power_of_2(max(1, depth_tiles)),
        },
        1,
    )
    tokens = x.shape[0]
    launch(
        masked_product_kernel,
        (triton.cdiv(tokens, config["rows"]) * column_tiles,),
        {
            "x": x,
            "weight": masked,
            "bias": x if bias is None else bias.contiguous(),
            "listed": listed,
            "number": number,
            "out": out,
            "tokens": tokens,
            "columns": columns,
            "depth": depth,
            "column_tiles": column_tiles,
            "depth_tiles": depth_tiles,
            "x_stride": x.stride(0),
            "weight_stride": masked.stride(0),
        },
        {
            "TRANSPOSED": forward,
            "BIAS": bias is not None,
            "ROWS": config["rows"],
            "COLUMNS": config["columns"],
            "DEPTH": config["depth"],
            "STEPS": fixed_steps(depth_tiles),
        },
        config["num_warps"],
        config["num_stages"],
    )


def _weight_gradient(
    grad: Tensor, x: Tensor, in_degree: Tensor, out_degree: Tensor, strict: bool
) -> Tensor:
    grad, x = without_gaps(grad), without_gaps(x)
    tokens, inputs = x.shape
    outputs = grad.shape[1]
    dweight = x.new_empty(outputs, inputs)
    config = config_for("weight", dweight)
    input_tiles = triton.cdiv(inputs, config["inputs"])
    launch(
        masked_weight_gradient_kernel,
        (input_tiles * triton.cdiv(outputs, config["outputs"]),),
        {
            "grad": grad,
            "x": x,
            "in_degree": in_degree.contiguous(),
            "out_degree": out_degree.contiguous(),
            "dweight": dweight,
            "tokens": tokens,
            "inputs": inputs,
            "outputs": outputs,
            "input_tiles": input_tiles,
            "grad_stride": grad.stride(0),
            "x_stride": x.stride(0),
        },
        {
            "STRICT": strict,
            "OUTPUTS": config["outputs"],
            "INPUTS": config["inputs"],
            "TOKENS": config["tokens"],
            "STEPS": fixed_steps(triton.cdiv(tokens, config["tokens"])),
        },
        config["num_warps"],
        config["num_stages"],
    )
    return dweight


def compile_cases() -> list[CompileCase]:
    """A hidden layer under autocast, forward and backward, and the products of odd sizes."""

    def forward(dtype: torch.dtype, inputs: int, outputs: int) -> object:
        x, weight = torch.empty(256, inputs, dtype=dtype), torch.empty(outputs, inputs, dtype=dtype)
        degrees = torch.arange(inputs), torch.arange(outputs)
        return masked_linear(x, weight, x.new_empty(outputs), *degrees, False)

    def backward(dtype: torch.dtype, inputs: int, outputs: int) -> object:
        x, weight = torch.empty(256, inputs, dtype=dtype), torch.empty(outputs, inputs, dtype=dtype)
        grad, degrees = x.new_empty(256, outputs), (torch.arange(inputs), torch.arange(outputs))
        return masked_linear_backward(grad, x, weight, None, *degrees, True, [True, True])

    calls: dict[str, Callable[[], object]] = {
        "masked_linear-bfloat16": partial(forward, torch.bfloat16, 512, 1024),
        "masked_linear_backward-bfloat16": partial(backward, torch.bfloat16, 512, 1024),
        "masked_linear-float16-odd": partial(forward, torch.float16, 63, 65),
        "masked_linear_backward-float16-odd": partial(backward, torch.float16, 63, 65),
    }
    # Bias and degrees take narrow accesses beside the rows'.
    cases = distinct(recorded_cases(CONFIGS, calls, narrow=frozenset(calls)))
    lists = (bound_degrees_kernel, list_tiles_kernel)
    return [case for case in cases if "odd" not in case.name or case.kernel not in lists]


def traffic_cases() -> list[TrafficCase]:
    """Two tiles each of tokens, inputs and outputs, whose degrees ascend."""
    tokens, inputs, outputs = 150, 140, 160
    x, weight, grad = (
        torch.ones(*shape) for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    degrees = torch.arange(inputs), torch.arange(outputs)
    seen = (inputs * (inputs + 1) // 2 + (outputs - inputs) * inputs) * 4
    numbers = (inputs + outputs) * 8
    forward = partial(masked_linear, x, weight, None, *degrees, False)
    backward = partial(masked_linear_backward, grad, x, weight, None, *degrees, False, [True, True])
    return [
        TrafficCase("masked_linear", forward, Cost(x.nbytes + seen + numbers, grad.nbytes)),
        TrafficCase(
            "masked_linear_backward",
            backward,
            Cost(grad.nbytes + x.nbytes + seen + numbers, x.nbytes + weight.nbytes),
        ),
    ]
