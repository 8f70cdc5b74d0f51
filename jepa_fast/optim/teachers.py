"""Which tensors of a model follow which, as its moving average."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class HasTeachers(Protocol):
    """A model with teachers; all of `jepa_fast` are."""

    def teachers(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Pairs of a teacher and the network whose moving average it is."""


def teacher_parameters(model: HasTeachers | nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a parameter and the teacher's, which follows it: `targets` of `AdamWEma`.

    Buffers are none of them: `copy_teacher_buffers` copies those that change, as BatchNorm's.

    Args:
        model: with teachers, also as torch.compile or DistributedDataParallel wraps it.

    Raises:
        TypeError: it has no teachers.
        ValueError: a teacher has another number of parameters than the network that it follows.
    """
    return [
        pair
        for teacher, network in _unwrapped(model).teachers()
        for pair in _paired("parameters", list(network.parameters()), list(teacher.parameters()))
    ]


@torch.no_grad()
def copy_teacher_buffers(model: HasTeachers | nn.Module) -> None:
    """Buffers (of normalisation, say) are copied from the networks to their teachers.

    Args, Raises: as `teacher_parameters`.
    """
    for teacher, network in _unwrapped(model).teachers():
        copy_buffers(teacher, network)


def _unwrapped(model: Any) -> HasTeachers:
    """The model itself: DistributedDataParallel passes none of its methods on."""
    inner = model
    while not hasattr(inner, "teachers"):
        inner = getattr(inner, "module", None)
        if not isinstance(inner, nn.Module):
            raise TypeError(
                "model: expected one of jepa_fast, or another with teachers(), got "
                f"{type(model).__name__}"
            )
    return inner


def copy_buffers(teacher: nn.Module, network: nn.Module) -> None:
    """The same for one pair."""
    for theirs, mine in _paired("buffers", list(network.buffers()), list(teacher.buffers())):
        mine.copy_(theirs)


def _paired(what: str, theirs: list[Tensor], mine: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    if len(theirs) != len(mine):
        raise ValueError(
            f"teachers: expected {len(theirs)} {what}, as the network has that a teacher follows, "
            f"got {len(mine)}; change encoders, by adapters, say, before a model is made of them"
        )
    return zip(theirs, mine, strict=True)
