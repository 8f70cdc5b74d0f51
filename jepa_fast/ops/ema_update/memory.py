"""Lists of tensors as memory: what may not overlap, and what a kernel can walk as flat arrays."""

from __future__ import annotations

import itertools
import operator
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from jepa_fast.perf.race import Cost

FLOATING = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))

_DTYPE = operator.attrgetter("dtype")
_DEVICE = operator.attrgetter("device")
_BYTES = operator.attrgetter("nbytes")


def unsupported(
    targets: list[Tensor],
    sources: list[Tensor],
    shadows: list[Tensor],
    momentum: Tensor,
    rounding_seed: Tensor | None = None,
) -> list[str]:
    """Why a kernel cannot serve a call, from metadata alone: dtypes and devices."""
    tensors = [*targets, *sources, *shadows]
    reasons = []
    if unknown := set(map(_DTYPE, tensors)) - FLOATING:
        names = ", ".join(sorted(str(dtype) for dtype in unknown))
        reasons.append(f"takes float32, float64, bfloat16 and float16, got {names}")
    if len(set(map(_DEVICE, tensors))) > 1:
        reasons.append("takes tensors of one device, got several")
    return reasons


def check(
    targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor], momentum: Tensor
) -> None:
    """Checks what only real tensors show: the momentum's value, and that nothing overlaps.

    A momentum on a GPU is read with `JEPA_FAST_DEBUG=1` only; otherwise the host would wait for it.

    Raises:
        ValueError: momentum outside [0, 1], or a tensor to be written that overlaps another one
            or itself.
    """
    if momentum.device.type == "cpu" or os.environ.get("JEPA_FAST_DEBUG") == "1":
        value = float(momentum)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"ema_update_: momentum must be in [0, 1], got {value}")
    if not _all_apart([*targets, *sources, *shadows]):
        _check_overlap(targets, sources, shadows)


def _all_apart(tensors: list[Tensor]) -> bool:
    """Whether the tensors are surely disjoint; in a few C loops, as this runs at every call."""
    if not all(map(Tensor.is_contiguous, tensors)):
        return False
    starts = list(map(Tensor.data_ptr, tensors))
    spans = sorted(zip(starts, map(_BYTES, tensors), strict=True))
    return all(start + size <= after for (start, size), (after, _) in itertools.pairwise(spans))


def _check_overlap(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor]) -> None:
    """The same with strides, and with sources that may overlap each other; says what overlaps."""
    spans = []
    for name, tensors in (("targets", targets), ("sources", sources), ("shadows", shadows)):
        written = name != "sources"
        for i, tensor in enumerate(tensors):
            if tensor.numel() == 0:
                continue
            start, size = tensor.data_ptr(), tensor.nbytes
            if not is_dense(tensor):
                if written:
                    _refuse_expanded(f"{name}[{i}]", tensor)
                # What lies between its elements may be another's, so only its start is known.
                size = tensor.element_size()
            spans.append((start, start + size, written, f"{name}[{i}]"))
    end_of_all, last = 0, ""
    end_of_written, last_written = 0, ""
    for start, end, written, name in sorted(spans):
        if start < (end_of_all if written else end_of_written):
            raise ValueError(
                f"ema_update_: {name} and {last if written else last_written} share memory; what "
                f"is written needs memory of its own: list a tied tensor once, or clone() one"
            )
        if end > end_of_all:
            end_of_all, last = end, name
        if written and end > end_of_written:
            end_of_written, last_written = end, name


def _refuse_expanded(name: str, tensor: Tensor) -> None:
    sizes = zip(tensor.stride(), tensor.shape, strict=True)
    if any(stride == 0 and size > 1 for stride, size in sizes):
        raise ValueError(
            f"ema_update_: {name} is written and must have memory for each of its elements, got "
            f"shape {list(tensor.shape)} with strides {list(tensor.stride())}: clone() it"
        )


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def share_order(group: tuple[Tensor, ...]) -> bool:
    """Whether tensors of one shape are dense, and all have their elements in the same order."""
    strides = group[0].stride()
    return is_dense(group[0]) and all(tensor.stride() == strides for tensor in group)


def cost(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor]) -> Cost:
    """The byte model: targets and sources are read once, targets and shadows written once."""
    to, by, copies = (sum(map(_BYTES, tensors)) for tensors in (targets, sources, shadows))
    return Cost(read=to + by, written=to + copies)


@dataclass
class Flat:
    """Lists in which the i-th tensors have the same elements in the same order, without gaps.

    Tensors that were not so are contiguous copies here; `write_back` returns what was written.
    """

    targets: list[Tensor]
    sources: list[Tensor]
    shadows: list[Tensor]
    copies: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor]) -> Flat:
        if all(map(Tensor.is_contiguous, [*targets, *sources, *shadows])):
            return cls(targets, sources, shadows, [])
        flat = cls([], [], [], [])
        for target, source, shadow in itertools.zip_longest(targets, sources, shadows):
            group: tuple[Tensor, ...] = (target, source)
            if shadow is not None:
                group += (shadow,)
            if not all(tensor.is_contiguous() for tensor in group):
                group = flat._densify(group)
            flat.targets.append(group[0])
            flat.sources.append(group[1])
            flat.shadows.extend(group[2:])
        return flat

    def _densify(self, group: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if share_order(group):
            return group
        dense = tuple(tensor.contiguous() for tensor in group)
        self.copies += [
            (tensor, copy)
            for tensor, copy in zip((group[0], *group[2:]), (dense[0], *dense[2:]), strict=True)
            if copy is not tensor
        ]
        return dense

    def write_back(self) -> None:
        for tensor, copy in self.copies:
            tensor.copy_(copy)
