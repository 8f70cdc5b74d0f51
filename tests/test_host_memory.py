"""Memory that is freed stays with the process: counted in the pages that the kernel gives."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_runs import tiny, trainer_of

from jepa_fast import host_memory
from jepa_fast.data.batch import Batch
from jepa_fast.host_memory import keep_host_memory, kept_host_memory, return_host_memory
from jepa_fast.train import trainer

needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc"
)
COUNT = """
import resource
import torch
from jepa_fast.host_memory import *

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

def resident_after_freeing():
    many = [torch.ones(2**20) for _ in range(64)]
    del many
    return resident()
"""
FREED = 64 * 2**22 // resource.getpagesize()


def counts(code: str) -> list[int]:
    """What the code prints, in a process whose C library nobody else has set."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT + code], capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()]


@needs_glibc
def test_freed_blocks_are_used_again() -> None:
    default, kept = counts(
        "faults(); print(faults()); assert keep_host_memory()\n"
        "for _ in range(8):\n    faults()  # the heap grows until blocks find their places\n"
        "print(faults())"
    )
    block = 2**26 // resource.getpagesize()
    if default < 3 * block:
        pytest.skip("the kernel gives larger pages by itself here")
    assert kept < block / 10


@needs_glibc
def test_returned_memory_goes_back_to_the_kernel_or_stays_in_the_heap() -> None:
    before, kept, stays, returned = counts(
        "assert keep_host_memory(); print(resident())\n"
        "print(resident_after_freeing())\n"
        "assert return_host_memory(heap=False); print(resident())\n"
        "assert return_host_memory(); print(resident())"
    )
    assert kept > before + 0.9 * FREED
    assert stays > before + 0.9 * FREED
    assert returned < before + 0.1 * FREED


@needs_glibc
def test_the_end_of_the_context_returns_what_was_kept() -> None:
    before, kept, returned = counts(
        "print(resident())\n"
        "with kept_host_memory() as kept:\n"
        "    assert kept; print(resident_after_freeing())\n"
        "print(resident())"
    )
    assert kept > before + 0.9 * FREED
    assert returned < before + 0.2 * FREED


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_glibc", lambda: None)
    assert not keep_host_memory()
    assert not return_host_memory()
    with kept_host_memory() as kept:
        assert not kept


def test_the_trainer_keeps_memory_while_it_trains_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[bool] = []
    seen: list[list[bool]] = []

    @contextmanager
    def recorded() -> Iterator[bool]:
        inside.append(True)
        yield True
        inside.pop()

    run = trainer_of(tiny(tmp_path, "train.steps=1"))
    update = run._update

    def observed(batch: Batch) -> dict[str, float]:
        seen.append(inside.copy())
        return update(batch)

    monkeypatch.setattr(trainer, "kept_host_memory", recorded)
    monkeypatch.setattr(run, "_update", observed)
    run.fit()
    assert seen == [[True]]
    assert not inside
