"""The public function `ema_update_`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa_fast.ops.ema_update import contract


@torch.no_grad()
def ema_update_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float | Tensor,
    shadows: Sequence[Tensor] | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Moves every target towards its source, in place: `t = momentum * t + (1 - momentum) * s`.

    Args:
        targets: the teacher's tensors, any floating dtypes, devices all the same.
        sources: the student's, in the same order and of the same shapes; dtypes may differ.
        momentum: in [0, 1]; a float, or a 0-dim tensor on the targets' device, which is never
            read by the host (then its range is not checked).
        shadows: optional copies of the teacher in lower precision, written in the same pass.
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`.

    Computes in float32 (float64 for float64 targets) whatever the dtypes, and rounds once. Empty
    lists are fine: nothing happens.

    Raises:
        TypeError: not tensors, or not of a floating dtype.
        ValueError: lists of different lengths, a shape that differs, a momentum outside [0, 1], or
            a target that shares memory with its source or its shadow.
        BackendError: the requested backend cannot serve the call.

    Source: the teacher update of I-JEPA, arXiv 2301.08243, section 3.
    """
    shadows = [] if shadows is None else list(shadows)
    targets, sources = list(targets), list(sources)
    _check_lists(targets, sources, shadows)
    contract.UPDATE.call(targets, sources, shadows, _as_tensor(momentum), backend)


def _check_lists(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor]) -> None:
    if len(sources) != len(targets):
        raise ValueError(
            f"ema_update_: targets and sources must be as long as each other, "
            f"got {len(targets)} and {len(sources)}"
        )
    if shadows and len(shadows) != len(targets):
        raise ValueError(
            f"ema_update_: shadows must be as long as targets, got {len(shadows)} "
            f"and {len(targets)}; leave shadows out where there are none"
        )
    for name, tensors in (("targets", targets), ("sources", sources), ("shadows", shadows)):
        for i, (tensor, target) in enumerate(zip(tensors, targets, strict=False)):
            _check_tensor(f"{name}[{i}]", tensor, target)


def _check_tensor(name: str, tensor: Tensor, target: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"ema_update_: {name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(
            f"ema_update_: {name} must be of a floating dtype, got {tensor.dtype}; "
            f"copy integer buffers with copy_"
        )
    if tensor.shape != target.shape:
        raise ValueError(
            f"ema_update_: {name} must have the shape of its target, {list(target.shape)}, "
            f"got {list(tensor.shape)}"
        )


def _as_tensor(momentum: float | Tensor) -> Tensor:
    if isinstance(momentum, Tensor):
        if momentum.ndim != 0 or not momentum.is_floating_point():
            raise ValueError(
                f"ema_update_: a momentum tensor must be floating and 0-dim, "
                f"got {momentum.dtype} of shape {list(momentum.shape)}"
            )
        return momentum
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"ema_update_: momentum must be in [0, 1], got {momentum}")
    return torch.tensor(momentum, dtype=torch.float64)
