"""The Triton kernels: a program has one token's mixture, of all components and some coordinates at
a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_fast.ops import _configs
from jepa_fast.ops._checks import check_finite_target
from jepa_fast.ops._compile import CompileCase
from jepa_fast.ops._launch import launch, recorded_cases
from jepa_fast.ops._rows import without_gaps
from jepa_fast.ops._traffic import TrafficCase
from jepa_fast.ops.mixture_nll.reference import empty_posterior
from jepa_fast.perf.race import Cost

CONFIGS = Path(__file__).parent / "configs"

# What Gaussian log-densities lack below, a coordinate: rounded at every term it would add up.
_HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)
# Below all that matters, but finite: no difference from it is infinity minus itself.
_LOWEST = tl.constexpr(-3.0e38)
_SMALLEST_FLOOR = torch.finfo(torch.float32).tiny


@triton.jit
def log1p_of_exp(x):
    """log(1 + exp(x)) for x <= 0, to a few units in the last place."""
    # log(1 + u) = 2 artanh(u / (2 + u)), whose series ends soon below 1 / 3.
    u = tl.exp(x)
    s = u / (2.0 + u)
    square = s * s
    p = square * (1.0 / 15) + 1.0 / 13
    p = p * square + 1.0 / 11
    p = p * square + 1.0 / 9
    p = p * square + 1.0 / 7
    p = p * square + 1.0 / 5
    p = p * square + 1.0 / 3
    return 2.0 * (s + s * square * p)


@triton.jit
def component(target, loc, log_scale, floor, LOGISTIC: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Of each component at each coordinate: the log-density, but for the scale and for a Gaussian's
    constant; the scale; the negated derivatives of the log-density by target and by log_scale.
    """
    if SOFTPLUS:
        raw = tl.maximum(log_scale, 0.0) + log1p_of_exp(-tl.abs(log_scale))
        raw_slope = 1.0 / (1.0 + tl.exp(-log_scale))
    else:
        raw = tl.exp(log_scale)
        raw_slope = raw
    # Scales stay normal numbers, whose exponents are what they say.
    raw = tl.where(raw > 1e38, 1e38, raw)
    scale = floor + raw
    inverse = 1.0 / scale
    z = (target - loc) * inverse
    if LOGISTIC:
        distance = tl.abs(z)
        decay = tl.exp(-distance)
        log_density = -distance - 2.0 * tl.log(1.0 + decay)
        slope = (1.0 - decay) / (1.0 + decay)  # tanh(|z| / 2)
        slope = tl.where(z < 0.0, -slope, slope)
    else:
        log_density = -0.5 * z * z
        slope = z
    return log_density, scale, slope * inverse, (1.0 - z * slope) * inverse * raw_slope


