"""Whose code a version runs: its own, and not that of the other version or the working tree."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

_HARNESS = Path(__file__).resolve().parents[2]
"""The `jepa_fast` whose `perf` measures both versions."""
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class Imports:
    """What is imported in this process, which runs one version.

    Args:
        root: the version.
        suite: the folder of benchmarks, which both versions run.
        paths: folders below `root` that its code is imported from.
        repository: the working tree that the versions are of.
        other: the root of the other version.
    """

    def __init__(
        self, root: Path, suite: Path, paths: Sequence[str], repository: Path, other: Path
    ) -> None:
        self._root, self._suite, self._other, self._repository = (
            each.resolve() for each in (root, suite, other, repository)
        )
        self._paths = [os.path.normpath(path) for path in paths]
        self._seen: set[str] = set()
        # What comes with Python itself, or is made by a compiler, may lie in the working tree.
        made = [sys.prefix, sys.base_prefix, *filter(None, map(os.environ.get, _CACHES))]
        self._made = [
            folder
            for folder in (Path(each).resolve() for each in made)
            if self._repository in folder.parents
        ]
        # So may a jepa_fast that no version contains.
        inside = _HARNESS.is_relative_to(self._repository)
        relative = _HARNESS.relative_to(self._repository) if inside else _HARNESS
        versions = (self._root, self._other)
        versioned = inside and any((version / relative).exists() for version in versions)
        self._made.append(_HARNESS / "perf" if versioned else _HARNESS)

    def why_not_own(self) -> str:
        """Names a module, imported since the last time, of the working tree or the other version.

        Nothing where there is none; otherwise where it lies, and what to do.
        """
        new = sorted(sys.modules.keys() - self._seen)
        self._seen.update(new)
        for name in new:
            file = getattr(sys.modules[name], "__file__", None)
            if isinstance(file, str) and not self._may_be(path := Path(file).resolve()):
                return (
                    f"{name} is imported from {path}, which is not this version's: both versions "
                    f"would run the same code; {self._what_to_do(name, path)}"
                )
        return ""

    def _may_be(self, file: Path) -> bool:
        if file.is_relative_to(self._root) or self._is_of_suite(file):
            return True
        if not any(file.is_relative_to(each) for each in (self._other, self._repository)):
            return True
        return not _INSTALLED.isdisjoint(file.parts) or any(map(file.is_relative_to, self._made))

    def _is_of_suite(self, file: Path) -> bool:
        if self._suite_is_among_sources() and not file.name.startswith("bench_"):
            return False
        return file.is_relative_to(self._suite)

    def _suite_is_among_sources(self) -> bool:
        roots = (self._root, self._other)
        return any(self._suite == (root / path).resolve() for root in roots for path in self._paths)

    def _what_to_do(self, name: str, file: Path) -> str:
        if self._suite_is_among_sources() and file.is_relative_to(self._suite):
            return "keep the benchmarks in a folder of their own, without what they measure"
        if file.is_relative_to(self._other):
            return "the benchmarks must not put it on sys.path: name its folder with --path"
        depth = name.count(".") + (file.stem == "__init__")
        folder = os.path.relpath(file.parents[depth], self._repository)
        if folder in self._paths:
            return (
                f"{self._root / folder} has no such module (does git ignore it? --build may make "
                "it), or Python imports it as it starts: uninstall it"
            )
        return f"name the folder that it is imported from: --path {folder}"
