"""Kernels and models for joint-embedding predictive architectures (JEPA)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jepa_fast.errors import BackendError, CheckpointError

if TYPE_CHECKING:
    from jepa_fast import (
        data,
        eval,
        host_memory,
        interop,
        masks,
        models,
        nn,
        ops,
        optim,
        perf,
        train,
    )
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
    "data",
    "eval",
    "host_memory",
    "interop",
    "masks",
    "models",
    "nn",
    "ops",
    "optim",
    "perf",
    "train",
]

# Loaded at first use, so that importing the package costs next to nothing over importing torch.
_MODELS = {"IJepa": "ijepa", "TIJepa": "tijepa", "TCJepa": "tcjepa", "ProbIJepa": "probijepa"}
_MODULES = {name for name in __all__ if name.islower()} - {"__version__"}


def __getattr__(name: str) -> Any:
    if name in _MODELS:
        return getattr(importlib.import_module(f"jepa_fast.models.{_MODELS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"jepa_fast.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
