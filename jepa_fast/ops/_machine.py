"""What this machine can run, apart from any operator."""

from __future__ import annotations

import functools
import importlib.util
import operator
import os
from collections.abc import Collection

import torch
from torch import Tensor

from jepa_fast.ops import _native

_DEVICE = operator.attrgetter("device")
_IS_CPU, _IS_CUDA = operator.attrgetter("is_cpu"), operator.attrgetter("is_cuda")


def missing(backend: str) -> list[str]:
    """What `backend` lacks on this machine, whatever the call; empty if nothing."""
    if backend == "cpu":
        return _native.missing()
    if backend == "cuda":
        return _native.missing_cuda()
    if backend == "triton":
        return _missing_triton()
    return []


def device_types(tensors: Collection[Tensor]) -> set[str]:
    """Where a call's tensors are. As in torch itself, a number on the host goes with any device, so
    0-dim CPU tensors say nothing.
    """
    if tensors and all(map(_IS_CPU, tensors)):  # most calls, at a fourth of the time
        types = {"cpu"}
    elif tensors and all(map(_IS_CUDA, tensors)):
        types = {"cuda"}
    else:
        types = {device.type for device in set(map(_DEVICE, tensors))}
    if len(types) <= 1 and any(t.ndim for t in tensors):
        return types
    if "cpu" in types and all(t.ndim == 0 for t in tensors if t.device.type == "cpu"):
        types.remove("cpu")
    return types


def takes(backend: str, types: set[str]) -> bool:
    """Whether tensors on devices of these types can go to `backend`."""
    return backend == "reference" or not types or types == {_wanted(backend)}


def wrong_device(backend: str, types: set[str]) -> list[str]:
    """Why tensors on devices of these types cannot go to `backend`; empty if they can."""
    if takes(backend, types):
        return []
    wanted = _wanted(backend)
    return [f"needs {wanted} tensors, got {', '.join(sorted(types - {wanted}))}"]


def _wanted(backend: str) -> str:
    return "cpu" if backend == "cpu" or _interpreted(backend) else "cuda"


def _interpreted(backend: str) -> bool:
    return backend == "triton" and _interprets()


@functools.cache
def _interprets() -> bool:
    """Asked once, as Triton asks once, when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing_triton() -> list[str]:
    try:
        found = importlib.util.find_spec("triton") is not None
    except ImportError:  # an import hook that hides it
        found = False
    if not found:
        return ["triton is not installed: pip install triton"]
    if not _interprets() and not torch.cuda.is_available():
        return ["no CUDA device is visible"]
    return []
