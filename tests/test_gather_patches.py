"""gather_patches and gather_packed."""

from __future__ import annotations

import pytest
import torch
from backends import backends
from samples import Sample, indices, normal
from tolerance import assert_as_accurate
from torch import Tensor

from jepa_fast import ops
from jepa_fast.ops._registry import OPERATORS as REGISTERED

OPERATORS = ("gather_patches", "gather_patches_backward")
each_backend = backends(REGISTERED["gather_patches"].backends)


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


@each_backend
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("width", [1, 63, 384, 1025])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_every_backend(
    index_dtype: torch.dtype,
    width: int,
    dtype: torch.dtype,
    layout: str,
    backend: str,
    device: str,
    backends_run: list[tuple[str, str]],
    poisoned_memory: None,
) -> None:
    """The same rows bit for bit; gradients of patches taken never, once and often."""
    g = torch.Generator().manual_seed(width)
    index = torch.randint(7, (3, 2, 6), generator=g, dtype=index_dtype).to(device)
    index[:, 1] = 4  # six times in every image, and no 6 in the first
    index[0][index[0] == 6] = 5
    x = {
        "contiguous": torch.randn(3, 7, width, generator=g),
        "transposed": torch.randn(width, 7, 3, generator=g).permute(2, 1, 0),
        "sliced": torch.randn(6, 15, width + 3, generator=g)[::2, 1::2, 3:],
        "expanded": torch.randn(1, 7, width, generator=g).expand(3, 7, width),
    }[layout].to(device, dtype)
    grad = torch.randn(3, 2, 12, 2 * width, generator=g).to(device, dtype)[:, :, ::2, width:]
    leaf = x.detach().requires_grad_()
    out = ops.gather_patches(leaf, index, backend=backend)
    assert torch.equal(out, torch.stack([x[b, index[b].long()] for b in range(3)]))
    (got,) = torch.autograd.grad(out, leaf, grad)
    assert backends_run == [("gather_patches", backend), ("gather_patches_backward", backend)]

    def summed(wide: torch.dtype) -> Tensor:
        table = torch.zeros(3, 7, width, dtype=wide)
        for b in range(3):
            table[b].index_add_(
                0, index[b].flatten().long().cpu(), grad[b].flatten(0, 1).cpu().to(wide)
            )
        return table

    eager = summed(torch.promote_types(dtype, torch.float32)).to(dtype)
    assert_as_accurate(got.cpu(), eager, summed(torch.float64))
    assert not got[0, 6].any()


@backends(["reference", "cpu"])
@pytest.mark.parametrize("width", [384, 385])  # rows of 1540 bytes begin where vectors may not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_outgrow_the_caches(
    dtype: torch.dtype, width: int, backend: str, device: str, poisoned_memory: None
) -> None:
    """The C++ kernel writes them past the caches; they are those of the images one by one."""
    g = torch.Generator().manual_seed(width)
    x = torch.randn(64, 196, width, generator=g).to(device, dtype)
    index = torch.randint(150, (64, 100), generator=g).to(device)  # never, once and more often
    grad = torch.randn(64, 100, width, generator=g).to(device, dtype)

    def gradient(image: slice) -> Tensor:
        leaf = x[image].requires_grad_()
        out = ops.gather_patches(leaf, index[image], backend=backend)
        return torch.autograd.grad(out, leaf, grad[image])[0]

    got = gradient(slice(None))
    assert got.nbytes > 8 * 2**20
    for b in range(64):
        assert torch.equal(got[b : b + 1], gradient(slice(b, b + 1)))


@each_backend
@pytest.mark.parametrize(("batch", "taken"), [(0, 3), (2, 0)])
def test_where_there_is_nothing(batch: int, taken: int, backend: str, device: str) -> None:
    x = torch.randn(batch, 5, 33, device=device, requires_grad=True)
    index = torch.zeros(batch, taken, dtype=torch.int64, device=device)
    out = ops.gather_patches(x, index, backend=backend)
    assert out.shape == (batch, taken, 33)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(grad, torch.zeros_like(x))


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
    with pytest.raises(TypeError, match=r"index must be int32 or int64, .* mask\.nonzero"):
        ops.gather_patches(x, index.bool())
    with pytest.raises(TypeError, match=r"x must be of a floating dtype, got torch\.int64"):
        ops.gather_patches(x.long(), index)
    with pytest.raises(TypeError, match=r"rows must be of a floating dtype, got torch\.bool"):
        ops.gather_packed(x[0].bool(), index[0])
    with pytest.raises(ValueError, match=r"x.shape\[0\] and index.shape\[0\] must be equal"):
        ops.gather_patches(x, index[:1])
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        ops.gather_patches([1.0], index)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gather_packed: rows must be \[T, D\]"):
        ops.gather_packed(x, index[0])
    with pytest.raises(ValueError, match=r"gather_packed: index must be \[K\]"):
        ops.gather_packed(x[0], index)
