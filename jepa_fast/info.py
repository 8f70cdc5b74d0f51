"""What `jepa-fast info` prints. Needs torch alone."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import jepa_fast
from jepa_fast.ops import BACKENDS, _build, _machine  # importing ops registers the operators
from jepa_fast.ops._registry import OPERATORS


def describe() -> str:
    """Versions, the native library, every operator's backends, and why some cannot run here."""
    return "\n".join([*_versions(), "", *_native_library(), "", *_operators(), "", *_why_not()])


def _versions() -> list[str]:
    if torch.cuda.is_available():
        gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    else:
        gpus = "none visible"
    return [
        f"jepa_fast  {jepa_fast.__version__}",
        f"python     {platform.python_version()} on {platform.machine()}",
        f"torch      {torch.__version__}, {torch.get_num_threads()} threads",
        f"triton     {_version('triton')}",
        f"gpu        {gpus}",
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _native_library() -> list[str]:
    path = _build.library_folder() / _build.LIBRARY
    record = _build.Record.read()
    if record is None or not path.is_file():
        return ["native library: not built; `jepa-fast build` builds it"]
    return [f"native library: {path}", *(f"  {line}" for line in record.compilers)]


def _operators() -> list[str]:
    """A table: operators down, backends across."""
    width = max(map(len, OPERATORS))
    lines = [f"{'operator':<{width}}  " + "".join(f"{backend:<11}" for backend in BACKENDS)]
    for name, operator in sorted(OPERATORS.items()):
        states = [
            "no kernel"
            if backend not in operator.backends
            else "missing"
            if _machine.missing(backend)
            else "yes"
            for backend in BACKENDS
        ]
        lines.append(f"{name:<{width}}  " + "".join(f"{state:<11}" for state in states).rstrip())
    return lines


def _why_not() -> list[str]:
    reasons = {backend: _machine.missing(backend) for backend in BACKENDS}
    lines = [f"{backend}: {'; '.join(why)}" for backend, why in reasons.items() if why]
    return ["missing here:", *(f"  {line}" for line in lines)] if lines else ["nothing is missing"]
