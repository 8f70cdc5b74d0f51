"""Checks of what constructors are given. Each error says argument, expected and got."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real


def check_count(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is an integer, ValueError unless it is at least 1."""
    if not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def check_number(name: str, value: object, *, zero: bool = False) -> None:
    """Refuse what is no positive and finite number.

    Args:
        zero: 0 is fine, too.

    Raises:
        TypeError: it is no number; a tensor is none.
        ValueError: it is negative, infinite, NaN or 0.
    """
    wanted = "a number of 0 or more" if zero else "a positive number"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {wanted}, got {value!r}")
    if not 0 <= float(value) < math.inf or (value == 0 and not zero):
        raise ValueError(f"{name}: expected {wanted} that is finite, got {value}")


def check_flag(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")
