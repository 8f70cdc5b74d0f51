"""Checks of what samplers, packing and networks are given: argument, expected, got."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def switched_on(name: str) -> bool:
    """Whether the environment switches something on.

    Raises:
        ValueError: the variable ``name`` says neither yes nor no.
    """
    value = os.environ.get(name, "")
    if value == "1" or value.lower() in ("true", "yes", "on"):
        return True
    if value == "" or value.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{name}: expected 1 or 0 (or true, yes, on; false, no, off), got {value!r}")


def integer(name: str, value: Any, least: int | None = None) -> int:
    """``value`` as an int; NumPy's integers are fine.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below ``least``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        kind = type(value).__name__
        got = f"{kind} {value!r}; use int()" if isinstance(value, Real) else kind
        raise TypeError(f"{name}: expected an int, got {got}") from None
    if least is not None and number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def holds_integers(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are whole: bools are none."""
    import torch

    is_whole = not (tensor.is_floating_point() or tensor.is_complex())
    return is_whole and tensor.dtype != torch.bool


def check_integers(name: str, tensor: Tensor) -> None:
    """Raises TypeError for a tensor of other numbers."""
    if not holds_integers(tensor):
        raise TypeError(f"{name}: expected integers, got {tensor.dtype}; use .long()")


def height_and_width(name: str, value: Any, least: int) -> tuple[int, int]:
    """``value`` as (height, width); one integer stands for both.

    Raises:
        TypeError: neither an integer nor two of them.
        ValueError: not two, or one below ``least``.
    """
    sides: tuple[Any, ...]
    try:
        sides = (operator.index(value),) * 2
    except TypeError:
        sides = _items(value)
    try:
        sides = tuple(map(operator.index, sides))
    except TypeError:
        sides = ()
    if not sides:
        raise TypeError(
            f"{name}: expected an int, or two as (height, width), got {value!r}; use int()"
        )
    if len(sides) != 2:
        raise ValueError(f"{name}: expected (height, width) or an int for both, got {value!r}")
    height, width = sides
    if min(height, width) < least:
        raise ValueError(
            f"{name}: expected (height, width), both at least {least}, got {(height, width)}"
        )
    return height, width


def interval(name: str, value: Any, most: float = math.inf) -> tuple[float, float]:
    """``value`` as (low, high).

    Raises:
        TypeError: no pair of numbers.
        ValueError: not two, or not 0 < low <= high <= ``most``, both finite.
    """
    pair = _items(value)
    if not pair or not all(isinstance(each, Real) for each in pair):
        raise TypeError(f"{name}: expected a pair of numbers (low, high), got {value!r}")
    bound = "" if most == math.inf else f" <= {most:g}"
    if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most or math.isinf(pair[1]):
        raise ValueError(f"{name}: expected 0 < low <= high{bound}, both finite, got {pair}")
    return pair[0], pair[1]


def flag(name: str, value: Any) -> bool:
    """``value``, True or False.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}; use bool()")
    return value


def captions_by_image(name: str, value: Any) -> list[list[str]]:
    """``value`` as a list of captions for every image; a string is the one caption of its image.

    Raises:
        TypeError: neither strings nor sequences of them, or a lone string, which is no batch.
    """
    wanted = "a caption or a sequence of captions for each image"
    if isinstance(value, str):
        raise TypeError(f"{name}: expected {wanted}, got one str; for one image pass [caption]")
    try:
        images = list(value)
    except TypeError:
        kind = type(value).__name__
        raise TypeError(
            f"{name}: expected {wanted}, got {kind}; an image without captions has []"
        ) from None
    for i, some in enumerate(images):
        try:
            # Not list(some) for all: that of a string is its letters.
            images[i] = [some] if isinstance(some, str) else list(some)
        except TypeError:
            kind = type(some).__name__
            raise TypeError(
                f"{name}[{i}]: expected a caption or a sequence of captions, got {kind}; an image "
                "without captions has []"
            ) from None
        wrong = [each for each in images[i] if not isinstance(each, str)]
        if wrong:
            kind = type(some if isinstance(some, bytes) else wrong[0]).__name__
            raise TypeError(f"{name}[{i}]: expected captions, each a str, got {kind}")
    return images


def check_count(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is an integer, ValueError unless it is at least 1."""
    if not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def check_counts(**values: object) -> None:
    """As :func:`check_count` of every named value."""
    for name, value in values.items():
        check_count(name, value)


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


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")


def _items(value: Any) -> tuple[Any, ...]:
    """Those of a tuple, list or array; none of what has none."""
    try:
        return tuple(value)
    except TypeError:
        return ()
