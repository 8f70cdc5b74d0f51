"""Kernels and models for joint-embedding predictive architectures (JEPA)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jepa_fast.errors import BackendError, CheckpointError

if TYPE_CHECKING:
    from jepa_fast import data as data
    from jepa_fast import eval as eval
    from jepa_fast import host_memory as host_memory
    from jepa_fast import interop, masks, ops, perf
    from jepa_fast import models as models
    from jepa_fast import nn as nn
    from jepa_fast import optim as optim
    from jepa_fast import train as train
    from jepa_fast.models.ijepa import IJepa
    from jepa_fast.models.probijepa import ProbIJepa
    from jepa_fast.models.tcjepa import TCJepa
    from jepa_fast.models.tijepa import TIJepa

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "CheckpointError",
    "IJepa",
    "ProbIJepa",
    "TCJepa",
    "TIJepa",
    "__version__",
    "interop",
    "masks",
    "ops",
    "perf",
]

# Loaded at first use, so that importing the package costs next to nothing over importing torch.
_MODELS = {"IJepa": "ijepa", "TIJepa": "tijepa", "TCJepa": "tcjepa", "ProbIJepa": "probijepa"}
# Not all in __all__: `from jepa_fast import *` is to leave torch's nn and Python's eval alone.
_MODULES = (
    "data", "eval", "host_memory", "interop", "masks", "models", "nn", "ops", "optim", "perf",
    "train",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODELS:
        return getattr(importlib.import_module(f"jepa_fast.models.{_MODELS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"jepa_fast.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
