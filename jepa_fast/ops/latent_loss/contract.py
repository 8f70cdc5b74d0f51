"""Schemas, fakes and backends of `latent_loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops._checks import check_index_range, only_kernel_dtypes
from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.latent_loss import reference


def _fake(
    prediction: Tensor,
    teacher: Tensor,
    target_index: Tensor,
    target_mask: Tensor | None,
    kind: str,
    normalize_target: bool,
    beta: float,
    eps: float,
    with_slope: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return prediction.new_empty((), dtype=dtype), reference.empty_slope(prediction, with_slope)


def _reference(
    prediction: Tensor, teacher: Tensor, target_index: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    check_index_range("latent_loss", "target_index", target_index, teacher.shape[1])
    return reference.latent_loss_and_slope(prediction, teacher, target_index, *options)


def _unsupported(prediction: Tensor, teacher: Tensor, *rest: object) -> list[str]:
    return only_kernel_dtypes(prediction, teacher)


_WIDEST = 8192  # columns that a Triton program holds in registers


def _unsupported_triton(prediction: Tensor, teacher: Tensor, *rest: object) -> list[str]:
    reasons = only_kernel_dtypes(prediction, teacher)
    if prediction.shape[-1] > _WIDEST:
        reasons.append(f"takes up to {_WIDEST} columns, got {prediction.shape[-1]}")
    return reasons


def _fake_backward(grad: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
    return slope.new_empty(slope.shape, dtype=dtype)


FORWARD = Operator(
    "latent_loss(Tensor prediction, Tensor teacher, Tensor target_index, Tensor? target_mask, "
    "str kind, bool normalize_target, float beta, float eps, bool with_slope, str backend) "
    "-> (Tensor, Tensor)",
    fake=_fake,
    backends={
        "triton": Backend("jepa_fast.ops.latent_loss.triton:latent_loss", _unsupported_triton),
        "cpu": Backend("jepa_fast.ops.latent_loss.native:latent_loss", _unsupported),
        "reference": Backend(f"{__name__}:_reference"),
    },
)
# The forward pass has both rows at hand, so it leaves the gradient but for the factor from above:
# neither prediction nor teacher is kept or read again.
BACKWARD = Operator(
    "latent_loss_backward(Tensor grad, Tensor slope, ScalarType dtype, str backend) -> Tensor",
    fake=_fake_backward,
    backends={"reference": Backend(f"{reference.__name__}:latent_loss_backward")},
)
