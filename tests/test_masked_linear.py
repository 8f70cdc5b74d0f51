"""masked_linear."""

from __future__ import annotations

import math

import pytest
import torch
from backends import backends
from samples import Sample, indices, normal
from tolerance import assert_as_accurate
from torch import Tensor
from torch.nn import functional as F

from jepa_fast import ops
from jepa_fast.errors import BackendError
from jepa_fast.ops._registry import OPERATORS as REGISTERED

OPERATORS = ("masked_linear", "masked_linear_backward")
each_backend = backends(REGISTERED["masked_linear"].backends)


def _sample(name: str, x: tuple[int, ...], outputs: int, bias: bool = True, **keywords) -> Sample:
    def make(dtype: torch.dtype, generator: torch.Generator):
        return (
            normal(*x, dtype=dtype, generator=generator, grad=bias),
            normal(outputs, x[-1], dtype=dtype, generator=generator),
            normal(outputs, dtype=dtype, generator=generator) if bias else None,
            indices(4, x[-1], generator=generator),
            indices(4, outputs, generator=generator, dtype=torch.int32),
        )

    return Sample(name, ops.masked_linear, OPERATORS, make, keywords)


SAMPLES = [
    _sample("two dimensions", (3, 5), 4),
    _sample("three dimensions, strict", (2, 3, 4), 5, strict=True),
    _sample("no bias, fixed input", (3, 5), 4, False),
    _sample("batch 0", (0, 5), 4),
]


def _permuted(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))


