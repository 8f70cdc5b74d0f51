"""The public function `mixture_nll`, and what else one asks of a mixture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops._autograd import OperatorFunction, applied, differentiable_once, spread
from jepa_fast.ops._checks import (
    check_choice,
    check_dim,
    check_integer,
    check_number,
    check_same_size,
    check_tensor,
    check_vectors,
    may_be_checked,
)
from jepa_fast.ops.mixture_nll import contract, reference

_SMALLEST, _LARGEST = 1.2e-38, 1e38  # of a float32, and not subnormal


class _MixtureNll(OperatorFunction):
    @staticmethod
    def forward(
        target: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        return contract.FORWARD.call(target, logits, loc, log_scale, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.family, ctx.event, ctx.scale_floor, ctx.scale_map, ctx.backend = inputs
        _, posterior = output
        ctx.mark_non_differentiable(posterior)
        ctx.save_for_backward(*tensors, posterior)

    @staticmethod
    @differentiable_once("mixture_nll")
    def backward(ctx: Any, saved: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        options = (ctx.family, ctx.event, ctx.scale_floor, ctx.scale_map)
        grads = contract.BACKWARD.call(grad, *saved, *options, needs, ctx.backend)
        return *spread(grads, needs), None, None, None, None, None


def mixture_nll(
    target: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str = "gaussian",
    event: str = "joint",
    scale_floor: float = 1e-3,
    scale_map: str = "exp",
    *,
    backend: str = "auto",
) -> Tensor:
    """Negative log-likelihood of each token under its own mixture of K components, in nats.

    With `event="joint"` a token draws one component for all its coordinates,
    `-log sum_k pi_k prod_j p(z_j; loc_kj, scale_kj)`; with `"coordinate"` every coordinate draws
    its own, `-sum_j log sum_k pi_kj p(z_j; loc_kj, scale_kj)`. `pi` is the softmax of `logits`
    over K.

    Args:
        target: [T, D].
        logits: [T, K] for `event="joint"`, [T, K, D] for `"coordinate"`.
        loc: [T, K, D].
        log_scale: [T, K, D]; `scale = scale_floor + exp(log_scale)`.
        family: `"gaussian"` or `"logistic"` components.
        event: `"joint"` or `"coordinate"`.
        scale_floor: positive, 1.2e-38 to 1e38; what a component's scale cannot fall to.
        scale_map: `"exp"`, or `"softplus"` for `scale = scale_floor + softplus(log_scale)`.
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`.

    Returns:
        [T] float32; float64 if any input is. The inputs may mix floating dtypes, as they do under
        autocast: everything is computed in float32 or wider.

    Raises:
        TypeError: an argument is not a dense floating tensor, or `scale_floor` is not a number.
        ValueError: a shape does not fit, an unknown name, a floor that is not positive; on a CPU, a
            target that is NaN or infinite (a GPU gives NaN or infinity).
        BackendError: the requested backend cannot serve the call.

    Source: mixture density networks, Bishop 1994; logistic components, Salimans et al. 2017
    (arXiv 1701.05517, without its discretisation).
    """
    _check_parameters("mixture_nll", logits, loc, log_scale, family, event, scale_floor, scale_map)
    check_dim("mixture_nll", "target", target, 2, "[T, D]")
    check_vectors("mixture_nll", "target", target)
    check_same_size("mixture_nll", "target", target, 0, "loc", loc, 0)
    check_same_size("mixture_nll", "target", target, 1, "loc", loc, 2)
    nll, _ = applied(
        _MixtureNll, target, logits, loc, log_scale, family, event, scale_floor, scale_map, backend
    )
    return nll


def mixture_sample(
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str = "gaussian",
    event: str = "joint",
    scale_floor: float = 1e-3,
    scale_map: str = "exp",
    *,
    n: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws from the mixtures of `mixture_nll`.

    Args:
        logits, loc, log_scale, family, event, scale_floor, scale_map: as in `mixture_nll`.
        n: draws a token.
        generator: on the device of `loc`; the global one if None.

    Returns:
        [n, T, D] float32 (float64 if any input is), without gradients.

    Raises:
        TypeError: as `mixture_nll`; `n` is no integer.
        ValueError: as `mixture_nll`; `n` below 1; logits that are NaN or +inf, or -inf for all
            components, which only a CPU tells (on a GPU with JEPA_FAST_DEBUG=1).
    """
    _check_parameters(
        "mixture_sample", logits, loc, log_scale, family, event, scale_floor, scale_map
    )
    check_integer("mixture_sample", "n", n)
    if n < 1:
        raise ValueError(f"mixture_sample: n must be at least 1, got {n}")
    # -inf is a weight of 0. NaN among a mixture's logits is their largest.
    if may_be_checked(logits) and not bool(logits.amax(1).isfinite().all()):
        raise ValueError(
            "mixture_sample: logits must not be NaN or +inf, nor all of a mixture -inf, got some "
            "that are: has training diverged?"
        )
    dtype = reference.compute_dtype(logits, loc, log_scale)
    with torch.no_grad():
        scale = reference.component_scale(log_scale.to(dtype), scale_floor, scale_map)
        return reference.mixture_sample(
            logits.to(dtype), loc.to(dtype), scale, int(n), family, event, generator
        )


def mixture_mean(logits: Tensor, loc: Tensor) -> Tensor:
    """Mean of the mixtures of `mixture_nll`.

    Args:
        logits: [T, K] or [T, K, D].
        loc: [T, K, D].

    Returns:
        [T, D] float32 (float64 if any input is), differentiable.

    Raises:
        TypeError: an argument is not a dense floating tensor.
        ValueError: a shape does not fit.
    """
    _check_shapes("mixture_mean", logits, loc)
    dtype = reference.compute_dtype(logits, loc)
    return reference.mixture_mean(logits.to(dtype), loc.to(dtype))


def mixture_variance(
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str = "gaussian",
    scale_floor: float = 1e-3,
    scale_map: str = "exp",
) -> Tensor:
    """Variance of every coordinate under the mixtures of `mixture_nll`: within plus between.

    Args:
        logits: [T, K] or [T, K, D].
        loc, log_scale, family, scale_floor, scale_map: as in `mixture_nll`.

    Returns:
        [T, D] float32 (float64 if any input is), differentiable.

    Raises:
        TypeError, ValueError: as `mixture_nll`.
    """
    check_tensor("mixture_variance", "logits", logits)
    event = "coordinate" if logits.ndim == 3 else "joint"
    _check_parameters(
        "mixture_variance", logits, loc, log_scale, family, event, scale_floor, scale_map
    )
    dtype = reference.compute_dtype(logits, loc, log_scale)
    scale = reference.component_scale(log_scale.to(dtype), scale_floor, scale_map)
    return reference.mixture_variance(logits.to(dtype), loc.to(dtype), scale, family)


def check_mixture_options(
    op: str,
    family: str,
    event: str,
    scale_floor: float,
    scale_map: str,
    num_components: int = 1,
) -> None:
    """Refuse an unknown name, no number of components, or a floor that no scale can have.

    A floor that is a tensor, too: kernels take it as a number, and so it has no gradient.
    """
    check_integer(op, "num_components", num_components)
    if num_components < 1:
        raise ValueError(f"{op}: num_components must be at least 1, got {num_components}")
    check_choice(op, "family", family, reference.FAMILIES)
    check_choice(op, "event", event, reference.EVENTS)
    check_choice(op, "scale_map", scale_map, reference.SCALE_MAPS)
    check_number(op, "scale_floor", scale_floor)
    if not _SMALLEST <= scale_floor <= _LARGEST:
        too_small = f", less than float32's {_SMALLEST:g}" if 0 < scale_floor < 1 else ""
        raise ValueError(
            f"{op}: scale_floor must be positive and at most {_LARGEST:g}, got {scale_floor}"
            f"{too_small}; without a floor the likelihood of a component that sits on a target has "
            f"no bound"
        )


def _check_parameters(
    op: str,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
    family: str,
    event: str,
    scale_floor: float,
    scale_map: str,
) -> None:
    check_mixture_options(op, family, event, scale_floor, scale_map)
    dims, shape = (2, "[T, K]") if event == "joint" else (3, "[T, K, D]")
    check_dim(op, "logits", logits, dims, f"{shape} for event={event!r}")
    _check_shapes(op, logits, loc)
    check_vectors(op, "log_scale", log_scale)
    if log_scale.shape != loc.shape:
        raise ValueError(
            f"{op}: log_scale must have the shape of loc, {list(loc.shape)}, "
            f"got {list(log_scale.shape)}"
        )


def _check_shapes(op: str, logits: Tensor, loc: Tensor) -> None:
    check_dim(op, "logits", logits, (2, 3), "[T, K] or [T, K, D]")
    check_dim(op, "loc", loc, 3, "[T, K, D]")
    check_vectors(op, "logits", logits)
    check_vectors(op, "loc", loc)
    if loc.shape[1] == 0:
        raise ValueError(f"{op}: a mixture needs at least one component, got loc {list(loc.shape)}")
    if logits.shape != loc.shape[: logits.ndim]:
        raise ValueError(
            f"{op}: logits must be [T, K] or [T, K, D] with the T, K, D of loc {list(loc.shape)}, "
            f"got {list(logits.shape)}"
        )
