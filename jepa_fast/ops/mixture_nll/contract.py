"""Schemas, fakes and backends of `mixture_nll`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jepa_fast.ops._autograd import recomputed_gradients
from jepa_fast.ops._checks import check_finite_target, only_float32_kernel_dtypes
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
) -> tuple[Tensor, Tensor]:
    dtype = reference.compute_dtype(target, logits, loc, log_scale)
    posterior = reference.empty_posterior(target, loc, event, dtype)
    return target.new_empty(target.shape[0], dtype=dtype), posterior


def _reference(target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    nll, posterior = reference.mixture_nll_and_posterior(target, *arguments)
    check_finite_target("mixture_nll", target, nll)
    return nll, posterior


def _unsupported(
    target: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor, *options: Any
) -> list[str]:
    return only_float32_kernel_dtypes(target, logits, loc, log_scale)


def _unsupported_backward(grad: Tensor, *arguments: Any) -> list[str]:
    return _unsupported(*arguments)


def _fake_backward(
    grad: Tensor,
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    posterior: Tensor,
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
    posterior: Tensor,
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


_FOLDER = "jepa_fast.ops.mixture_nll"

FORWARD = Operator(
    "mixture_nll(Tensor target, Tensor logits, Tensor loc, Tensor log_scale, str family, "
    "str event, float scale_floor, str scale_map, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    backends={
        "triton": Backend(f"{_FOLDER}.triton:mixture_nll", _unsupported),
        "cpu": Backend(f"{_FOLDER}.native:mixture_nll", _unsupported),
        "reference": Backend(f"{__name__}:_reference"),
    },
)
# Of joint events the forward pass leaves the posterior of the components: without it, parameters
# would have to be read twice.
BACKWARD = Operator(
    "mixture_nll_backward(Tensor grad, Tensor target, Tensor logits, Tensor loc, "
    "Tensor log_scale, Tensor posterior, str family, str event, float scale_floor, str scale_map, "
    "bool[] needs, str backend) -> Tensor[]",
    fake=_fake_backward,
    backends={
        "triton": Backend(f"{_FOLDER}.triton:mixture_nll_backward", _unsupported_backward),
        "cpu": Backend(f"{_FOLDER}.native:mixture_nll_backward", _unsupported_backward),
        "reference": Backend(f"{__name__}:reference_backward"),
    },
)
