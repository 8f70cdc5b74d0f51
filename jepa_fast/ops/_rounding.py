"""Stochastic rounding in plain PyTorch, bit for bit as csrc/common/rounding.h.

A number between two neighbours of a narrow dtype becomes the upper one with a probability equal to
the fraction that would be lost, so that what is rounded is right on average: a sum of many terms,
each too small to move it, still grows. What is drawn for an element is a function of the seed, of
the number of its tensor, and of the element's place in it, and of nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops import _random
from jepa_fast.ops._checks import KERNEL_DTYPES
from jepa_fast.ops._memory import share_order

NARROW = frozenset((torch.bfloat16, torch.float16))
"""The dtypes that are rounded stochastically; wider ones are rounded to the nearest."""


def seed_tensor(op: str, seed: Any, written: Sequence[Tensor]) -> Tensor | None:
    """`seed` as a 0-dim int64 tensor, on the CPU or where `written` is; None stays None.

    Raises:
        TypeError: it is neither an integer nor a tensor.
        ValueError: it has more than 64 bits, is a tensor of another form or elsewhere, or some of
            what is `written` is of a dtype narrower than 16 bits.
    """
    if seed is None:
        return None
    if unknown := {tensor.dtype for tensor in written} - KERNEL_DTYPES:
        names = ", ".join(sorted(map(str, unknown)))
        raise ValueError(
            f"{op}: rounding_seed is for bfloat16, float16 and wider dtypes, got {names}; "
            f"leave it out"
        )
    device = written[0].device if written else torch.device("cpu")
    if isinstance(seed, Tensor):
        if seed.ndim != 0 or seed.dtype != torch.int64:
            raise ValueError(
                f"{op}: a rounding_seed tensor must be int64 and 0-dim, "
                f"got {seed.dtype} of shape {list(seed.shape)}"
            )
        if seed.device.type != "cpu" and seed.device != device:
            raise ValueError(
                f"{op}: rounding_seed must be an int or a tensor on the CPU or the targets' device "
                f"{device}, got one on {seed.device}"
            )
        return seed
    if not isinstance(seed, (Integral, torch.SymInt)) or isinstance(seed, bool):
        raise TypeError(
            f"{op}: rounding_seed must be None, an int or a tensor, got {type(seed).__name__}"
        )
    number: Any = seed
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{op}: rounding_seed must fit into 64 bits with sign, got {seed}")
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def write(
    out: Tensor, value: Tensor, seed: Tensor | None, number: int, group: Sequence[Tensor]
) -> None:
    """`value` into `out`, rounded stochastically where there is a seed and `out` is narrow.

    Args:
        out, value: of the same shape.
        seed, number: as in `random_bits`.
        group: the tensors that an operator goes through together. Where all are dense and ordered
            alike, elements count by their place in memory, and elsewhere row by row.
    """
    if seed is None or out.dtype not in NARROW:
        out.copy_(value)
        return
    random = random_bits(seed.to(out.device), number, out.numel())
    if share_order(group):
        random = random.as_strided(out.shape, out.stride())
    else:
        random = random.view(out.shape)
    out.copy_(round_stochastically(value.float(), random, out.dtype))


def random_bits(seed: Tensor, number: int, count: int) -> Tensor:
    """[count] int64 in [0, 2^32): what elements 0, 1, ... of a tensor draw.

    Args:
        seed: 0-dim int64; where the result is to be.
        number: of the tensor, counted by the operator.
        count: elements.
    """
    stream = _random.draws(_random.draws(seed, 0) + number, 0)
    pairs = torch.arange((count + 1) // 2, device=seed.device)
    drawn = _random.draws(stream + pairs, 0)
    halves = torch.stack([drawn & 0xFFFFFFFF, _random.shifted(drawn, 32)], -1)
    return halves.flatten()[:count]


def round_stochastically(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in a dtype of `NARROW`.

    Args:
        x: float32, of any shape. Infinities and NaN stay; numbers beyond the largest of `dtype` are
            rounded to it or to infinity.
        random: int64 of the same shape, as `random_bits` gives them.
    """
    bits = x.view(torch.int32)
    dropped = 16 if dtype == torch.bfloat16 else 13
    lost = (1 << dropped) - 1
    rounded = ((bits + (random & lost).int()) & ~lost).view(torch.float32)
    if dtype == torch.float16:
        # Below 2^-14 neighbours are 2^-24 apart.
        steps = x.abs() * 2.0**24
        whole = steps.floor()
        up = steps - whole > (random >> 8).float() * 2.0**-24
        subnormal = torch.copysign((whole + up) * 2.0**-24, x)
        rounded = torch.where(x.abs() < 2.0**-14, subnormal, rounded)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
