"""Modules that are loaded when they are first named: importing what holds them costs nothing."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from typing import Any


def submodules(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose modules are reached by its name alone.

    Python itself sets a submodule on its package once the submodule has been imported.
    """

    def names() -> list[str]:
        return [module.name for module in pkgutil.iter_modules(sys.modules[package].__path__)]

    def __getattr__(name: str) -> Any:
        # Not by trying: a module that lacks an optional package has to say so.
        if name in names():
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names()})

    return __getattr__, __dir__
