"""Schemas, fakes and backends of `latent_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_fast.ops._checks import check_index_range
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
) -> Tensor:
    return prediction.new_empty((), dtype=torch.promote_types(prediction.dtype, torch.float32))


def _reference(
    prediction: Tensor,
    teacher: Tensor,
    target_index: Tensor,
    target_mask: Tensor | None,
    kind: str,
    normalize_target: bool,
    beta: float,
    eps: float,
) -> Tensor:
    check_index_range("latent_loss", "target_index", target_index, teacher.shape[1])
    return reference.latent_loss(
        prediction, teacher, target_index, target_mask, kind, normalize_target, beta, eps
    )


def _fake_backward(
    grad: Tensor,
    prediction: Tensor,
    teacher: Tensor,
    target_index: Tensor,
    target_mask: Tensor | None,
    kind: str,
    normalize_target: bool,
    beta: float,
    eps: float,
) -> Tensor:
    return prediction.new_empty(prediction.shape)


FORWARD = Operator(
    "latent_loss(Tensor prediction, Tensor teacher, Tensor target_index, Tensor? target_mask, "
    "str kind, bool normalize_target, float beta, float eps, str backend) -> Tensor",
    fake=_fake,
    backends={"reference": Backend(f"{__name__}:_reference")},
)
BACKWARD = Operator(
    "latent_loss_backward(Tensor grad, Tensor prediction, Tensor teacher, Tensor target_index, "
    "Tensor? target_mask, str kind, bool normalize_target, float beta, float eps, str backend) "
    "-> Tensor",
    fake=_fake_backward,
    backends={"reference": Backend(f"{reference.__name__}:latent_loss_backward")},
)
