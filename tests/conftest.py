"""Which tests run where: the four tiers, and what every test may ask for.

tier 0 (no marker)   any CPU
tier 1 (`tier1`)     any CPU, own process: ``TRITON_INTERPRET=1 pytest -m tier1``
tier 2 (`tier2`)     any CPU: kernels compiled ahead of time
tier 3 (`tier3`)     a CUDA GPU

`native` marks those of tier 0 that `make sanitize` runs once more: all that run a CPU kernel of an
operator with `SAMPLES` are marked here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import runs_cpu_kernel
from cuda_on_cpu import emulated_kernels
from torch import distributed

from jepa_fast.ops._registry import Operator

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # The workers already fill the cores; threads on top of them only fight.
        torch.set_num_threads(1)
    # Else `poisoned_memory`, which asks for determinism, has older torch refuse cuBLAS on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # An out-of-range index kills the interpreter's process, and the variable changes what
    # @triton.jit means, so tier 1 never shares a process with the other tiers.
    kept, dropped = [], []
    for item in items:
        is_tier1 = item.get_closest_marker("tier1") is not None
        (kept if is_tier1 == INTERPRETED else dropped).append(item)
    if dropped:
        items[:] = kept
        config.hook.pytest_deselected(items=dropped)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in kept:
            if item.get_closest_marker("tier3") is not None:
                item.add_marker(skip)
    for item in kept:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        others = ("tier2", "tier3", "cuda_on_cpu")
        elsewhere = any(item.get_closest_marker(marker) is not None for marker in others)
        if not elsewhere and runs_cpu_kernel(parameters, getattr(item.module, "SAMPLES", ())):
            item.add_marker("native")


@pytest.fixture(autouse=True)
def _cuda_on_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("cuda_on_cpu") is None:
        yield
        return
    with emulated_kernels():
        yield


@pytest.fixture
def backends_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The (operator, backend) of every call made so far in the test, in order."""
    calls: list[tuple[str, str]] = []
    select = Operator.select

    def recording(self: Operator, requested: str, args: tuple[Any, ...]) -> str:
        backend = select(self, requested, args)
        calls.append((self.name, backend))
        return backend

    monkeypatch.setattr(Operator, "select", recording)
    return calls


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Has `torch.empty` give NaN, so that what a kernel leaves out is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def nearest_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has Triton's interpreter round to the nearest bfloat16, as GPUs do; it truncates."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def nearest(data: Any, source: Any, to: Any, mode: Any) -> Any:
        if (source, to) != (tl.float32, tl.bfloat16):
            return convert(data, source, to, mode)
        bits = torch.tensor(data).bfloat16().view(torch.int16)
        return bits.numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", nearest)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone, for the time of a test."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The data shared beside a checkout (``../shared``); skips where it is absent."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the shared data folder {path}")
    return path
