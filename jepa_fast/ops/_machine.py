"""What this machine can run, apart from any operator."""

from __future__ import annotations

import functools
import importlib.util
import operator
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from jepa_fast.ops import _native

_DEVICE = operator.attrgetter("device")


def missing(backend: str) -> list[str]:
    """What `backend` lacks on this machine, whatever the call; empty if nothing."""
    if backend == "cpu":
        return _native.missing()
    if backend == "cuda":
        return _native.missing_cuda()
    if backend == "triton":
        return _missing_triton()
    return []


def wrong_device(backend: str, tensors: Iterable[Tensor]) -> list[str]:
    """Why tensors on these devices cannot go to `backend`; empty if they can."""
    if backend == "reference":
        return []
    wanted = "cpu" if backend == "cpu" or _interpreted(backend) else "cuda"
    tensors = list(tensors)
    found = sorted({device.type for device in set(map(_DEVICE, tensors))} - {wanted})
    if found == ["cpu"] and all(t.ndim == 0 for t in tensors if t.device.type == "cpu"):
        return []  # as in torch itself, a number that the host knows goes with any device
    return [f"needs {wanted} tensors, got {', '.join(found)}"] if found else []


def _interpreted(backend: str) -> bool:
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing_triton() -> list[str]:
    try:
        found = importlib.util.find_spec("triton") is not None
    except ImportError:  # an import hook that hides it
        found = False
    if not found:
        return ["triton is not installed: pip install triton"]
    if not _interpreted("triton") and not torch.cuda.is_available():
        return ["no CUDA device is visible"]
    return []
