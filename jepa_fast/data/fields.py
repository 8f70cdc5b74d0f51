"""Values of JSON files, which may hold anything."""

from __future__ import annotations

from typing import Any


def integer(name: str, value: Any, low: int = -(2**63), high: int = 2**63 - 1) -> int:
    """A number, or a text of digits, as an int.

    Raises ValueError naming the field if it is no whole number in [low, high].
    """
    try:
        number = int(value)
    except (OverflowError, TypeError, ValueError):
        number = None
    whole = number is not None and not isinstance(value, bool)
    whole = whole and (number == value or not isinstance(value, float))
    if number is None or not whole or not low <= number <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r:.40}")
    return number


def texts(name: str, value: Any) -> list[str]:
    """A text, or a list of texts, as a list; None is an empty one.

    Raises ValueError naming the field if it is something else, or cannot be written as UTF-8.
    """
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{name} must be a text or a list of texts, got {value!r:.40}")
    for text in found:
        text.encode()  # half of a surrogate pair would stop a tokenizer later
    return found
