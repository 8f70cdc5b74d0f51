"""Schemas, fakes and backends of `mixture_nll`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jepa_fast.ops._autograd import recomputed_gradients
from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.mixture_nll import reference


def _fake(
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str,
    event: str,
    scale_floor: float,
    scale_map: str,
) -> Tensor:
    dtype = reference.compute_dtype(target, logits, loc, log_scale)
    return target.new_empty(target.shape[0], dtype=dtype)


def _fake_backward(
    grad: Tensor,
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str,
    event: str,
    scale_floor: float,
    scale_map: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    inputs = (target, logits, loc, log_scale)
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]


def reference_backward(
    grad: Tensor,
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str,
    event: str,
    scale_floor: float,
    scale_map: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    def function(target: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
        return reference.mixture_nll(
            target, logits, loc, log_scale, family, event, scale_floor, scale_map
        )

    return recomputed_gradients(function, (target, logits, loc, log_scale), needs, [grad])


FORWARD = Operator(
    "mixture_nll(Tensor target, Tensor logits, Tensor loc, Tensor log_scale, str family, "
    "str event, float scale_floor, str scale_map, str backend) -> Tensor",
    fake=_fake,
    backends={"reference": Backend("jepa_fast.ops.mixture_nll.reference:mixture_nll")},
)
BACKWARD = Operator(
    "mixture_nll_backward(Tensor grad, Tensor target, Tensor logits, Tensor loc, "
    "Tensor log_scale, str family, str event, float scale_floor, str scale_map, bool[] needs, "
    "str backend) -> Tensor[]",
    fake=_fake_backward,
    backends={"reference": Backend(f"{__name__}:reference_backward")},
)
