"""One list of backends for all tiers: what tests of operators with kernels run over."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import Any

import pytest

from jepa_fast.ops import _native

needs_native = pytest.mark.skipif(
    bool(_native.missing()) and shutil.which("g++") is None, reason="no compiler, no native kernels"
)

_PLACES = (
    pytest.param("reference", "cpu"),
    pytest.param("cpu", "cpu", marks=needs_native),
    pytest.param("triton", "cpu", marks=pytest.mark.tier1),  # the interpreter
    pytest.param("triton", "cuda", marks=pytest.mark.tier3),
    pytest.param("cuda", "cuda", marks=pytest.mark.tier3),
)


def backends(names: Iterable[str]) -> Any:
    """Parametrizes `backend` and `device` over the places where these backends run."""
    names = tuple(names)
    return pytest.mark.parametrize(
        ("backend", "device"), [place for place in _PLACES if place.values[0] in names]
    )