# Degrees of inputs and outputs.
LAYERS: dict[str, tuple[Tensor, Tensor]] = {
    "ascending": (torch.arange(100), torch.arange(130) * 100 // 130),
    "descending": (torch.arange(100).flip(0), torch.arange(130).flip(0) * 100 // 130),
    "ascending in runs": (torch.arange(97) // 3, torch.arange(30).repeat(5)),
    "permuted in runs": (_permuted(40), _permuted(40).repeat(4)),
    "repeated": (_permuted(150) % 7, _permuted(70) % 5 + 1),
    "all is seen": (torch.arange(40), torch.full((70,), 40)),
    "nothing is seen": (torch.arange(70), torch.full((40,), -1)),
    "one of each": (torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)),
    "far apart": (
        torch.tensor([2**40, -(2**40), 0, 3]),
        torch.tensor([2**41, 3, -(2**41), 0, 2**40]),
    ),
    "32 bits": (_permuted(33).int(), _permuted(65).int() - 16),
}


def _dtype(device: str) -> torch.dtype:
    """One that every backend takes there: on a GPU, products of float32 are PyTorch's."""
    return torch.float16 if device == "cuda" else torch.float32


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    degrees: tuple[Tensor, Tensor],
    grad: Tensor,
    strict: bool,
    backend: str,
) -> list[Tensor]:
    """Output and gradients, on the CPU."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    leaves = inputs if bias is not None else [*inputs, None]
    y = ops.masked_linear(*leaves, *degrees, strict, backend=backend)
    grads = torch.autograd.grad(y, inputs, grad.to(y))
    return [t.detach().cpu() for t in (y, *grads)]


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_as_accurate_as_eager(
    layer: str,
    dtype: torch.dtype,
    backend: str,
    device: str,
    backends_run: list[tuple[str, str]],
    poisoned_memory: None,
) -> None:
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("products of bfloat16 are wrong in Triton's interpreter")
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("float32 is the reference's on a GPU")
    degrees = LAYERS[layer]
    g = torch.Generator().manual_seed(len(layer))
    for strict, bias, shape in ((False, True, (150,)), (True, False, (5, 30))):
        x = torch.randn(*shape, len(degrees[0]), generator=g).to(dtype)
        weight = torch.randn(len(degrees[1]), len(degrees[0]), generator=g).to(dtype)
        some_bias = torch.randn(len(degrees[1]), generator=g).to(dtype) if bias else None
        grad = torch.randn(*shape, len(degrees[1]), generator=g).to(dtype)
        tensors = (x, weight, some_bias)
        there = [None if t is None else t.to(device) for t in tensors]
        on_device = (degrees[0].to(device), degrees[1].to(device))
        got = _run(*there, on_device, grad, strict, backend)
        assert {(name, backend) for name in OPERATORS} <= set(backends_run)
        eager = _run(*tensors, degrees, grad, strict, "reference")
        wide = [None if t is None else t.double() for t in tensors]
        exact = _run(*wide, degrees, grad, strict, "reference")
        for mine, theirs, truth in zip(got, eager, exact, strict=True):
            # Rows of as few as one number have no largest error to speak of.
            assert_as_accurate(*(t.flatten() for t in (mine, theirs, truth)))
        mask = degrees[1][:, None] > degrees[0] if strict else degrees[1][:, None] >= degrees[0]
        assert not got[2][~mask].any()


@each_backend
@pytest.mark.parametrize("shape", [(0, 5, 4), (6, 0, 4), (6, 5, 0), (0, 0, 0)], ids=str)
def test_where_there_is_nothing(shape: tuple[int, int, int], backend: str, device: str) -> None:
    tokens, inputs, outputs = shape
    x, weight = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs)
    degrees = torch.arange(inputs, device=device), torch.arange(outputs, device=device)
    x, weight, bias = (t.to(_dtype(device)) for t in (x, weight, bias))
    there = [t.to(device) for t in (x, weight, bias)]
    got = _run(*there, degrees, torch.ones(tokens, outputs), False, backend)
    assert [t.shape for t in got] == [(tokens, outputs), x.shape, weight.shape, bias.shape]
    expected = (bias.expand(tokens, outputs), x * 0, weight * 0, bias * 0 + tokens)
    for mine, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, truth, rtol=0, atol=0)


@each_backend
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_single_gradients(wanted: tuple[int, ...], backend: str, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((40, 33), (35, 33), (35,))
    leaves = [torch.randn(*shape, generator=g).to(device, _dtype(device)) for shape in shapes]
    degrees = torch.arange(33, device=device), torch.arange(35, device=device)
    every = [t.detach().requires_grad_() for t in leaves]
    y = ops.masked_linear(*every, *degrees, backend=backend)
    expected = torch.autograd.grad(y.square().sum(), every)
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
    y = ops.masked_linear(*some, *degrees, backend=backend)
    got = torch.autograd.grad(y.square().sum(), [some[i] for i in wanted])
    for mine, i in zip(got, wanted, strict=True):
        assert torch.equal(mine, expected[i])


@each_backend
@pytest.mark.parametrize("layer", ["ascending", "permuted in runs"])
def test_masked_weights_poison_nothing(layer: str, backend: str, device: str) -> None:
    in_degree, out_degree = (degree.to(device) for degree in LAYERS[layer])
    g = torch.Generator().manual_seed(0)
    to = (device, _dtype(device))
    x = torch.randn(20, len(in_degree), generator=g).to(*to)
    weight = torch.randn(len(out_degree), len(in_degree), generator=g).to(*to)
    poisoned = weight.masked_fill(out_degree[:, None] < in_degree, math.nan)
    grad = torch.randn(20, len(out_degree), generator=g)
    results = [
        _run(x, w, None, (in_degree, out_degree), grad, False, backend) for w in (weight, poisoned)
    ]
    for clean, mine in zip(*results, strict=True):
        assert torch.equal(clean, mine)


@pytest.mark.parametrize("strict", [False, True])
def test_an_output_sees_inputs_of_no_higher_degree(strict: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4), torch.randn(3, 4), torch.randn(3)
    in_degree, out_degree = torch.tensor([2, 0, 1, 0]), torch.tensor([1, 0, 2])
    expected = bias.repeat(2, 1)
    for o in range(3):
        for i in range(4):
            if out_degree[o] > in_degree[i] or (not strict and out_degree[o] == in_degree[i]):
                expected[:, o] += weight[o, i] * x[:, i]
    got = ops.masked_linear(x, weight, bias, in_degree, out_degree, strict)
    torch.testing.assert_close(got, expected)


def test_masked_weights_get_no_gradient_and_poison_nothing() -> None:
    weight = torch.ones(3, 4, requires_grad=True)
    in_degree, out_degree = torch.arange(4), torch.arange(3)
    x = torch.randn(5, 4)
    ops.masked_linear(x, weight, None, in_degree, out_degree, strict=True).sum().backward()
    assert weight.grad is not None
    expected = torch.ones(3, 4).tril(-1) * x.sum(0)
    torch.testing.assert_close(weight.grad, expected)
    poisoned = weight.detach().masked_fill(torch.ones(3, 4).triu().bool(), torch.nan)
    clean = ops.masked_linear(x, weight, None, in_degree, out_degree, strict=True)
    assert torch.equal(
        ops.masked_linear(x, poisoned, None, in_degree, out_degree, strict=True), clean
    )


@pytest.mark.tier1
def test_auto_leaves_bfloat16_out_of_the_interpreter(backends_run: list[tuple[str, str]]) -> None:
    """Whose products of bfloat16 are wrong."""
    x, weight = (torch.randn(*shape).bfloat16().requires_grad_() for shape in ((5, 8), (7, 8)))
    degrees = torch.arange(8), torch.arange(7)
    y = ops.masked_linear(x, weight, None, *degrees)
    torch.autograd.grad(y.float().sum(), [x, weight])
    assert {name for name, _ in backends_run} == set(OPERATORS)
    assert "triton" not in {backend for _, backend in backends_run}
    want = ops.masked_linear(x.float(), weight.float(), None, *degrees, backend="reference")
    torch.testing.assert_close(y.float(), want, rtol=0.01, atol=0.01)
    with pytest.raises(
        BackendError, match="products of bfloat16 are wrong in Triton's interpreter"
    ):
        ops.masked_linear(x, weight, None, *degrees, backend="triton")


def test_under_autocast() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 4), torch.randn(2, 4).requires_grad_(), torch.randn(2)
    degrees = torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.masked_linear(x, weight, bias, *degrees)
        assert torch.equal(y, F.linear(x, weight, bias))
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 5)}, ValueError, r"x.shape\[-1\] and weight.shape\[1\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[..., I\]"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(2, 4).long()}, TypeError, "x must be of a floating dtype"),
        ({"weight": torch.zeros(3, 4).long()}, TypeError, "weight must be of a floating dtype"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias.shape\[0\] and weight.shape\[0\]"),
        ({"in_degree": torch.arange(3)}, ValueError, r"in_degree.shape\[0\] and weight.shape\[1\]"),
        ({"out_degree": torch.arange(4)}, ValueError, r"out_degree.shape\[0\]"),
        ({"out_degree": torch.zeros(3)}, TypeError, "out_degree must be int32 or int64"),
        ({"weight": torch.zeros(3, 4).double()}, TypeError, "weight must have the dtype of x"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 4),
        "weight": torch.zeros(3, 4),
        "bias": torch.zeros(3),
        "in_degree": torch.arange(4),
        "out_degree": torch.arange(3),
    }
    with pytest.raises(error, match=message):
        ops.masked_linear(**{**arguments, **change})
