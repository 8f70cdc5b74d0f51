"""The public functions `q_sample` and `denoising_loss`, and `noise_seed` for both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops._autograd import (
    OperatorFunction,
    applied,
    differentiable_once,
    is_the_gradient,
    keep_slopes,
)
from jepa_fast.ops._checks import (
    check_dim,
    check_integer,
    check_same_size,
    check_tensor,
    check_vectors,
)
from jepa_fast.ops.q_sample import contract


# Every argument by its name: where none takes a gradient, torch.compile counts them.
class _QSample(OperatorFunction):
    @staticmethod
    def forward(
        target: Tensor, signal: Tensor, noise: Tensor, seed: Tensor, first_row: int, backend: str
    ) -> Tensor:
        return contract.Q_SAMPLE.call(target, signal, noise, seed, first_row, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @differentiable_once("q_sample")
    def backward(ctx: Any, saved: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (signal,) = saved
        # Plain PyTorch on every device: a teacher's tokens, which targets mostly are, take none.
        return contract.Q_SAMPLE_BACKWARD.call(grad, signal, ctx.dtype, "reference"), *[None] * 5


class _DenoisingLoss(OperatorFunction):
    @staticmethod
    def forward(
        prediction: Tensor,
        target: Tensor | None,
        seed: Tensor,
        first_row: int,
        with_slope: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return contract.DENOISING_LOSS.call(
            prediction, target, seed, first_row, with_slope, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        prediction, target = inputs[:2]
        ctx.dtype = prediction.dtype
        ctx.target_dtype = None if target is None else target.dtype
        keep_slopes(ctx, output[1])

    @staticmethod
    @differentiable_once(
        "denoising_loss", "use the plain PyTorch of jepa_fast/ops/q_sample/reference.py"
    )
    def backward(ctx: Any, saved: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        slope = saved[0].detach()
        to_target = None
        if ctx.needs_input_grad[1]:
            wide = slope.to(grad.dtype)
            to_target = (_over_draws(wide) * -grad).to(ctx.target_dtype)
        if not is_the_gradient(slope, grad, ctx.dtype):
            slope = contract.DENOISING_LOSS_BACKWARD.call(grad, slope, ctx.dtype, "reference")
        return slope, to_target, *[None] * 4


def _over_draws(slope: Tensor) -> Tensor:
    """[T, D] from [T, D] or [n, T, D]."""
    return slope.sum(0) if slope.ndim == 3 else slope


def noise_seed(device: torch.device | str) -> Tensor:
    """A seed for `q_sample` and `denoising_loss`, int64 [1], from torch's generator of the device.

    So `torch.manual_seed` and a resumed checkpoint give the same noise. On a GPU it is drawn there,
    without waiting: a CUDA graph draws another at every replay.
    """
    return torch.randint(2**63 - 1, (1,), device=device)


def q_sample(
    target: Tensor,
    signal: Tensor,
    noise: Tensor,
    seed: Tensor,
    first_row: int = 0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Noised targets: `x = signal * target + noise * e`, with e standard normal.

    What e is of a token's coordinate is a function of the seed, the token's number and that of the
    coordinate alone, so that `denoising_loss` finds it again and nobody keeps it. It is equal on
    every device but for rounding, independent under different seeds, and within +-6.7.

    Args:
        target: [T, D], any floating dtype.
        signal: [T], or [n, T] for n draws of noise for every target; any floating dtype.
        noise: as `signal`. Neither takes a gradient.
        seed: int64 [1], on the device of `target`; `noise_seed` draws one.
        first_row: the number of the first token. Tokens count through all draws, so a part of a
            batch that starts at token k gets the noise of the whole with `first_row=k` (one draw).
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`.

    Returns:
        x, [T, D] or [n, T, D], in the dtype of `target`; computed in float32 at least.

    Raises:
        TypeError: a floating argument is no dense floating tensor, `seed` no int64 one, `first_row`
            no integer.
        ValueError: a shape does not fit, a level requires a gradient, `seed` is on another device,
            `first_row` is negative.
        BackendError: the requested backend cannot serve the call.

    Source: DDPM, arXiv 2006.11239, equation 4; with signal t and noise 1 - t the path of flow
        matching, arXiv 2210.02747. Philox: Salmon et al., SC 2011.
    """
    op = "q_sample"
    check_dim(op, "target", target, 2, "[T, D]")
    check_vectors(op, "target", target)
    for name, level in (("signal", signal), ("noise", noise)):
        check_dim(op, name, level, (1, 2), "[T] or [n, T]")
        check_vectors(op, name, level)
        check_same_size(op, name, level, level.ndim - 1, "target", target, 0)
        if level.requires_grad:
            raise ValueError(
                f"{op}: {name} takes no gradient, got a tensor that requires one; detach() it, or "
                f"learn the schedule with the plain PyTorch of jepa_fast/ops/q_sample/reference.py"
            )
    if signal.shape != noise.shape:
        raise ValueError(
            f"{op}: noise must have the shape of signal, {list(signal.shape)}, "
            f"got {list(noise.shape)}"
        )
    _check_seed(op, seed, "target", target, first_row)
    return applied(_QSample, target, signal, noise, seed, first_row, backend)


