"""The public function `ema_update_`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa_fast.ops import _memory, _rounding, _shards
from jepa_fast.ops._checks import number_tensor
from jepa_fast.ops.ema_update import contract


@torch.no_grad()
def ema_update_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float | Tensor,
    shadows: Sequence[Tensor] | None = None,
    *,
    rounding_seed: int | Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Moves every target towards its source, in place: `t = momentum * t + (1 - momentum) * s`.

    Args:
        targets: the teacher's tensors, of any shapes and floating dtypes, on one device.
        sources: the student's, in the same order and of the same shapes; dtypes may differ.
        momentum: in [0, 1]; a real number, or a 0-dim floating tensor. One on the targets' GPU is
            read there: the host does not wait for it, and a CUDA graph follows its value.
        shadows: optional copies of the targets in other dtypes, written in the same pass.
        rounding_seed: None rounds to the nearest. An integer, another one at every step, has
            bfloat16 and float16 targets and shadows rounded up with a probability equal to the
            fraction that is lost. At momentum 0.9999 the nearest bfloat16 is always the old one;
            rounded stochastically, the average follows its source, in expectation exactly. A 0-dim
            int64 tensor on the targets' GPU is read there, so that a CUDA graph can advance it. All
            backends draw the same bits. Other dtypes are rounded to the nearest.
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`.

    Computes in float32 (float64 for float64 targets) whatever the dtypes, and rounds once. Empty
    lists are fine: nothing happens. Any strides will do; contiguous tensors, or pairs of the same
    dense strides, are the fast ones.

    DTensors (FSDP2's parameters) are updated shard by shard, without communication, where those
    that belong together are placed alike. Shards of several ranks draw the same bits from the same
    `rounding_seed`; a seed that adds the rank has them differ.

    Raises:
        TypeError: a list holds what is not a tensor, or not of a floating dtype; `momentum` is
            neither a real number nor a tensor, `rounding_seed` neither None, an int nor a tensor.
        ValueError: lists of different lengths, a shape that differs, a momentum outside [0, 1] (on
            a GPU checked with `JEPA_FAST_DEBUG=1` only), a tensor of it that is not floating and
            0-dim, a target or shadow that shares memory with any other tensor here, DTensors that
            are placed otherwise than their targets, a `rounding_seed` of more than 64 bits, or one
            with targets or shadows of less than 16 bits.
        BackendError: the requested backend cannot serve the call.

    Source: the teacher update of I-JEPA, arXiv 2301.08243, section 3.
    """
    targets = _memory.as_list("ema_update_", "targets", targets)
    sources = _memory.as_list("ema_update_", "sources", sources)
    shadows = [] if shadows is None else _memory.as_list("ema_update_", "shadows", shadows)
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
    hint = "; copy integer buffers with copy_"
    for name, tensors in (("targets", targets), ("sources", sources), ("shadows", shadows)):
        _memory.check_fit("ema_update_", name, tensors, targets, "target", hint)
    (targets, sources, shadows), shards = _shards.to_local(
        "ema_update_", {"targets": targets, "sources": sources, "shadows": shadows}
    )
    scalar = _as_tensor(momentum, targets)
    seed = _rounding.seed_tensor("ema_update_", rounding_seed, [*targets, *shadows])
    contract.UPDATE.call(targets, sources, shadows, scalar, seed, backend)
    if shards:  # autograd looks at the DTensors' own versions
        torch.autograd.graph.increment_version(shards)


def _as_tensor(momentum: float | Tensor, targets: list[Tensor]) -> Tensor:
    if not isinstance(momentum, Tensor):
        return number_tensor("ema_update_", "momentum", momentum, 1.0)
    if momentum.ndim != 0 or not momentum.is_floating_point():
        raise ValueError(
            f"ema_update_: a momentum tensor must be floating and 0-dim, "
            f"got {momentum.dtype} of shape {list(momentum.shape)}"
        )
    if targets and momentum.device.type != "cpu" and momentum.device != targets[0].device:
        raise ValueError(
            f"ema_update_: momentum must be a float or a tensor on the CPU or the targets' device "
            f"{targets[0].device}, got one on {momentum.device}"
        )
    return momentum
