"""Optional packages, imported where they are used, with an error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, purpose: str) -> Any:
    """The imported module. Raises ImportError naming the extra to install if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{purpose} needs {module.partition(".")[0]}: pip install "jepa-fast[train]"'
        ) from error
