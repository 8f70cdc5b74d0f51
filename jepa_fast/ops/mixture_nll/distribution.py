"""What else one asks of the mixtures of `mixture_nll`: responsibilities, CDF and quantiles.

Plain PyTorch, on any device: it serves evaluation, not training steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_fast.ops._checks import (
    check_dim,
    check_finite,
    check_flag,
    check_same_size,
    check_tensor,
    check_vectors,
    may_be_checked,
)
from jepa_fast.ops.mixture_nll import reference
from jepa_fast.ops.mixture_nll.api import _check_parameters

_MOST_STEPS = 200  # of the root finder; at worst, the bracket is halved in two or three


def mixture_responsibilities(
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str = "gaussian",
    scale_floor: float = 1e-3,
    scale_map: str = "exp",
) -> Tensor:
    """Posterior probability of each component, given the target that it may have drawn.

    Args:
        target: [T, D].
        logits: [T, K], one component for all coordinates of a token, or [T, K, D], one for each.
        loc, log_scale, family, scale_floor, scale_map: as in `mixture_nll`.

    Returns:
        In the shape of `logits`, summing to 1 over K; float32 (float64 if any input is),
        differentiable.

    Raises:
        TypeError: an argument is not a dense floating tensor.
        ValueError: as `mixture_nll`; a target that is not finite, which only a CPU tells (on a GPU
            with JEPA_FAST_DEBUG=1).

    Source: Bishop 1994, equation 22.
    """
    op = "mixture_responsibilities"
    z, logits, scale, dtype = _standardised(
        op, target, logits, loc, log_scale, family, scale_floor, scale_map
    )
    # Up to a constant, which the normalisation takes out.
    if family == "gaussian":
        log_density = -0.5 * z.square() - scale.log()
    else:
        log_density = F.logsigmoid(z) + F.logsigmoid(-z) - scale.log()
    if logits.ndim == 2:
        log_density = log_density.sum(-1)
    return (logits + log_density).softmax(1).to(dtype)


def mixture_cdf(
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str = "gaussian",
    scale_floor: float = 1e-3,
    scale_map: str = "exp",
    *,
    complement: bool = False,
) -> Tensor:
    """Cumulative distribution function of every coordinate on its own, P(z_j <= target_j).

    Of a joint mixture, the coordinates' marginals are the mixtures with the token's weights.

    Args:
        target: [T, D].
        logits: [T, K] or [T, K, D].
        loc, log_scale, family, scale_floor, scale_map: as in `mixture_nll`.
        complement: P(z_j > target_j) instead, to full precision where it is small.

    Returns:
        [T, D] float32 (float64 if any input is), differentiable. Small values have the relative
        precision of the dtype, down to its smallest normal number.

    Raises:
        TypeError: an argument is not a dense floating tensor, or `complement` is not bool.
        ValueError: as `mixture_responsibilities`.
    """
    op = "mixture_cdf"
    check_flag(op, "complement", complement)
    z, logits, _, dtype = _standardised(
        op, target, logits, loc, log_scale, family, scale_floor, scale_map
    )
    below = _component_cdf(-z if complement else z, family)
    # The weights sum to 1 but for rounding.
    return reference.mixture_mean(logits, below).clamp(max=1).to(dtype)


@torch.no_grad()
def mixture_quantile(
    level: float | Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str = "gaussian",
    scale_floor: float = 1e-3,
    scale_map: str = "exp",
) -> Tensor:
    """Where the CDF of every coordinate, as in `mixture_cdf`, reaches a level.

    Between the components' own quantiles, by Newton's method on the logarithm of the smaller tail,
    and by bisection where that would leave the bracket or be slow; in float64, so that the result
    is as exact as its dtype allows, in tails, too.

    Args:
        level: between 0 and 1, both excluded: a number, or a floating tensor that broadcasts with
            [T, D], such as [L, 1, 1] for L levels of all coordinates.
        logits: [T, K] or [T, K, D].
        loc, log_scale, family, scale_floor, scale_map: as in `mixture_nll`.

    Returns:
        [T, D], or [..., T, D] with the further dimensions of `level`, in float32 (float64 if any
        tensor among the inputs is), without gradients.

    Raises:
        TypeError: an argument is not a dense floating tensor, `level` neither that nor a
            number.
        ValueError: as `mixture_nll`; a level out of range (of a tensor, only a CPU tells; on a GPU
            with JEPA_FAST_DEBUG=1), or of a shape that does not broadcast with [T, D].
    """
    op = "mixture_quantile"
    _check(op, logits, loc, log_scale, family, scale_floor, scale_map)
    dtype = reference.compute_dtype(logits, loc, log_scale)
    if isinstance(level, Tensor):
        dtype = torch.promote_types(dtype, reference.compute_dtype(level))
    level = _check_level(op, level, loc)
    weight = logits.double().softmax(1)
    if weight.ndim == 2:
        weight = weight.unsqueeze(-1)
    scale = reference.component_scale(log_scale.double(), scale_floor, scale_map)

    # Levels above one half by reflection: x = sign * y, and y has the smaller tail below it.
    sign = torch.where(level <= 0.5, 1.0, -1.0).to(level)
    tail = torch.minimum(level, 1 - level)
    signed_loc = sign.unsqueeze(-2) * loc.double()  # [..., T, K, D]
    ends = signed_loc + scale * _component_quantile(tail, family).unsqueeze(-2)
    low, high = ends.amin(-2), ends.amax(-2)

    def log_tail(y: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the mass below y, over the tail's, and its derivative."""
        z = (y.unsqueeze(-2) - signed_loc) / scale
        mass = (weight * _component_cdf(z, family)).sum(-2)
        density = (weight * _component_density(z, family) / scale).sum(-2)
        return mass.log() - tail.log(), density / mass

    # Below what the result's dtype tells apart, above what float64 rounds.
    resolution = max(torch.finfo(dtype).eps / 4, 4 * torch.finfo(torch.float64).eps)
    y = _root(log_tail, low, high, (weight * ends).sum(-2), resolution, scale.amin(1))
    return (sign * y).to(dtype)


