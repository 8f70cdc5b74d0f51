"""NVTX ranges on operators and on the phases of a step, so that a profile reads like the paper.

Off unless the environment has `JEPA_FAST_NVTX=1` or `enable_ranges()` was called. Off, a call of an
operator runs what it would run without this file, and a phase asks one global variable. On, all
ranges are in the NVTX domain `jepa_fast`: operators in the category `operators`, named after
operator and backend (`jepa_fast.ema_update_ [cpu]`), and phases in the category `phases`::

    with jepa_fast.perf.use_ranges():
        with jepa_fast.perf.phase("forward"):
            output = model(images, masks)
        with jepa_fast.perf.phase("backward"):
            output.loss.backward()

In a compiled model the operators keep their ranges; the phases inside the model are gone, since
compiled code runs in another order. Ranges are per thread: on a GPU autograd runs the operators'
backward passes on a thread of its own, and a profiler shows them there.

Needs torch alone until ranges are switched on, and knows no operator and no model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from jepa_fast._arguments import switched_on

__all__ = ["disable_ranges", "enable_ranges", "phase", "use_ranges"]

DOMAIN = "jepa_fast"
_OPERATOR_COLOR, _PHASE_COLOR = "blue", "green"

_domain: Any = None  # nvtx's, while ranges are on
_listeners: list[Callable[[], None]] = []


def enable_ranges() -> None:
    """Switch ranges on for the process; best between steps. `JEPA_FAST_NVTX=1` does it at import.

    Raises:
        ImportError: the nvtx package is missing.
    """
    try:
        nvtx = importlib.import_module("nvtx")
    except ImportError as error:
        raise ImportError('NVTX ranges need nvtx: pip install "jepa-fast[nvtx]"') from error
    _switch(nvtx.get_domain(DOMAIN))


def disable_ranges() -> None:
    """Switch ranges off; those that are open still end."""
    _switch(None)


@contextmanager
def use_ranges() -> Iterator[None]:
    """Ranges are on inside, and afterwards as before. Raises as `enable_ranges`."""
    before = _domain
    enable_ranges()
    try:
        yield
    finally:
        _switch(before)


def phase(name: str, number: int | None = None) -> AbstractContextManager[None]:
    """A range around a phase of a step, popped also where the phase raises.

    Args:
        name: in the paper's words, such as `"target encoder"`.
        number: shown with the range, as its payload: which step it is.
    """
    # Asked first: compiled code would otherwise be compiled anew whenever ranges are switched.
    if torch.compiler.is_compiling():
        return nullcontext()
    if _domain is None:
        return _NO_RANGE
    return _Range(_domain, name, number)


def around_operator(
    operator: str, backend: str, function: Callable[..., Any]
) -> Callable[..., Any]:
    """`function`, within a range named after operator and backend where ranges are on."""
    if _domain is None:
        return function
    attributes = _domain.get_event_attributes(
        message=f"jepa_fast.{operator} [{backend}]", color=_OPERATOR_COLOR, category="operators"
    )
    push, pop = _domain.push_range, _domain.pop_range

    def ranged(*args: Any) -> Any:
        push(attributes)
        try:
            return function(*args)
        finally:
            pop()

    return ranged


def when_switched(listener: Callable[[], None]) -> None:
    """Has `listener` called whenever ranges have been switched on or off."""
    _listeners.append(listener)


def _switch(domain: Any) -> None:
    global _domain
    _domain = domain
    for listener in _listeners:
        listener()


class _NoRange:
    """`nullcontext`, made once."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: Any) -> None:
        return None


_NO_RANGE = _NoRange()


class _Range:
    """Keeps the domain, so that a range ends although ranges were switched off inside."""

    __slots__ = ("attributes", "domain")

    def __init__(self, domain: Any, name: str, number: int | None) -> None:
        self.domain = domain
        self.attributes = domain.get_event_attributes(
            message=name, color=_PHASE_COLOR, category="phases", payload=number
        )

    def __enter__(self) -> None:
        self.domain.push_range(self.attributes)

    def __exit__(self, *error: Any) -> None:
        self.domain.pop_range()


if switched_on("JEPA_FAST_NVTX"):
    enable_ranges()
