"""masked_linear."""

from __future__ import annotations

import pytest
import torch
from samples import Sample, indices, normal
from torch.nn import functional as F

from jepa_fast import ops

OPERATORS = ("masked_linear", "masked_linear_backward")


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
