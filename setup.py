"""What pyproject.toml cannot say: the native library, where torch and a compiler are at hand.

`pip install .` builds in isolation, finds no torch there, and installs pure Python and Triton.
`pip install --no-build-isolation .` adds the native library; `JEPA_FAST_BUILD` (see
jepa_fast/ops/_build.py) forces or skips parts of it.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_build() -> ModuleType:
    """jepa_fast/ops/_build.py without the package around it, which needs torch."""
    spec = importlib.util.spec_from_file_location("_build", ROOT / "jepa_fast/ops/_build.py")
    if spec is None or spec.loader is None:
        raise ImportError("jepa_fast/ops/_build.py is missing from the source tree")
    module = importlib.util.module_from_spec(spec)
    sys.modules["_build"] = module
    spec.loader.exec_module(module)
    return module


native = load_build()


class BuildNative(build_ext):
    """Builds the library and the record of what is in it."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.get_ext_fullpath(ext.name)).parent
        folder.mkdir(parents=True, exist_ok=True)
        record = native.build(folder)
        for part, reason in record.why_not.items():
            self.warn(f"the native library has no {part} kernels: {reason}")

    def copy_extensions_to_source(self) -> None:
        """An editable install: the record goes where the library goes."""
        super().copy_extensions_to_source()
        record = Path(self.build_lib, "jepa_fast", native.RECORD)
        shutil.copyfile(record, ROOT / "jepa_fast" / native.RECORD)
        if not record.with_name(native.LIBRARY).is_file():
            (ROOT / "jepa_fast" / native.LIBRARY).unlink(missing_ok=True)


class BuildPython(build_py):
    """Takes along what an installed package's `jepa-fast build` and `jepa-fast bench` need."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib, "jepa_fast")
            shutil.copytree(ROOT / "csrc", package / "_csrc", dirs_exist_ok=True)
            (package / "_benchmarks").mkdir(parents=True, exist_ok=True)
            for file in (*(ROOT / "benchmarks").glob("*.py"), ROOT / "benchmarks/floors.json"):
                # Which are for this checkout.
                if file.name not in ("heads.py", "learning.py", "power.py", "tables.py"):
                    shutil.copy(file, package / "_benchmarks")


def extensions() -> list[Extension]:
    """The native library, unless it is unwanted or torch is not there to build against."""
    choice = native.wanted()
    if choice == "none":
        return []
    if importlib.util.find_spec("torch") is None:
        if choice != "auto":
            raise native.BuildError(
                f"JEPA_FAST_BUILD={choice} needs torch where the build runs: install torch, then "
                "use `pip install --no-build-isolation .`"
            )
        return []
    return [Extension("jepa_fast._native", sources=[], py_limited_api=True, optional=True)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
