"""linear_mixture_nll, against a linear layer and the likelihood of its outputs."""

from __future__ import annotations

import math

import torch
from cases import HEAD, HEAD_L, LOG_SCALE, linear_mixture_nll_cost
from plain import backend_of, operator_race, values

from jepa_fast.perf import Case, Race, benchmark

_SMALL = {"T": 32, "H": 96, "D": 96, "K": 5}


@benchmark(
    [
        Case("linear_mixture_nll", "joint-small", _SMALL, quick=True),
        Case("linear_mixture_nll", "joint-2048-tokens", {**HEAD, "H": 384}, devices=("cpu",)),
        Case("linear_mixture_nll", "joint-vit-l", {**HEAD_L, "H": 384}, "bfloat16", ("cuda",)),
    ]
)
def bench_linear_mixture_nll_joint(case: Case, device: str) -> Race:
    """Forward and backward: one component a token."""
    return _race(case, device, "joint")


@benchmark(
    [
        Case("linear_mixture_nll", "coordinate-2048-tokens", {**HEAD, "H": 384}, devices=("cpu",)),
        Case("linear_mixture_nll", "coordinate-vit-l", {**HEAD_L, "H": 384}, "bfloat16", ("cuda",)),
    ]
)
def bench_linear_mixture_nll_coordinate(case: Case, device: str) -> Race:
    """Forward and backward: one component a coordinate."""
    return _race(case, device, "coordinate")


def _race(case: Case, device: str, event: str) -> Race:
    tokens, hidden_dim, components, width = (case[size] for size in ("T", "H", "K", "D"))
    outputs = components * (2 * width + 1) if event == "joint" else 3 * components * width
    hidden = values(tokens, hidden_dim, dtype=case.dtype, device=device, grad=True)
    weight = values(outputs, hidden_dim, dtype=case.dtype, device=device, seed=1)
    weight.mul_(0.02 * hidden_dim**-0.5).requires_grad_()
    bias = torch.zeros(outputs, dtype=weight.dtype, device=device)
    bias[-components * width :] = LOG_SCALE
    bias.requires_grad_()
    target = values(tokens, width, device=device, seed=3).mul_(math.exp(LOG_SCALE))
    options = ("gaussian", event, 1e-3, "exp", "mean")
    return operator_race(
        case,
        device,
        linear_mixture_nll_cost(case, event, backward=True),
        (hidden, weight, bias, target),
        {"num_components": components, "event": event},
        backend=backend_of(
            "linear_mixture_nll", hidden, weight, bias, target, components, *options
        ),
        grads=[torch.ones((), device=device)],
    )
