"""A counter-based generator of random bits, the same on every device: csrc/common/random.h.

splitmix64 (Steele, Lea and Flood, 2014), whose k-th draw needs no draw before it. Keys and draws
are Python integers in [0, 2^64), or int64 tensors of the same bits.
"""

from __future__ import annotations

from torch import Tensor

_BITS = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def draw(key: int, counter: int) -> int:
    """Draw number `counter` of the stream `key`."""
    return _mix(key + (counter + 1) * _GOLDEN & _BITS)


def fold(key: int, value: int) -> int:
    """The key of sub-stream `value` of `key`; different values give different keys."""
    return _mix(key ^ _mix(value + _GOLDEN & _BITS))


def _mix(x: int) -> int:
    x = (x ^ x >> 30) * _FIRST & _BITS
    x = (x ^ x >> 27) * _SECOND & _BITS
    return x ^ x >> 31


def draws(key: Tensor, counter: Tensor | int) -> Tensor:
    """`draw` for every entry of int64 tensors, which broadcast."""
    return _mix_tensor(key + (counter + 1) * signed(_GOLDEN))


def folded(key: Tensor | int, value: Tensor) -> Tensor:
    """`fold` for every entry of int64 tensors, which broadcast; a key may be `signed` bits."""
    return _mix_tensor(_mix_tensor(value + signed(_GOLDEN)) ^ key)


def signed(bits: int) -> int:
    """The int64 of the same 64 bits."""
    return bits - (1 << 64) if bits >> 63 else bits


def shifted(x: Tensor, bits: int) -> Tensor:
    """An int64 tensor's bits moved to the right, with zeros behind them: torch shifts the sign."""
    return x >> bits & (1 << 64 - bits) - 1


def _mix_tensor(x: Tensor) -> Tensor:
    # int64 products wrap around, as those of unsigned numbers do.
    x = (x ^ shifted(x, 30)) * signed(_FIRST)
    x = (x ^ shifted(x, 27)) * signed(_SECOND)
    return x ^ shifted(x, 31)