def _root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    low: Tensor,
    high: Tensor,
    x: Tensor,
    resolution: float,
    smallest: Tensor,
) -> Tensor:
    """Where an increasing function, given with its derivative, is 0, element by element.

    Args:
        function: of x.
        low, high: around the roots.
        x: between them, to start from.
        resolution: steps count as none below this share of `|x| + smallest`.
        smallest: scale on which the function changes.
    """
    step = step_before = high - low
    done = step <= resolution * (smallest + x.abs())
    for _ in range(_MOST_STEPS):
        if bool(done.all()):
            break
        value, slope = function(x)
        low, high = torch.where(value < 0, x, low), torch.where(value < 0, high, x)
        newton = x - value / slope
        # Also where there is no Newton step: comparisons with NaN are false.
        good = (newton >= low) & (newton <= high) & ((newton - x).abs() <= 0.5 * step_before)
        after = torch.where(good, newton, low + 0.5 * (high - low))
        step_before, step = step, (after - x).abs()
        x = torch.where(done, x, after)
        done = done | (step <= resolution * (smallest + x.abs()))
    return x


def _component_cdf(z: Tensor, family: str) -> Tensor:
    # erfc, as torch's ndtr loses the lower tail to 1 + erf.
    return torch.sigmoid(z) if family == "logistic" else 0.5 * torch.erfc(-math.sqrt(0.5) * z)


def _component_density(z: Tensor, family: str) -> Tensor:
    """Of the standardised component."""
    if family == "logistic":
        return torch.sigmoid(z) * torch.sigmoid(-z)
    return torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


def _component_quantile(level: Tensor, family: str) -> Tensor:
    """Of the standardised component."""
    return level.logit() if family == "logistic" else torch.special.ndtri(level)


def _standardised(
    op: str,
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str,
    scale_floor: float,
    scale_map: str,
) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """(z [T, K, D], the target as every component sees it; logits; scale; the result's dtype), of
    checked arguments.

    In float64: far out, where a square may pass the largest float32, z decides all of the digits.
    """
    _check(op, logits, loc, log_scale, family, scale_floor, scale_map)
    check_dim(op, "target", target, 2, "[T, D]")
    check_vectors(op, "target", target)
    check_same_size(op, "target", target, 0, "loc", loc, 0)
    check_same_size(op, "target", target, 1, "loc", loc, 2)
    check_finite(op, "target", target)
    scale = reference.component_scale(log_scale.double(), scale_floor, scale_map)
    z = (target.double().unsqueeze(1) - loc.double()) / scale
    return z, logits.double(), scale, reference.compute_dtype(target, logits, loc, log_scale)


def _check(
    op: str,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str,
    scale_floor: float,
    scale_map: str,
) -> None:
    check_tensor(op, "logits", logits)
    event = "coordinate" if logits.ndim == 3 else "joint"
    _check_parameters(op, logits, loc, log_scale, family, event, scale_floor, scale_map)


def _check_level(op: str, level: object, loc: Tensor) -> Tensor:
    """The level in float64, [..., T, D]."""
    shape = (loc.shape[0], loc.shape[2])
    if isinstance(level, Tensor):
        check_vectors(op, "level", level)
        if level.device != loc.device:
            raise ValueError(
                f"{op}: level must be on the device of loc, {loc.device}, got {level.device}"
            )
        wide = level.double()
    elif isinstance(level, Real):
        wide = torch.tensor(float(level), dtype=torch.float64)
    else:
        raise TypeError(f"{op}: level must be a number or a tensor, got {type(level).__name__}")
    if not isinstance(level, Tensor) or may_be_checked(level):
        outside = ~((wide > 0) & (wide < 1))  # NaN is outside
        if bool(outside.any()):
            raise ValueError(
                f"{op}: level must be between 0 and 1, both excluded, got "
                f"{wide[outside].flatten()[0].item()}"
            )
    try:
        whole = torch.broadcast_shapes(wide.shape, shape)
    except RuntimeError:
        whole = ()
    if whole[-2:] != shape:
        raise ValueError(
            f"{op}: level must broadcast with [T, D] = {list(shape)}, as [L, 1, 1] does, got "
            f"{list(wide.shape)}"
        )
    return wide.to(loc.device).expand(whole)
