"""Schemas, fakes and backends of `affine_coupling`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jepa_fast.ops._checks import FLOAT32_KERNEL_DTYPES, only_kernel_dtypes
from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.affine_coupling import reference

_WIDEST = 8192  # columns that a Triton program holds in registers


def _fake(
    x: Tensor, raw_scale: Tensor, shift: Tensor, mask: Tensor, scale_bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    return reference.empty_outputs(x)


def _fake_backward(
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
    return reference.empty_gradients((x, raw_scale, shift), needs)


def _unsupported(x: Tensor, raw_scale: Tensor, shift: Tensor, *rest: object) -> list[str]:
    return only_kernel_dtypes(x, raw_scale, shift)


def _unsupported_backward(grad_y: Tensor, grad_logdet: Tensor, *rest: Any) -> list[str]:
    return only_kernel_dtypes(grad_y, *rest[:3])


def _unsupported_triton(x: Tensor, raw_scale: Tensor, shift: Tensor, *rest: object) -> list[str]:
    reasons = _unsupported(x, raw_scale, shift)
    if not reasons and x.dtype not in FLOAT32_KERNEL_DTYPES:
        reasons.append(f"takes x in float32, bfloat16 and float16, got {x.dtype}")
    if x.shape[1] > _WIDEST:
        reasons.append(f"takes up to {_WIDEST} columns, got {x.shape[1]}")
    return reasons


def _unsupported_triton_backward(grad_y: Tensor, grad_logdet: Tensor, *rest: Any) -> list[str]:
    return _unsupported_triton(*rest)


_FOLDER = "jepa_fast.ops.affine_coupling"
FORWARD = Operator(
    "affine_coupling(Tensor x, Tensor raw_scale, Tensor shift, Tensor mask, float scale_bound, "
    "bool inverse, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    backends={
        "triton": Backend(f"{_FOLDER}.triton:affine_coupling", _unsupported_triton),
        "cpu": Backend(f"{_FOLDER}.native:affine_coupling", _unsupported),
        "reference": Backend(f"{_FOLDER}.reference:affine_coupling"),
    },
)
BACKWARD = Operator(
    "affine_coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor raw_scale, "
    "Tensor shift, Tensor mask, float scale_bound, bool inverse, bool[] needs, str backend) "
    "-> Tensor[]",
    fake=_fake_backward,
    backends={
        "triton": Backend(
            f"{_FOLDER}.triton:affine_coupling_backward", _unsupported_triton_backward
        ),
        "cpu": Backend(f"{_FOLDER}.native:affine_coupling_backward", _unsupported_backward),
        "reference": Backend(f"{_FOLDER}.reference:affine_coupling_backward"),
    },
)
