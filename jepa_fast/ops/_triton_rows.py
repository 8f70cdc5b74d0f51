"""Sums of rows by index in Triton: the gradient of a gather, without atomics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_fast.ops import _configs
from jepa_fast.ops._launch import TRITON_DTYPES, launch, row_warps


@triton.jit
def columns_of(row_exists, d, width):
    """Which of the columns `d` are there: none of a row that is not. By a comparison, since the
    interpreter of Triton 3.9 takes no mask that a single number is part of.
    """
    return d < tl.where(row_exists, width, 0)


@triton.jit
def compensated_sum(total, lost, values):
    """total + values, and the sum of all that rounding has lost so far, by Knuth's TwoSum."""
    new = total + values
    added = new - total
    return new, lost + ((total - (new - added)) + (values - added))


@triton.jit
def sum_rows_kernel(
    grad,  # [A, R, D] by the strides below; D without gaps
    places,  # [A * R] row numbers of grad, ordered by the row of the table that they go to
    first,  # [rows + 1] where a row's places begin
    table,  # [rows, D]
    rows,
    per_outer,  # R
    width,
    outer_stride,
    inner_stride,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    for i in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        exists = row < rows
        place = tl.load(first + row, mask=exists, other=0)
        end = tl.load(first + row + 1, mask=exists, other=0)
        total = tl.zeros([BLOCK], COMPUTE)
        lost = tl.zeros([BLOCK], COMPUTE)
        while place < end:
            at = tl.load(places + place)
            source = grad + (at // per_outer) * outer_stride + (at % per_outer) * inner_stride
            values = tl.load(source + d, mask=inside, other=0.0).to(COMPUTE)
            total, lost = compensated_sum(total, lost, values)
            place += 1
        if table.dtype.element_ty == tl.float64:
            result = total.to(tl.float64) + lost.to(tl.float64)
        else:
            result = (total + lost).to(table.dtype.element_ty)
        tl.store(table + row * width + d, result, mask=columns_of(exists, d, width))


def sum_rows(grad: Tensor, index: Tensor, table: Tensor, config: _configs.Config) -> None:
    """Writes the sums of `grad` [A, R, D] by `index` [A, R] into `table` [rows, D].

    Args:
        grad: without gaps in D.
        index: rows of the table.
        table: contiguous; rows that no index names become 0.
        config: `rows` a program.
    """
    ordered, places = torch.sort(index.flatten(), stable=True)
    numbers = torch.arange(len(table) + 1, device=table.device)
    first = torch.searchsorted(ordered, numbers.to(ordered.dtype))
    block = block_of(table.shape[1])
    launch(
        sum_rows_kernel,
        grid_of(len(table), config, table.shape[1]),
        {
            "grad": grad,
            "places": places,
            "first": first,
            "table": table,
            "rows": len(table),
            "per_outer": max(grad.shape[1], 1),
            "width": table.shape[1],
            "outer_stride": grad.stride(0),
            "inner_stride": grad.stride(1),
        },
        {"COMPUTE": compute_dtype(grad.dtype), "ROWS": config["rows"], "BLOCK": block},
        row_warps(block, grad, table),
    )


def block_of(width: int) -> int:
    """Elements of a row that a program takes at once."""
    return max(16, min(2048, triton.next_power_of_2(width)))


def grid_of(rows: int, config: _configs.Config, width: int) -> tuple[int, int]:
    """Programs over rows, `config["rows"]` each, and over parts of a row."""
    return triton.cdiv(rows, config["rows"]), triton.cdiv(width, block_of(width))


def compute_dtype(dtype: torch.dtype) -> Any:
    """float32, or float64 for float64."""
    return TRITON_DTYPES[torch.promote_types(dtype, torch.float32)]