def denoising_loss(
    prediction: Tensor,
    seed: Tensor,
    target: Tensor | None = None,
    first_row: int = 0,
    *,
    backend: str = "auto",
) -> Tensor:
    """How far a prediction is from the noise of `q_sample`, or from flow matching's velocity.

    Without `target` the mean of `(prediction - e)^2`, with it that of `(prediction - (target -
    e))^2`: e is drawn once more, in the dtype that is computed in.

    Args:
        prediction: [T, D] or [n, T, D], any floating dtype: of what `q_sample` gave.
        seed: the one that `q_sample` had.
        target: [T, D], any floating dtype: that of `q_sample`. Takes a gradient.
        first_row: as in `q_sample`.
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`.

    Returns:
        0-dim float32 (float64 if `prediction` is). 0 where there is nothing.

    Raises:
        TypeError: `prediction` or `target` is no dense floating tensor, `seed` no int64 one,
            `first_row` no integer.
        ValueError: a shape does not fit, `seed` is on another device, `first_row` is negative.
        BackendError: the requested backend cannot serve the call.

    Source: DDPM, arXiv 2006.11239, equation 14; flow matching, arXiv 2210.02747, equation 23 with
        sigma_min = 0.
    """
    op = "denoising_loss"
    check_dim(op, "prediction", prediction, (2, 3), "[T, D] or [n, T, D]")
    check_vectors(op, "prediction", prediction)
    if target is not None:
        check_dim(op, "target", target, 2, "[T, D]")
        check_vectors(op, "target", target)
        if target.shape != prediction.shape[-2:]:
            raise ValueError(
                f"{op}: target must be [T, D] = {list(prediction.shape[-2:])} for this prediction, "
                f"got {list(target.shape)}"
            )
    _check_seed(op, seed, "prediction", prediction, first_row)
    takes_gradient = prediction.requires_grad or (target is not None and target.requires_grad)
    with_slope = takes_gradient and torch.is_grad_enabled()
    loss, _ = applied(_DenoisingLoss, prediction, target, seed, first_row, with_slope, backend)
    return loss


def _check_seed(op: str, seed: Tensor, name: str, of: Tensor, first_row: int) -> None:
    check_tensor(op, "seed", seed)
    if seed.dtype != torch.int64:
        raise TypeError(f"{op}: seed must be int64, got {seed.dtype}; use noise_seed(device)")
    if seed.shape != (1,):
        raise ValueError(
            f"{op}: seed must be of shape [1], got {list(seed.shape)}; use noise_seed(device)"
        )
    if seed.device != of.device:
        raise ValueError(
            f"{op}: seed must be on the device of {name}, {of.device}, got {seed.device}; "
            f"use noise_seed({name}.device)"
        )
    check_integer(op, "first_row", first_row)
    if first_row < 0:
        raise ValueError(f"{op}: first_row must be at least 0, got {first_row}")
