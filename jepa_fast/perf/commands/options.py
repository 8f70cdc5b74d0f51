"""Kinds of arguments that the commands have in common."""

from __future__ import annotations

import argparse


def positive(kind: type[int] | type[float]) -> type[int] | type[float]:
    """A parser of positive numbers."""

    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
        return value

    parse.__name__ = "number"  # as argparse names it when the text is none
    return parse  # type: ignore[return-value]


def share(text: str) -> float:
    """Parses a share; beyond 1 it was meant in per cent."""
    try:
        value = positive(float)(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a share such as 0.05, which is 5 %, got {text}"
        ) from None
    if value > 1:
        raise argparse.ArgumentTypeError(
            f"expected a share, at most 1, got {text}; {value:g} % is {value / 100:g}"
        )
    return value
