"""Probabilistic heads: distributions over the teacher's embedding of a target patch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jepa_fast.nn.heads.autoregressive import AutoregressiveHead
from jepa_fast.nn.heads.diffusion import DiffusionHead
from jepa_fast.nn.heads.flow import CouplingFlowHead
from jepa_fast.nn.heads.flow_matching import FlowMatchingHead
from jepa_fast.nn.heads.interface import Head, LatentDistribution
from jepa_fast.nn.heads.mixture import MixtureHead

HEADS: dict[str, type[Head]] = {
    "mixture": MixtureHead,
    "autoregressive": AutoregressiveHead,
    "flow": CouplingFlowHead,
    "flow_matching": FlowMatchingHead,
    "diffusion": DiffusionHead,
}
"""The built-in heads by name."""


def create_head(
    name: str, condition_dim: int, target_dim: int, options: Mapping[str, Any] | None = None
) -> Head:
    """A built-in head.

    Args:
        name: of `HEADS`.
        condition_dim: d, width of the predictor's tokens.
        target_dim: D, width of the teacher's.
        options: further arguments of the head's class.

    Raises:
        TypeError: the name is none; options that are no mapping; an option's value that the head
            refuses.
        ValueError: an unknown name or option, or an option's value that the head refuses.
    """
    if not isinstance(name, str):
        raise TypeError(f"head must be one of {tuple(HEADS)}, got {name!r}")
    check_head_options(repr(name), options)
    if name not in HEADS:
        raise ValueError(f"head must be one of {tuple(HEADS)}, got {name!r}")
    known = list(inspect.signature(HEADS[name]).parameters)[2:]
    if unknown := sorted(set(options or {}) - set(known)):
        raise ValueError(f"head {name!r} has no option {', '.join(unknown)}; it has {known}")
    return HEADS[name](condition_dim, target_dim, **(options or {}))


def check_head_options(head: str, options: object) -> None:
    """Raises TypeError for options that are neither None nor a mapping of strings to values."""
    if options is None:
        return
    if not isinstance(options, Mapping):
        got = type(options).__name__
    elif others := [key for key in options if not isinstance(key, str)]:
        got = f"the key {others[0]!r}"
    else:
        return
    raise TypeError(f"options of head {head} must be a mapping of names to values, got {got}")


__all__ = [
    "HEADS",
    "AutoregressiveHead",
    "CouplingFlowHead",
    "DiffusionHead",
    "FlowMatchingHead",
    "Head",
    "LatentDistribution",
    "MixtureHead",
    "create_head",
]
