"""Schemas, fakes and backends of `q_sample` and `denoising_loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops._checks import only_kernel_dtypes
from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.q_sample import reference

_FOLDER = "jepa_fast.ops.q_sample"


def _fake(target: Tensor, signal: Tensor, *rest: Any) -> Tensor:
    return target.new_empty((*signal.shape, target.shape[1]))


def _fake_backward(grad: Tensor, signal: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape[-2:], dtype=dtype)


def _unsupported(target: Tensor, *rest: Any) -> list[str]:
    return only_kernel_dtypes(target)


Q_SAMPLE = Operator(
    "q_sample(Tensor target, Tensor signal, Tensor noise, Tensor seed, SymInt first_row,"
    " str backend) -> Tensor",
    fake=_fake,
    backends={
        "triton": Backend(f"{_FOLDER}.triton:q_sample", _unsupported),
        "cpu": Backend(f"{_FOLDER}.native:q_sample", _unsupported),
        "reference": Backend(f"{reference.__name__}:q_sample"),
    },
)
Q_SAMPLE_BACKWARD = Operator(
    "q_sample_backward(Tensor grad, Tensor signal, ScalarType dtype, str backend) -> Tensor",
    fake=_fake_backward,
    backends={"reference": Backend(f"{reference.__name__}:q_sample_backward")},
)


def _fake_loss(
    prediction: Tensor, target: Tensor | None, seed: Tensor, first_row: int, with_slope: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return prediction.new_empty((), dtype=dtype), reference.empty_slope(prediction, with_slope)


def _fake_loss_backward(grad: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
    return slope.new_empty(slope.shape, dtype=dtype)


DENOISING_LOSS = Operator(
    "denoising_loss(Tensor prediction, Tensor? target, Tensor seed, SymInt first_row,"
    " bool with_slope, str backend) -> (Tensor, Tensor)",
    fake=_fake_loss,
    backends={
        "triton": Backend(f"{_FOLDER}.triton:denoising_loss", _unsupported),
        "cpu": Backend(f"{_FOLDER}.native:denoising_loss", _unsupported),
        "reference": Backend(f"{reference.__name__}:denoising_loss_and_slope"),
    },
)
# The forward pass has the noise at hand, so it leaves the gradient but for the factor from above:
# no noise is drawn a third time, and the prediction is not kept.
DENOISING_LOSS_BACKWARD = Operator(
    "denoising_loss_backward(Tensor grad, Tensor slope, ScalarType dtype, str backend) -> Tensor",
    fake=_fake_loss_backward,
    backends={"reference": Backend(f"{reference.__name__}:denoising_loss_backward")},
)
