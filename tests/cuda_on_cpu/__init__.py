"""The kernels of csrc/cuda, run on a CPU by the emulator in cuda_runtime.h beside this file."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from jepa_fast.ops._registry import OPERATORS

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
EMULATOR = Path(__file__).with_name("cuda_runtime.h")

# kernel<Types><<<grid, block, shared, stream>>>(arguments);
_LAUNCH = re.compile(r"([\w:]+(?:<[\w, ]+>)?)\s*<<<([^>]*)>>>\(([^;]*)\);")
_FLAGS = [
    "-std=c++20",
    "-O1",
    "-ffp-contract=off",
    "-fPIC",
    "-Wno-unknown-pragmas",
    "-Wno-attributes",
    # A GPU refuses an access that is not aligned to its width, where a CPU may not.
    "-fsanitize=undefined",
    "-fno-sanitize-recover=undefined",
]


@contextmanager
def emulated_kernels() -> Iterator[None]:
    """Has the native CPU backend run the CUDA kernels instead of its own."""
    _load()
    with pytest.MonkeyPatch.context() as patch:
        for name, native in _natives().items():
            patch.setattr(native, "_KERNEL", _in_place_of(name))
        yield


def _natives() -> dict[str, ModuleType]:
    """The module that calls the kernel of each operator that has one."""
    names = [name for name, operator in OPERATORS.items() if "cuda" in operator.backends]
    return {name: import_module(f"jepa_fast.ops.{name.rstrip('_')}.native") for name in names}


def _in_place_of(name: str) -> Any:
    emulated = getattr(torch.ops.jepa_fast_cuda_on_cpu, name).default

    def call(*args: Any) -> Any:
        # What jepa_fast/ops/*/native.py sees to where tensors are on a GPU.
        args = tuple(_readable(x) if isinstance(x, Tensor) else x for x in args)
        if name == "adamw_ema_":
            steps, found_inf = args[4], args[11]
            torch._foreach_add_(steps, 1.0 if found_inf is None else (found_inf == 0).float())
        return emulated(*args)

    return call


def _readable(x: Tensor) -> Tensor:
    narrow = x.is_floating_point() and x.dtype not in (torch.float32, torch.float64)
    return x.float() if narrow else x


@functools.cache
def _load() -> torch.library.Library:
    """Builds the library, or takes that of the same sources, and loads it."""
    schemas = torch.library.Library("jepa_fast_cuda_on_cpu", "DEF")
    for name in _natives():
        schema = str(getattr(torch.ops.jepa_fast_native, name).default._schema)
        schemas.define(schema.partition("::")[2])
    torch.ops.load_library(str(_build()))
    return schemas


def _build() -> Path:
    sources = sorted(CSRC.glob("cuda/*")) + sorted(CSRC.glob("common/*")) + [EMULATOR]
    digest = hashlib.sha256(" ".join([torch.__version__, *_FLAGS]).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{digest.hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the processes that test, one builds
        if not library.is_file():
            _compile(folder, library)
    return library


def _compile(folder: Path, library: Path) -> None:
    sources = []
    for path in sorted(CSRC.glob("cuda/*.cu")):
        sources.append(folder / f"{path.stem}.cpp")
        sources[-1].write_text(f'#line 1 "{path}"\n{plain_cpp(path.read_text())}')
    unfinished = library.with_suffix(".tmp")
    compile_for_the_emulator(sources, unfinished)
    unfinished.rename(library)


def plain_cpp(cuda: str) -> str:
    """The source with its launches as calls of the emulator."""
    plain, launches = _LAUNCH.subn(r"emulator::launch(\2, [&] { \1(\3); });", cuda)
    assert launches > 0
    assert "<<<" not in plain
    return plain


def compile_for_the_emulator(sources: list[Path], library: Path) -> None:
    package = Path(torch.__file__).parent
    includes = [f"-I{folder}" for folder in (EMULATOR.parent, CSRC / "cuda", package / "include")]
    libraries = [f"-L{package / 'lib'}", "-ltorch", "-ltorch_cpu"]
    flags = [*_FLAGS, "-shared", "-include", str(EMULATOR), *includes]
    subprocess.run(["g++", *flags, "-o", library, *sources, *libraries], check=True)
