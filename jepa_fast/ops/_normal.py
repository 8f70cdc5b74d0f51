"""Standard normal numbers from a counter, the same on every device: csrc/common/normal.h.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011) and Box and Muller's transform (1958). The
number of row `r` and column `c` comes from the counter `(r's low word, r's high word, c // 64,
c % 16)` under the seed as key. Of its four output words the first two give two normal numbers and
the last two another two, for the columns that are 0, 16, 32 and 48 further on than `c % 16` in
their 64: no two places have a counter and a word in common.

The words are equal to the last bit everywhere, and so are the uniform numbers made of them; normal
numbers are equal but for rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jepa_fast.ops._random import shifted

LANES = 16
GROUP = 4 * LANES
"""Columns that are drawn together."""

_LOW = 0xFFFFFFFF
_ROUNDS = 10
_FIRST, _SECOND = 0xD2511F53, 0xCD9E8D57
_LOW_STEP, _HIGH_STEP = 0x9E3779B9, 0xBB67AE85


def philox(key: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The four output words of a key (int64) and four counter words, all of which broadcast.

    Words are int64 tensors in [0, 2^32).
    """
    low, high = key & _LOW, shifted(key, 32)
    x, y, z, w = counter
    for _ in range(_ROUNDS):
        first, second = x * _FIRST, z * _SECOND  # int64 wraps around: the bits are the product's
        x, y = shifted(second, 32) ^ y ^ low, second & _LOW
        z, w = shifted(first, 32) ^ w ^ high, first & _LOW
        low, high = (low + _LOW_STEP) & _LOW, (high + _HIGH_STEP) & _LOW
    return x, y, z, w


def words(seed: Tensor, first_row: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """What numbers of rows `first_row` on are made of: [rows, groups, 2, 16] int64 words of their
    radii and of their angles, for two numbers each; `seed` is int64, [1].
    """
    device = seed.device
    row = (torch.arange(rows, device=device) + first_row)[:, None, None]
    group = torch.arange(-(-width // GROUP), device=device)[:, None]
    lane = torch.arange(LANES, device=device)
    x, y, z, w = philox(seed, (row & _LOW, shifted(row, 32), group, lane))
    return torch.stack([x, z], 2), torch.stack([y, w], 2)


def uniforms(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """float32 u in (0, 1] and f in [-1/2, 1/2], a place in a quarter of the circle."""
    u = ((radius >> 1).float() + 0.5) * 2.0**-31
    f = (((angle << 34) >> 32).float()) * 2.0**-32
    return u, f


def standard_normal(seed: Tensor, first_row: int, rows: int, width: int) -> Tensor:
    """[rows, width] float32: rows `first_row` on of the numbers under `seed`, int64 [1]."""
    radius, angle = words(seed, first_row, rows, width)  # [rows, groups, 2, 16]
    return pairs(radius, angle).flatten(1)[:, :width]


def pairs(radius: Tensor, angle: Tensor) -> Tensor:
    """[..., 2, L] float32: two numbers of each of the words [..., L] of radii and angles."""
    u, f = (x.double() for x in uniforms(radius, angle))
    r = (-2 * u.log()).sqrt()
    cosine, sine = r * torch.cos(math.pi / 2 * f), r * torch.sin(math.pi / 2 * f)
    # The two bits that are not in f: a sign and which axis the quarter lies on.
    cosine = torch.where(angle >= 1 << 31, -cosine, cosine)
    swap = (angle & 1 << 30) != 0
    first, second = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    return torch.stack([first, second], -2).float()
