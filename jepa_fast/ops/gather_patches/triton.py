"""The Triton kernels: rows copied by index, and the sums of their gradients."""

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
from jepa_fast.ops._rows import flat_rows, without_gaps
from jepa_fast.ops._traffic import TrafficCase
from jepa_fast.ops._triton_rows import block_of, columns_of, grid_of, sum_rows
from jepa_fast.perf.race import Cost

CONFIGS = Path(__file__).parent / "configs"


@triton.jit
def gather_patches_kernel(
    x,  # [B, N, D] by the strides below; D without gaps
    index,  # [B, K]
    out,  # [B, K, D]
    rows,  # B * K
    per_image,  # K
    width,
    image_stride,
    patch_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        exists = row < rows
        patch = tl.load(index + row, mask=exists, other=0).to(tl.int64)
        source = x + (row // per_image) * image_stride + patch * patch_stride
        inside = columns_of(exists, d, width)
        tl.store(out + row * width + d, tl.load(source + d, mask=inside), mask=inside)


def gather_patches(x: Tensor, index: Tensor) -> Tensor:
    """As `reference.gather_patches`."""
    check_index_range("gather_patches", "index", index, x.shape[1])
    out = x.new_empty((*index.shape, x.shape[2]))
    x, index = without_gaps(x), index.contiguous()
    config = _configs.lookup(CONFIGS, "forward", x.device)
    width = x.shape[2]
    launch(
        gather_patches_kernel,
        grid_of(index.numel(), config, width),
        {
            "x": x,
            "index": index,
            "out": out,
            "rows": index.numel(),
            "per_image": max(index[:1].numel(), 1),
            "width": width,
            "image_stride": x.stride(0),
            "patch_stride": x.stride(1),
        },
        {"ROWS": config["rows"], "BLOCK": block_of(width)},
        row_warps(block_of(width), x),
    )
    return out


def gather_patches_backward(grad: Tensor, index: Tensor, patches: int) -> Tensor:
    """As `reference.gather_patches_backward`."""
    batch, width = index.shape[0], grad.shape[-1]
    table = grad.new_empty((batch, patches, width))
    grad = without_gaps(without_gaps(grad).flatten(1, -2))
    config = _configs.lookup(CONFIGS, "backward", grad.device)
    sum_rows(grad, flat_rows(index, patches), table.view(-1, width), config)
    return table


def compile_cases() -> list[CompileCase]:
    """A ViT-L's rows in the dtypes of training, and a width that allows no wide access."""

    def calls(dtype: torch.dtype, width: int) -> dict[str, Callable[[], object]]:
        x, grad = torch.empty(4, 196, width, dtype=dtype), torch.empty(4, 82, width, dtype=dtype)
        index = torch.zeros(4, 82, dtype=torch.int64)
        name = f"{str(dtype).removeprefix('torch.')}-{width}"
        return {
            f"gather_patches-{name}": partial(gather_patches, x, index),
            f"gather_patches_backward-{name}": partial(gather_patches_backward, grad, index, 196),
        }

    odd = calls(torch.float32, 63)
    wide = {**calls(torch.bfloat16, 1024), **calls(torch.float32, 384)}
    return recorded_cases(CONFIGS, {**wide, **odd}, narrow=frozenset(odd))


def traffic_cases() -> list[TrafficCase]:
    """Blocks without a patch in common, so that every row is read once."""
    x, index = torch.ones(2, 9, 80), torch.tensor([[0, 2, 4, 6, 8], [1, 3, 5, 7, 0]])
    grad = torch.ones(2, 5, 80)
    rows, wide = index.numel() * 80 * 4, index.numel() * 8
    # The gradient comes with a sort of the places, which is PyTorch's.
    order = wide + 2 * (2 * 9) * 8
    return [
        TrafficCase(
            "gather_patches-float32",
            partial(gather_patches, x, index),
            Cost(read=rows + wide, written=rows),
        ),
        TrafficCase(
            "gather_patches_backward-float32",
            partial(gather_patches_backward, grad, index, 9),
            Cost(read=rows + order, written=2 * 9 * 80 * 4),
        ),
    ]
