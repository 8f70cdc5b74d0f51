"""Mixtures of Gaussians or logistics, in plain PyTorch: the specification.

Scales are `floor + exp(log_scale)` or `floor + softplus(log_scale)`. Adding the floor instead of
clamping at it keeps a gradient on every scale: a component that has shrunk can grow again.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FAMILIES = ("gaussian", "logistic")
EVENTS = ("joint", "coordinate")
SCALE_MAPS = ("exp", "softplus")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def component_scale(log_scale: Tensor, scale_floor: float, scale_map: str) -> Tensor:
    """Standard deviations (Gaussian) or scales (logistic), above `scale_floor`."""
    # -logsigmoid(-x) is softplus without F.softplus's cut-over to the identity at 20.
    raw = log_scale.exp() if scale_map == "exp" else -F.logsigmoid(-log_scale)
    return scale_floor + raw


def mixture_nll(
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str,
    event: str,
    scale_floor: float,
    scale_map: str,
) -> Tensor:
    """[T] from target [T, D], logits [T, K] or [T, K, D], loc and log_scale [T, K, D]."""
    return mixture_nll_and_posterior(
        target, logits, loc, log_scale, family, event, scale_floor, scale_map
    )[0]


def mixture_nll_and_posterior(
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str,
    event: str,
    scale_floor: float,
    scale_map: str,
) -> tuple[Tensor, Tensor]:
    """(nll [T], the components' posterior [T, K]); [T, 0] where every coordinate has its own."""
    dtype = compute_dtype(target, logits, loc, log_scale)
    scale = component_scale(log_scale.to(dtype), scale_floor, scale_map)  # [T, K, D]
    z = (target.to(dtype).unsqueeze(1) - loc.to(dtype)) / scale
    if family == "gaussian":
        log_density = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
    else:
        log_density = F.logsigmoid(z) + F.logsigmoid(-z)
    log_density = log_density - scale.log()
    log_weight = logits.to(dtype).log_softmax(1)
    if event == "joint":
        whole = log_density.sum(-1)
        # Sums may be millions below zero: what they have in common would round logits away.
        top = whole.detach().amax(1, keepdim=True).clamp(min=torch.finfo(dtype).min)
        joint = log_weight + (whole - top)
        return -torch.logsumexp(joint, 1) - top.squeeze(1), joint.detach().softmax(1)
    nll = -torch.logsumexp(log_weight + log_density, 1).sum(-1)
    return nll, empty_posterior(target, loc, event, dtype)


def empty_posterior(target: Tensor, loc: Tensor, event: str, dtype: torch.dtype) -> Tensor:
    """Room for the posterior that the forward pass leaves."""
    components = loc.shape[1] if event == "joint" else 0
    return target.new_empty(target.shape[0], components, dtype=dtype)


def mixture_mean(logits: Tensor, loc: Tensor) -> Tensor:
    """[T, D]."""
    weight = logits.softmax(1)
    if weight.ndim == 2:
        weight = weight.unsqueeze(-1)
    return (weight * loc).sum(1)


def mixture_variance(logits: Tensor, loc: Tensor, scale: Tensor, family: str) -> Tensor:
    """[T, D]: the variance of each coordinate."""
    # What a component has no weight for is gone before its square could pass the largest number.
    root_weight = torch.exp(0.5 * logits.log_softmax(1))
    if root_weight.ndim == 2:
        root_weight = root_weight.unsqueeze(-1)
    within = (root_weight * scale).square() * (1.0 if family == "gaussian" else math.pi**2 / 3)
    between = (root_weight * (loc - mixture_mean(logits, loc).unsqueeze(1))).square()
    return (within + between).sum(1)


def mixture_sample(
    logits: Tensor,
    loc: Tensor,
    scale: Tensor,
    n: int,
    family: str,
    event: str,
    generator: torch.Generator | None,
) -> Tensor:
    """[n, T, D]."""
    tokens, components, width = loc.shape
    choices = 1 if event == "joint" else width
    weight = logits.reshape(tokens, components, choices).softmax(1).transpose(1, 2)
    component = torch.multinomial(  # [T * choices, n]
        weight.reshape(-1, components), n, replacement=True, generator=generator
    )
    index = component.view(tokens, choices, n).permute(2, 0, 1).unsqueeze(2)  # [n, T, 1, choices]
    index = index.expand(n, tokens, 1, width)
    loc, scale = (p.expand(n, -1, -1, -1).gather(2, index).squeeze(2) for p in (loc, scale))
    if family == "gaussian":
        noise = torch.randn(loc.shape, dtype=loc.dtype, device=loc.device, generator=generator)
    else:
        uniform = torch.rand(loc.shape, dtype=loc.dtype, device=loc.device, generator=generator)
        noise = torch.logit(uniform, eps=torch.finfo(loc.dtype).eps / 2)
    return loc + scale * noise


def mixture_parameter_count(num_components: int, width: int, event: str) -> int:
    """How many numbers describe one token's mixture: K (2 D + 1) joint, 3 K D per coordinate."""
    logits = num_components * (1 if event == "joint" else width)
    return logits + 2 * num_components * width


def split_mixture_parameters(
    parameters: Tensor, num_components: int, width: int, event: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, loc, log_scale) of parameters [T, P], laid out one after the other in that order.

    logits are K numbers (`event="joint"`) or K rows of D (`"coordinate"`); loc and log_scale are K
    rows of D: component by component, the coordinate running fastest.
    """
    block = num_components * width
    count = num_components if event == "joint" else block
    logits, loc, log_scale = parameters.split([count, block, block], dim=-1)
    shape = (parameters.shape[0], num_components, width)
    if event == "coordinate":
        logits = logits.reshape(shape)
    return logits, loc.reshape(shape), log_scale.reshape(shape)
