"""gather_patches and gather_packed."""

from __future__ import annotations

import pytest
import torch
from samples import Sample, indices, normal

from jepa_fast import ops

OPERATORS = ("gather_patches", "gather_patches_backward")


def _sample(name: str, x: tuple[int, ...], index: tuple[int, ...], dtype=torch.int64) -> Sample:
    def make(float_dtype: torch.dtype, generator: torch.Generator):
        return (
            normal(*x, dtype=float_dtype, generator=generator),
            indices(x[-2], *index, generator=generator, dtype=dtype),
        )

    return Sample(name, ops.gather_patches if len(x) == 3 else ops.gather_packed, OPERATORS, make)


SAMPLES = [
    _sample("one index a row", (3, 5, 4), (3, 1)),
    _sample("overlapping blocks", (2, 6, 3), (2, 4, 5)),
    _sample("int32", (2, 6, 3), (2, 4), torch.int32),
    _sample("batch 0", (0, 6, 3), (0, 4)),
    _sample("K 0", (2, 6, 3), (2, 0)),
    _sample("K = N", (2, 6, 3), (2, 6)),
    _sample("packed", (7, 3), (5,)),
    _sample("packed, K 0", (7, 3), (0,)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_takes_the_named_patches(dtype: torch.dtype) -> None:
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    index = torch.tensor([[[0, 6], [3, 3]], [[1, 2], [2, 1]], [[6, 5], [4, 0]]])
    out = ops.gather_patches(x, index)
    assert out.dtype == dtype
    for b in range(3):
        for m in range(2):
            for k in range(2):
                assert torch.equal(out[b, m, k], x[b, index[b, m, k]])
    assert torch.equal(ops.gather_patches(x, index[:, 0]), out[:, 0])
    assert torch.equal(ops.gather_patches(x.mT.contiguous().mT, index.int()), out)


def test_packed_takes_the_named_rows() -> None:
    rows = torch.randn(9, 4)
    index = torch.tensor([8, 0, 0, 3])
    assert torch.equal(ops.gather_packed(rows, index), rows[index])


def test_gradients_of_repeated_patches_sum_in_float32() -> None:
    # 1 + 300 * 2^-9 in bfloat16: every single addition would be lost to rounding.
    x = torch.zeros(1, 2, 1, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.tensor([1.0] + [2**-9] * 300, dtype=torch.bfloat16).view(1, -1, 1)
    ops.gather_patches(x, torch.zeros(1, 301, dtype=torch.int64)).backward(grad)
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [torch.tensor(1 + 300 * 2**-9).bfloat16().item(), 0.0]


@pytest.mark.parametrize("wrong", [-1, 7])
def test_index_out_of_range(wrong: int) -> None:
    index = torch.tensor([[0, wrong]])
    with pytest.raises(ValueError, match=rf"index must be in \[0, 7\), got {wrong}"):
        ops.gather_patches(torch.zeros(1, 7, 2), index)
    with pytest.raises(ValueError, match=rf"index must be in \[0, 7\), got {wrong}"):
        ops.gather_packed(torch.zeros(7, 2), index[0])


def test_bad_arguments() -> None:
    x, index = torch.zeros(2, 7, 3), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x must be \[B, N, D\], got shape \[7, 3\]"):
        ops.gather_patches(x[0], index)
    with pytest.raises(ValueError, match=r"index must be \[B, K\] or \[B, M, K\]"):
        ops.gather_patches(x, index[0])
    with pytest.raises(TypeError, match="index must be int32 or int64"):
        ops.gather_patches(x, index.bool())
    with pytest.raises(ValueError, match=r"x.shape\[0\] and index.shape\[0\] must be equal"):
        ops.gather_patches(x, index[:1])
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        ops.gather_patches([1.0], index)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gather_packed: rows must be \[T, D\]"):
        ops.gather_packed(x, index[0])
    with pytest.raises(ValueError, match=r"gather_packed: index must be \[K\]"):
        ops.gather_packed(x[0], index)
