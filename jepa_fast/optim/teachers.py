"""Which tensors of a model follow which, as its moving average."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn


class HasTeachers(Protocol):
    """A model with teachers; all of `jepa_fast` are."""

    def teachers(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Pairs of a teacher and the network whose moving average it is."""


def teacher_parameters(model: HasTeachers) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a parameter and the teacher's, which follows it: `targets` of `AdamWEma`."""
    return [
        pair
        for teacher, network in model.teachers()
        for pair in zip(network.parameters(), teacher.parameters(), strict=True)
    ]


@torch.no_grad()
def copy_teacher_buffers(model: HasTeachers) -> None:
    """Buffers (of normalisation, say) are copied from the networks to their teachers."""
    for teacher, network in model.teachers():
        copy_buffers(teacher, network)


def copy_buffers(teacher: nn.Module, network: nn.Module) -> None:
    """The same for one pair."""
    for mine, theirs in zip(teacher.buffers(), network.buffers(), strict=True):
        mine.copy_(theirs)
