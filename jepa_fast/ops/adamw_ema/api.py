"""The public function `adamw_ema_`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa_fast.ops import _memory, _rounding, _shards
from jepa_fast.ops._checks import check_flag, check_number, number_tensor
from jepa_fast.ops.adamw_ema import contract

_OP = "adamw_ema_"


@torch.no_grad()
def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    targets: Sequence[Tensor] = (),
    shadows: Sequence[Tensor] = (),
    *,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Tensor = 1e-2,
    momentum: float | Tensor = 1.0,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding_seed: int | Tensor | None = None,
    backend: str = "auto",
) -> None:
    """A step of AdamW and of the EMA of the updated parameters, in one pass, in place.

    As `torch.optim.AdamW` and then `ema_update_(targets, params, momentum, shadows)`, to rounding.
    `jepa_fast.optim.AdamWEma` is the optimizer that calls this.

    Args:
        params: of any shapes and floating dtypes, on one device.
        grads: their gradients, of the same shapes and, for kernels, dtypes.
        exp_avgs, exp_avg_sqs: first and second moments, as the gradients.
        steps: 0-dim float32 tensors that count the updates of each parameter; 1 is added first.
        targets: the teacher's tensors, of any floating dtypes. The first follows the first
            parameter and so on; parameters beyond them have no teacher.
        shadows: copies of the targets in other dtypes; none, or as many as targets.
        lr, weight_decay: numbers or 0-dim floating tensors. (These, and `momentum`, are read on the
            parameters' GPU where they lie there: a CUDA graph follows their values.)
        betas, eps: of AdamW.
        momentum: of the EMA, in [0, 1]; a number or a 0-dim floating tensor.
        maximize: go along the gradients instead of against them.
        grad_scale: gradients are divided by it, in place, as a `GradScaler` asks for.
        found_inf: where it is not zero, AdamW is skipped, and only the EMA taken.
        rounding_seed: as in `ema_update_`; also of parameters.
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`.

    Computes in float32 (float64 for float64 parameters) and rounds once. DTensors are updated shard
    by shard, without communication, where those that belong together are placed alike.

    Raises:
        TypeError: an argument is not a tensor, or not of a floating dtype; `betas` or `eps` are no
            numbers, `maximize` no bool.
        ValueError: lists of lengths or tensors of shapes that do not fit, numbers out of range, or
            a tensor to be written that shares memory with any other one here.
        BackendError: the requested backend cannot serve the call.

    Source: AdamW, arXiv 1711.05101; the teacher update of I-JEPA, arXiv 2301.08243, section 3.
    """
    given = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "targets": targets,
        "shadows": shadows,
    }
    lists = {name: _memory.as_list(_OP, name, tensors) for name, tensors in given.items()}
    steps = _memory.as_list(_OP, "steps", steps)
    _check_lists(lists, steps)
    (p, g, m, v, t, s), shards = _shards.to_local(_OP, lists)
    device = p[0].device if p else torch.device("cpu")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{_OP}: betas must be a pair of numbers, got {betas!r}")
    beta1, beta2 = betas
    for name, number in (("betas[0]", beta1), ("betas[1]", beta2)):
        check_number(_OP, name, number)
        if not 0.0 <= number < 1.0:
            raise ValueError(f"{_OP}: {name} must be in [0, 1), got {number}")
    check_number(_OP, "eps", eps)
    check_flag(_OP, "maximize", maximize)
    if not eps >= 0.0:
        raise ValueError(f"{_OP}: eps must be 0 or more, got {eps}")
    scalars = (
        _as_tensor("lr", lr, device, float("inf")),
        _as_tensor("weight_decay", weight_decay, device, float("inf")),
        _as_tensor("momentum", momentum, device, 1.0),
    )
    for name, scale in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if scale is not None and (not isinstance(scale, Tensor) or scale.numel() != 1):
            raise ValueError(f"{_OP}: {name} must be None or a tensor of one number, got {scale!r}")
    seed = _rounding.seed_tensor(_OP, rounding_seed, [*p, *t, *s])
    contract.STEP.call(
        p, g, m, v, steps, t, s, *scalars, grad_scale, found_inf, seed, beta1, beta2, eps, maximize,
        backend,
    )  # fmt: skip
    if shards:  # autograd looks at the DTensors' own versions
        torch.autograd.graph.increment_version(shards)


def _check_lists(lists: dict[str, list[Tensor]], steps: list[Tensor]) -> None:
    params, targets = lists["params"], lists["targets"]
    for name, tensors in {**lists, "steps": steps}.items():
        if name not in ("targets", "shadows") and len(tensors) != len(params):
            raise ValueError(
                f"{_OP}: {name} must be as long as params, got {len(tensors)} and {len(params)}"
            )
    if len(targets) > len(params):
        raise ValueError(
            f"{_OP}: targets must not be more than params, got {len(targets)} and {len(params)}; "
            f"ema_update_ takes those that follow other tensors"
        )
    if lists["shadows"] and len(lists["shadows"]) != len(targets):
        raise ValueError(
            f"{_OP}: shadows must be as long as targets, got {len(lists['shadows'])} and "
            f"{len(targets)}; leave shadows out where there are none"
        )
    for name, tensors in lists.items():
        _memory.check_fit(_OP, name, tensors, params, "parameter")
    for i, step in enumerate(steps):
        if not isinstance(step, Tensor) or step.ndim != 0 or not step.is_floating_point():
            raise ValueError(f"{_OP}: steps[{i}] must be a 0-dim floating tensor, got {step!r}")


def _as_tensor(name: str, number: float | Tensor, device: torch.device, most: float) -> Tensor:
    if not isinstance(number, Tensor):
        return number_tensor(_OP, name, number, most)
    if number.numel() != 1 or not number.is_floating_point():
        raise ValueError(
            f"{_OP}: a {name} tensor must be one floating number, "
            f"got {number.dtype} of shape {list(number.shape)}"
        )
    if number.device.type != "cpu" and number.device != device:
        raise ValueError(
            f"{_OP}: {name} must be a float or a tensor on the CPU or the parameters' device "
            f"{device}, got one on {number.device}"
        )
    return number.reshape(())
