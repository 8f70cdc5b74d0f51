"""The files that the Makefile gives to pytest for a tier hold all tests of that tier."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("tier", [1, 3])
def test_no_test_of_a_tier_is_left_out(tier: int) -> None:
    show = f"show: ; @echo $(TIER{tier})"
    listed = _printed("make", "-s", "--eval", show, "show").split()
    found = _printed(
        *(sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", f"tier{tier}"),
        TRITON_INTERPRET="1" if tier == 1 else "0",
    )
    files = {line.partition("::")[0] for line in found.splitlines() if "::" in line}
    assert len(files) > 4
    assert files <= set(listed)


def test_products_on_a_gpu_may_be_asked_to_be_deterministic() -> None:
    """torch raises for cuBLAS otherwise, as of 2.11, and does so before a fixture could say it."""
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")


def _printed(*command: str, **variables: str) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