@triton.jit
def components_at(
    d,  # [1, BLOCK] coordinates
    targets,  # a token's row
    locs,  # [ROWS, 1] rows of its components, as log_scales
    log_scales,
    present,  # [ROWS, 1]: those that are there
    inside,  # [1, BLOCK]
    floor,
    LOGISTIC: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """`component` of what lies in memory."""
    there = present & inside
    target = tl.load(targets + d, mask=inside, other=0.0).to(tl.float32)
    loc = tl.load(locs + d, mask=there, other=0.0).to(tl.float32)
    log_scale = tl.load(log_scales + d, mask=there, other=0.0).to(tl.float32)
    return component(target, loc, log_scale, floor, LOGISTIC, SOFTPLUS)


@triton.jit
def joint_log_density(
    targets,
    locs,
    log_scales,
    present,
    floor,
    LOGISTIC: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[ROWS, 1]: of each component the sum over all coordinates, but for a Gaussian's constant."""
    total = tl.zeros([ROWS, 1], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        d = first + tl.arange(0, BLOCK)[None, :]
        inside = d < WIDTH
        log_density, scale, _, _ = components_at(
            d, targets, locs, log_scales, present, inside, floor, LOGISTIC, SOFTPLUS
        )
        log_density -= tl.log(scale)
        total += tl.sum(tl.where(inside, log_density, 0.0), 1, keep_dims=True)
    return total


@triton.jit
def halved(scale):
    """(n ln 2, 2^n / scale), the latter in (1 / 2, 1]: what a scale does to a density, its power of
    2 as a logarithm.
    """
    bits = scale.to(tl.int32, bitcast=True)
    power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    n = (bits >> 23) - 127
    return 0.6931471805599453 * n.to(tl.float32), power / scale


@triton.jit
def shares(log_weight, factor):
    """(largest, weights over the components before their division, their sum) of [K, ...]; of
    weights exp(log_weight) * factor.
    """
    top = tl.maximum(tl.max(log_weight, 0, keep_dims=True), _LOWEST)
    weight = tl.exp(log_weight - top) * factor
    return top, weight, tl.sum(weight, 0, keep_dims=True)


@triton.jit
def prior_and_joint(prior, log_density, factor):
    """The NLL, and `shares` but for the largest, of weights exp(prior) and of the same times the
    densities exp(log_density) * factor.
    """
    top_prior, prior_weight, prior_sum = shares(prior, 1.0)
    # What all logits have in common would round the densities away.
    top_joint, joint_weight, joint_sum = shares(prior - top_prior + log_density, factor)
    loss = tl.log(prior_sum / joint_sum) - top_joint
    return loss, prior_weight, prior_sum, joint_weight, joint_sum


@triton.jit
def prior_and_whole(prior, log_density, present):
    """`prior_and_joint` for sums over coordinates, which may be millions below zero: what they have
    in common would round logits away.
    """
    top = tl.max(tl.where(present, log_density, float("-inf")), 0, keep_dims=True)
    top = tl.maximum(top, _LOWEST)
    loss, prior_weight, prior_sum, joint_weight, joint_sum = prior_and_joint(
        prior, log_density - top, 1.0
    )
    return loss - top, prior_weight, prior_sum, joint_weight, joint_sum


@triton.jit
def store_nll(place, nll, WIDTH: tl.constexpr, LOGISTIC: tl.constexpr):
    """Stores it with the constant."""
    if not LOGISTIC:
        nll += WIDTH * _HALF_LOG_TWO_PI
    tl.store(place, nll)


@triton.jit
def mixture_nll_kernel(
    target,  # [T, D], D without gaps, as in all that follow
    logits,  # [T, K] (JOINT) or [T, K, D]
    loc,  # [T, K, D]
    log_scale,  # [T, K, D]
    nll,  # [T]
    posterior,  # [T, K] if JOINT
    target_stride,
    logits_stride,
    logits_row,
    loc_stride,
    loc_row,
    scale_stride,
    scale_row,
    floor,
    JOINT: tl.constexpr,
    LOGISTIC: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,  # the power of 2 from COMPONENTS on
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, ROWS)[:, None].to(tl.int64)
    present = k < COMPONENTS
    targets = target + token * target_stride
    locs = loc + token * loc_stride + k * loc_row
    log_scales = log_scale + token * scale_stride + k * scale_row
    if JOINT:
        log_joint = joint_log_density(
            targets, locs, log_scales, present, floor, LOGISTIC, SOFTPLUS, WIDTH, ROWS, BLOCK
        )
        at_logits = logits + token * logits_stride + k
        prior = tl.load(at_logits, mask=present, other=0.0).to(tl.float32)
        prior = tl.where(present, prior, float("-inf"))
        total, _, _, weight, weights = prior_and_whole(prior, log_joint, present)
        tl.store(posterior + token * COMPONENTS + k, weight / weights, mask=present)
    else:
        total = tl.zeros([1, BLOCK], tl.float32)
        for first in range(0, WIDTH, BLOCK):
            d = first + tl.arange(0, BLOCK)[None, :]
            inside = d < WIDTH
            log_density, scale, _, _ = components_at(
                d, targets, locs, log_scales, present, inside, floor, LOGISTIC, SOFTPLUS
            )
            at_logits = logits + token * logits_stride + k * logits_row + d
            prior = tl.load(at_logits, mask=present & inside, other=0.0).to(tl.float32)
            prior = tl.where(present, prior, float("-inf"))
            from_scale, factor = halved(scale)
            loss, _, _, _, _ = prior_and_joint(prior, log_density - from_scale, factor)
            total += tl.where(inside, loss, 0.0)
    store_nll(nll + token, tl.sum(tl.sum(total, 1), 0), WIDTH, LOGISTIC)


@triton.jit
def mixture_nll_backward_kernel(
    grad,  # [T]
    target,  # these as above
    logits,
    loc,
    log_scale,
    posterior,  # [T, K] if JOINT and not FUSED
    nll,  # [T] if FUSED: found on the way
    grad_target,  # [T, D] if TARGET
    grad_logits,  # these of strides of their own, or the parameters themselves, if PARAMETERS
    grad_loc,
    grad_log_scale,
    target_stride,
    logits_stride,
    logits_row,
    loc_stride,
    loc_row,
    scale_stride,
    scale_row,
    grad_logits_stride,
    grad_logits_row,
    grad_loc_stride,
    grad_loc_row,
    grad_scale_stride,
    grad_scale_row,
    floor,
    JOINT: tl.constexpr,
    LOGISTIC: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    FUSED: tl.constexpr,
    TARGET: tl.constexpr,
    PARAMETERS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, ROWS)[:, None].to(tl.int64)
    present = k < COMPONENTS
    targets = target + token * target_stride
    locs = loc + token * loc_stride + k * loc_row
    log_scales = log_scale + token * scale_stride + k * scale_row
    factor = tl.load(grad + token)
    total = tl.zeros([1, BLOCK], tl.float32)
    weight = tl.zeros([ROWS, 1], tl.float32)
    if JOINT:
        at_logits = tl.load(logits + token * logits_stride + k, mask=present, other=0.0)
        prior = tl.where(present, at_logits.to(tl.float32), float("-inf"))
        if FUSED:
            log_joint = joint_log_density(
                targets, locs, log_scales, present, floor, LOGISTIC, SOFTPLUS, WIDTH, ROWS, BLOCK
            )
            loss, prior_weight, prior_sum, joint_weight, joint_sum = prior_and_whole(
                prior, log_joint, present
            )
            share = joint_weight / joint_sum
            store_nll(nll + token, tl.sum(tl.sum(loss, 1), 0), WIDTH, LOGISTIC)
        else:
            _, prior_weight, prior_sum = shares(prior, 1.0)
            share = tl.load(posterior + token * COMPONENTS + k, mask=present, other=0.0)
        weight = factor * share
        if PARAMETERS:
            by_logit = factor * (prior_weight / prior_sum) - weight
            to_logits = grad_logits + token * grad_logits_stride + k
            tl.store(to_logits, by_logit.to(grad_logits.dtype.element_ty), mask=present)
    for first in range(0, WIDTH, BLOCK):
        d = first + tl.arange(0, BLOCK)[None, :]
        inside = d < WIDTH
        there = present & inside
        log_density, scale, by_target, by_scale = components_at(
            d, targets, locs, log_scales, present, inside, floor, LOGISTIC, SOFTPLUS
        )
        if JOINT:
            share_here = weight
        else:
            at_logits = logits + token * logits_stride + k * logits_row + d
            prior_here = tl.load(at_logits, mask=there, other=0.0).to(tl.float32)
            prior_here = tl.where(present, prior_here, float("-inf"))
            from_scale, rest = halved(scale)
            loss, prior_part, prior_sum, joint_part, joint_sum = prior_and_joint(
                prior_here, log_density - from_scale, rest
            )
            share_here = factor * (joint_part / joint_sum)
            if FUSED:
                total += tl.where(inside, loss, 0.0)
            if PARAMETERS:
                slope = factor * (prior_part / prior_sum) - share_here
                place = grad_logits + token * grad_logits_stride + k * grad_logits_row + d
                tl.store(place, slope.to(grad_logits.dtype.element_ty), mask=there)
        # A component without a share has no gradient, however far off it is.
        has_share = there & (share_here != 0.0)
        by_target = tl.where(has_share, share_here * by_target, 0.0)
        by_scale = tl.where(has_share, share_here * by_scale, 0.0)
        if PARAMETERS:
            place = grad_loc + token * grad_loc_stride + k * grad_loc_row + d
            tl.store(place, (-by_target).to(grad_loc.dtype.element_ty), mask=there)
            place = grad_log_scale + token * grad_scale_stride + k * grad_scale_row + d
            tl.store(place, by_scale.to(grad_log_scale.dtype.element_ty), mask=there)
        if TARGET:
            summed = tl.sum(by_target, 0, keep_dims=True)
            place = grad_target + token * WIDTH + d
            tl.store(place, summed.to(grad_target.dtype.element_ty), mask=inside)
    if FUSED and not JOINT:
        store_nll(nll + token, tl.sum(tl.sum(total, 1), 0), WIDTH, LOGISTIC)


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
    inputs = _inputs(target, logits, loc, log_scale)
    constants, num_warps = _constants("forward", loc, family, event, scale_map)
    launch(
        mixture_nll_kernel,
        (len(nll),),
        {
            **inputs,
            "nll": nll,
            "posterior": posterior if event == "joint" else nll,
            **_strides(inputs),
            "floor": max(float(scale_floor), _SMALLEST_FLOOR),
        },
        constants,
        num_warps,
    )
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
    # The kernel writes those of all parameters or of none.
    wanted = (needs[0], *[any(needs[1:])] * 3)
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) if want else None
             for t, want in zip(inputs, wanted, strict=True)]  # fmt: skip
    _backward(grad, inputs, posterior, None, grads, family, event, scale_floor, scale_map)
    return [g for g, need in zip(grads, needs, strict=True) if need and g is not None]


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
    """As `native.mixture_nll_and_gradients_`."""
    nll = target.new_empty(target.shape[0], dtype=torch.float32)
    parameters = [logits, loc, log_scale]
    _backward(
        torch.full_like(nll, factor),
        (target, *parameters),
        None,
        nll,
        [grad_target, *parameters],
        family,
        event,
        scale_floor,
        scale_map,
    )
    return nll


def _backward(
    grad: Tensor,
    tensors: Sequence[Tensor],
    posterior: Tensor | None,
    nll: Tensor | None,
    grads: Sequence[Tensor | None],
    family: str,
    event: str,
    scale_floor: float,
    scale_map: str,
) -> None:
    inputs = _inputs(*tensors)
    loc = tensors[2]
    constants, num_warps = _constants("backward", loc, family, event, scale_map)
    grad = grad.to(torch.float32).contiguous()
    to_target, *to_parameters = grads
    outputs = {
        name: grad if to is None else to
        for name, to in zip(("logits", "loc", "log_scale"), to_parameters, strict=True)
    }
    launch(
        mixture_nll_backward_kernel,
        (len(grad),),
        {
            "grad": grad,
            **inputs,
            "posterior": posterior if posterior is not None and event == "joint" else grad,
            "nll": grad if nll is None else nll,
            "grad_target": grad if to_target is None else to_target,
            **{f"grad_{name}": tensor for name, tensor in outputs.items()},
            **_strides(inputs),
            **{f"grad_{n}": s for n, s in _strides(outputs).items()},
            "floor": max(float(scale_floor), _SMALLEST_FLOOR),
        },
        {
            **constants,
            "FUSED": nll is not None,
            "TARGET": to_target is not None,
            "PARAMETERS": to_parameters[0] is not None,
        },
        num_warps,
    )


def _inputs(target: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> dict[str, Tensor]:
    """By the kernels' names, each without gaps in its last dimension."""
    tensors = {"target": target, "logits": logits, "loc": loc, "log_scale": log_scale}
    return {name: without_gaps(tensor) for name, tensor in tensors.items()}


def _strides(tensors: dict[str, Tensor]) -> dict[str, int]:
    """From a token to the next, and from a component's row to the next."""
    strides = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("log_")
        strides[f"{short}_stride"] = tensor.stride(0)
        if name != "target":
            strides[f"{short}_row"] = tensor.stride(1) if tensor.ndim == 3 else 1
    return strides


def _constants(
    kernel: str, loc: Tensor, family: str, event: str, scale_map: str
) -> tuple[dict[str, object], int]:
    """The kernels' compile-time constants, and the number of warps."""
    config = _configs.lookup(CONFIGS, kernel, loc.device)
    _, components, width = loc.shape
    rows = triton.next_power_of_2(components)
    constants = {
        "JOINT": event == "joint",
        "LOGISTIC": family == "logistic",
        "SOFTPLUS": scale_map == "softplus",
        "COMPONENTS": components,
        "WIDTH": width,
        "ROWS": rows,
        "BLOCK": min(max(16, config["tile"] // rows), max(16, triton.next_power_of_2(width))),
    }
    return constants, config["num_warps"]


def compile_cases() -> list[CompileCase]:
    """The heads' sizes: joint and coordinate, both families, both passes."""

    def call(
        dtype: torch.dtype,
        components: int,
        width: int,
        event: str,
        family: str,
        kernel: str,
        scale_map: str = "exp",
    ) -> object:
        target = torch.ones(64, width)
        loc = torch.empty(64, components, width, dtype=dtype)
        logits = torch.empty(loc.shape[:2] if event == "joint" else loc.shape, dtype=dtype)
        options = (family, event, 1e-3, scale_map)
        if kernel == "forward":
            return mixture_nll(target, logits, loc, torch.empty_like(loc), *options)
        posterior = empty_posterior(target, loc, event, torch.float32)
        needs = (True, True, True, True)
        grad = target.new_empty(64)
        return mixture_nll_backward(
            grad, target, logits, loc, torch.empty_like(loc), posterior, *options, needs
        )

    brain, single = torch.bfloat16, torch.float32
    calls: dict[str, Callable[[], object]] = {
        "mixture_nll-bfloat16-joint": partial(call, brain, 5, 1024, "joint", "gaussian", "forward"),
        "mixture_nll-float32-coordinate-softplus": partial(
            call, single, 5, 384, "coordinate", "logistic", "forward", "softplus"
        ),
        "mixture_nll-bfloat16-coordinate-32": partial(
            call, brain, 32, 1024, "coordinate", "gaussian", "forward"
        ),
        "mixture_nll_backward-bfloat16-joint": partial(
            call, brain, 5, 1024, "joint", "gaussian", "backward"
        ),
        "mixture_nll_backward-float32-coordinate-softplus": partial(
            call, single, 5, 384, "coordinate", "logistic", "backward", "softplus"
        ),
        "mixture_nll_backward-bfloat16-coordinate-32": partial(
            call, brain, 32, 1024, "coordinate", "gaussian", "backward"
        ),
    }
    # Targets, which all components share, and joint logits have fewer numbers than a program has
    # threads for 16 bytes each.
    return recorded_cases(CONFIGS, calls, narrow=frozenset(calls))


def traffic_cases() -> list[TrafficCase]:
    """Several blocks of coordinates, and more components than a power of 2."""
    tokens, components, width = 3, 5, 700
    target, loc = torch.ones(tokens, width), torch.ones(tokens, components, width)
    options = ("gaussian", "coordinate", 1e-3, "exp")
    inputs = (target, loc, loc.clone(), loc.clone())
    read = Cost(read=4 * (target.numel() + 3 * loc.numel()))
    numbers = 4 * tokens
    posterior = target.new_empty(tokens, 0)
    return [
        TrafficCase(
            "mixture_nll",
            partial(mixture_nll, *inputs, *options),
            read + Cost(written=numbers),
        ),
        TrafficCase(
            "mixture_nll_backward",
            partial(
                mixture_nll_backward,
                target.new_ones(tokens),
                *inputs,
                posterior,
                *options,
                (True, True, True, True),
            ),
            read + Cost(read=numbers, written=4 * (target.numel() + 3 * loc.numel())),
        ),
    ]
