"""The C++ kernels: csrc/cpu/mixture_nll.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops import _native
from jepa_fast.ops._checks import check_finite_target
from jepa_fast.ops._rows import without_gaps
from jepa_fast.ops.mixture_nll.reference import empty_posterior

_OPTIONS = "bool is_joint, bool is_logistic, bool is_softplus, float floor"
_INPUTS = "Tensor target, Tensor logits, Tensor loc, Tensor log_scale"
_FORWARD = _native.define(
    f"mixture_nll({_INPUTS}, {_OPTIONS}, Tensor(a!) nll, Tensor(b!) posterior) -> ()"
)
_BACKWARD = _native.define(
    f"mixture_nll_backward(Tensor grad, {_INPUTS}, Tensor? posterior, {_OPTIONS}, "
    "Tensor(a!)? nll, Tensor(b!)? grad_target, Tensor(c!)? grad_logits, Tensor(d!)? grad_loc, "
    "Tensor(e!)? grad_log_scale) -> ()"
)


def mixture_nll(target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """As `nll_and_posterior`; on a CPU a target that is not finite is an error."""
    nll, posterior = nll_and_posterior(target, *arguments)
    check_finite_target("mixture_nll", target, nll)
    return nll, posterior


def nll_and_posterior(
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str,
    event: str,
    scale_floor: float,
    scale_map: str,
) -> tuple[Tensor, Tensor]:
    """As `reference.mixture_nll_and_posterior`."""
    nll = target.new_empty(target.shape[0], dtype=torch.float32)
    posterior = empty_posterior(target, loc, event, torch.float32)
    rows = _rows((target, logits, loc, log_scale), event)
    _FORWARD(*rows, *_options(family, event, scale_floor, scale_map), nll, posterior)
    return nll, posterior


def mixture_nll_backward(
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
    """Gradients of the inputs that are marked in `needs`."""
    inputs = (target, logits, loc, log_scale)
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) if need else None
             for t, need in zip(inputs, needs, strict=True)]  # fmt: skip
    _BACKWARD(
        grad.to(torch.float32).contiguous(),
        *_rows(inputs, event),
        posterior,
        *_options(family, event, scale_floor, scale_map),
        None,
        *_rows(grads, event),
    )
    return [each for each in grads if each is not None]


def mixture_nll_and_gradients_(
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str,
    event: str,
    scale_floor: float,
    scale_map: str,
    factor: float,
    grad_target: Tensor | None,
) -> Tensor:
    """The NLL of each token, [T] float32; its gradients times `factor` replace the parameters.

    Rows of the parameters must be without gaps. The gradient of target [T, D] goes to
    `grad_target`, contiguous, if there is one.
    """
    nll = target.new_empty(target.shape[0], dtype=torch.float32)
    _BACKWARD(
        torch.full_like(nll, factor),
        *_rows((target, logits, loc, log_scale), event),
        None,
        *_options(family, event, scale_floor, scale_map),
        nll,
        *_rows((grad_target, logits, loc, log_scale), event),
    )
    return nll


def _rows(tensors: Sequence[Tensor | None], event: str) -> list[Tensor | None]:
    """target, logits, loc and log_scale as [T, R, D], as the kernels take them."""
    target, logits, *rest = tensors
    if target is not None:
        target = target.unsqueeze(1)
    if logits is not None and event == "joint":
        logits = logits.unsqueeze(1)
    return [None if t is None else without_gaps(t) for t in (target, logits, *rest)]


def _options(
    family: str, event: str, scale_floor: float, scale_map: str
) -> tuple[bool, bool, bool, float]:
    return event == "joint", family == "logistic", scale_map == "softplus", scale_floor
