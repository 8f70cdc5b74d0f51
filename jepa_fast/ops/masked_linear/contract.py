"""Schemas, fakes and backends of `masked_linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa_fast.ops._autograd import recomputed_gradients
from jepa_fast.ops._checks import FLOAT32_KERNEL_DTYPES, no_wrong_products
from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.masked_linear import reference

_FOLDER = "jepa_fast.ops.masked_linear"


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degree: Tensor,
    out_degree: Tensor,
    strict: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degree: Tensor,
    out_degree: Tensor,
    strict: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    inputs = [t for t in (x, weight, bias) if t is not None]
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]


def reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degree: Tensor,
    out_degree: Tensor,
    strict: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.masked_linear(x, weight, bias, in_degree, out_degree, strict)

    inputs = [t for t in (x, weight, bias) if t is not None]
    return recomputed_gradients(function, inputs, needs, [grad])


def _unsupported_cpu(x: Tensor, *rest: object) -> list[str]:
    return [] if x.dtype in FLOAT32_KERNEL_DTYPES else [f"computes in float32, got {x.dtype} x"]


def _unsupported_cpu_backward(grad: Tensor, x: Tensor, *rest: object) -> list[str]:
    return _unsupported_cpu(x)


def _unsupported_triton(x: Tensor, *rest: object) -> list[str]:
    # The kernels' products are the tensor cores'. In float32 they would be slower than PyTorch's:
    # only the interpreter takes it, for the tests.
    on_gpu = x.device.type == "cuda"
    if x.dtype in FLOAT32_KERNEL_DTYPES - ({torch.float32} if on_gpu else set()):
        return no_wrong_products(x)
    return [f"takes bfloat16 and float16, got {x.dtype} x"]


def _unsupported_triton_backward(grad: Tensor, x: Tensor, *rest: object) -> list[str]:
    return _unsupported_triton(x)


FORWARD = Operator(
    "masked_linear(Tensor x, Tensor weight, Tensor? bias, Tensor in_degree, Tensor out_degree, "
    "bool strict, str backend) -> Tensor",
    fake=_fake,
    backends={
        "triton": Backend(f"{_FOLDER}.triton:masked_linear", _unsupported_triton),
        "cpu": Backend(f"{_FOLDER}.native:masked_linear", _unsupported_cpu),
        "reference": Backend(f"{_FOLDER}.reference:masked_linear"),
    },
)
BACKWARD = Operator(
    "masked_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor in_degree, "
    "Tensor out_degree, bool strict, bool[] needs, str backend) -> Tensor[]",
    fake=_fake_backward,
    backends={
        "triton": Backend(f"{_FOLDER}.triton:masked_linear_backward", _unsupported_triton_backward),
        "cpu": Backend(f"{_FOLDER}.native:masked_linear_backward", _unsupported_cpu_backward),
        "reference": Backend(f"{__name__}:reference_backward"),
    },
)
