"""That `make sanitize` finds what it looks for, and in the library that its tests run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import runs_cpu_kernel
from samples import Sample
from test_contracts import SAMPLES

from jepa_fast import ops
from jepa_fast.ops import _build, _native
from jepa_fast.ops._registry import OPERATORS

under_sanitizer = pytest.mark.skipif(
    "libasan" not in os.environ.get("LD_PRELOAD", ""), reason="needs `make sanitize`"
)

MISALIGNED = "torch.frombuffer(bytearray(17), offset=1, dtype=torch.float32)"


def test_every_operator_with_a_cpu_kernel_is_run() -> None:
    samples = [parameter.values[0] for parameter in SAMPLES]
    run = {n for s in samples if runs_cpu_kernel({"sample": s}, ()) for n in s.operators}
    assert run >= {name for name, operator in OPERATORS.items() if "cpu" in operator.backends}
    without = Sample("none", ops.latent_loss, ("latent_loss_backward",), samples[0].make)
    assert not runs_cpu_kernel({"sample": without}, samples)
    assert runs_cpu_kernel({"backend": "cpu"}, samples)
    for other in ({"backend": "reference"}, {"backend": "triton"}, {"choice": "reference"}):
        assert not runs_cpu_kernel(other, samples)
    assert not runs_cpu_kernel({}, ())


@pytest.mark.native
@under_sanitizer
def test_only_the_sanitized_library_is_loaded() -> None:
    assert _native.missing() == []
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded = {line.split(maxsplit=5)[5] for line in maps if line.endswith(_build.LIBRARY)}
    assert loaded == {str(_build.library_folder() / _build.LIBRARY)}
    assert _build.library_folder() != _build.PACKAGE


@pytest.mark.native
@under_sanitizer
@pytest.mark.parametrize(
    ("source", "shadow", "report"),
    [
        ("torch.ones(4)", "torch.ones(4)", None),
        ("torch.ones(3)", "torch.ones(4)", "heap-buffer-overflow"),  # read
        ("torch.ones(4)", "torch.ones(3)", "heap-buffer-overflow"),  # written
        (MISALIGNED, "torch.ones(4)", "misaligned address"),
    ],
    ids=["correct", "read", "write", "alignment"],
)
def test_errors_of_a_kernel_are_found(source: str, shadow: str, report: str | None) -> None:
    """Calls past the operator's checks, straight to the kernel."""
    lines = [
        "import torch",
        "from jepa_fast.ops import _native",
        "from jepa_fast.ops.ema_update.native import _KERNEL",
        "assert _native.missing() == []",
        f"source, shadow = {source}, {shadow}",
        "print('called')",
        "_KERNEL([torch.zeros(4)], [source], [shadow], torch.tensor(0.5), None)",
        "print('returned')",
    ]
    done = subprocess.run(
        [sys.executable, "-u", "-c", "\n".join(lines)], capture_output=True, text=True
    )
    if report is None:
        assert (done.returncode, done.stdout) == (0, "called\nreturned\n"), done.stderr
    else:
        assert (done.returncode != 0, done.stdout) == (True, "called\n"), done.stderr
        assert report in done.stderr
        assert "csrc/cpu/ema_rows.h" in done.stderr
