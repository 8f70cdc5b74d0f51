"""One list of backends for all tiers: what tests of operators with kernels run over."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from samples import Sample

from jepa_fast.ops import _native
from jepa_fast.ops._registry import OPERATORS

needs_native = pytest.mark.skipif(
    bool(_native.missing()) and shutil.which("g++") is None, reason="no compiler, no native kernels"
)

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

_PLACES = (
    pytest.param("reference", "cpu"),
    pytest.param("cpu", "cpu", marks=needs_native),
    pytest.param("triton", "cpu", marks=pytest.mark.tier1),  # the interpreter
    pytest.param("triton", "cuda", marks=pytest.mark.tier3),
    pytest.param("cuda", "cuda", marks=pytest.mark.tier3),
)
# The CUDA kernels in the place of the CPU's: see tests/cuda_on_cpu.
_EMULATED = pytest.param(
    "cpu", "cpu", id="cuda-on-cpu", marks=[needs_native, needs_gxx, pytest.mark.cuda_on_cpu]
)
in_emulator = pytest.mark.parametrize(("backend", "device"), [_EMULATED])


def backends(names: Iterable[str], on_gpu: bool = True, emulated: bool = True) -> Any:
    """Parametrizes `backend` and `device` over the places where these backends run.

    Args:
        names: of the backends.
        on_gpu: also where only a GPU is.
        emulated: run CUDA kernels on a CPU, too, which takes long.
    """
    names = tuple(names)
    places = [place for place in _PLACES if place.values[0] in names]
    if "cuda" in names and emulated:
        places.append(_EMULATED)
    if not on_gpu:
        places = [place for place in places if place.values[1] == "cpu"]
    return pytest.mark.parametrize(("backend", "device"), places)


def runs_cpu_kernel(parameters: Mapping[str, Any], samples: Iterable[Any]) -> bool:
    """Whether a test with these parameters, in a module with these `SAMPLES`, may run one."""
    if parameters.get("backend", "cpu") != "cpu" or parameters.get("choice") == "reference":
        return False
    own = (parameters["sample"],) if "sample" in parameters else samples
    names = {name for sample in own if isinstance(sample, Sample) for name in sample.operators}
    return any("cpu" in OPERATORS[name].backends for name in names)
