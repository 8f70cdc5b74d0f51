"""mixture_nll of joint and of coordinate mixtures, against torch.distributions."""

from __future__ import annotations

import functools
import math

import torch
from cases import HEAD, HEAD_L, LOG_SCALE, mixture_nll_cost
from plain import Other, backend_of, operator_race, values
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from jepa_fast.perf import Case, Race, benchmark

_SMALL = {"T": 64, "D": 96, "K": 5}
_FLOOR = 1e-3


@benchmark(
    [
        Case("mixture_nll", "joint-small", _SMALL, quick=True),
        Case("mixture_nll", "joint-2048-tokens", HEAD, devices=("cpu",)),
        Case("mixture_nll", "joint-vit-l", HEAD_L, "bfloat16", ("cuda",)),
    ]
)
def bench_mixture_nll_joint(case: Case, device: str) -> Race:
    """Forward and backward: one component a token."""
    return _race(case, device, "joint")


@benchmark(
    [
        Case("mixture_nll", "coordinate-2048-tokens", HEAD, devices=("cpu",)),
        Case("mixture_nll", "coordinate-vit-l", HEAD_L, "bfloat16", ("cuda",)),
    ]
)
def bench_mixture_nll_coordinate(case: Case, device: str) -> Race:
    """Forward and backward: one component a coordinate."""
    return _race(case, device, "coordinate")


def _race(case: Case, device: str, event: str) -> Race:
    shape = (case["T"], case["K"], case["D"])
    weights = shape if event == "coordinate" else shape[:2]
    target = values(case["T"], case["D"], device=device).mul_(math.exp(LOG_SCALE))
    logits, loc, log_scale = (
        values(*size, dtype=case.dtype, device=device, seed=seed)
        for seed, size in enumerate((weights, shape, shape), start=1)
    )
    # So close that every component has its share of a token.
    loc.mul_(0.02)
    log_scale.mul_(0.02).add_(LOG_SCALE)
    for parameter in (logits, loc, log_scale):
        parameter.requires_grad_()
    arguments = (target, logits, loc, log_scale)
    return operator_race(
        case,
        device,
        mixture_nll_cost(case, event, backward=True),
        arguments,
        {"event": event, "scale_floor": _FLOOR},
        backend=backend_of("mixture_nll", *arguments, "gaussian", event, _FLOOR, "exp"),
        grads=[torch.full((case["T"],), 1 / case["T"], device=device)],
        others={"mixture_same_family": Other(functools.partial(_mixture_same_family, event))},
    )


def _mixture_same_family(
    event: str, target: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor
) -> Tensor:
    """In float32, as under autocast, and without checks of the arguments: they wait for a GPU."""
    logits, loc, log_scale = logits.float(), loc.float(), log_scale.float()
    normal = Normal(loc, _FLOOR + log_scale.exp(), validate_args=False)
    if event == "joint":
        mixture = MixtureSameFamily(
            Categorical(logits=logits, validate_args=False),
            Independent(normal, 1, validate_args=False),
            validate_args=False,
        )
        return -mixture.log_prob(target)
    normal = Normal(normal.loc.mT, normal.scale.mT, validate_args=False)
    weights = Categorical(logits=logits.mT, validate_args=False)
    return -MixtureSameFamily(weights, normal, validate_args=False).log_prob(target).sum(-1)
