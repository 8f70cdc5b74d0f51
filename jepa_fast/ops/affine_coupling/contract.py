"""Schemas, fakes and backends of `affine_coupling`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa_fast.ops._autograd import recomputed_gradients
from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.affine_coupling import reference


def _fake(
    x: Tensor, raw_scale: Tensor, shift: Tensor, mask: Tensor, scale_bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=dtype)


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
    inputs = (x, raw_scale, shift)
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]


def reference_backward(
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
    def function(x: Tensor, raw_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return reference.affine_coupling(x, raw_scale, shift, mask, scale_bound, inverse)

    return recomputed_gradients(function, (x, raw_scale, shift), needs, (grad_y, grad_logdet))


FORWARD = Operator(
    "affine_coupling(Tensor x, Tensor raw_scale, Tensor shift, Tensor mask, float scale_bound, "
    "bool inverse, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    backends={"reference": Backend("jepa_fast.ops.affine_coupling.reference:affine_coupling")},
)
BACKWARD = Operator(
    "affine_coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor raw_scale, "
    "Tensor shift, Tensor mask, float scale_bound, bool inverse, bool[] needs, str backend) "
    "-> Tensor[]",
    fake=_fake_backward,
    backends={"reference": Backend(f"{__name__}:reference_backward")},
)
