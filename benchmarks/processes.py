"""Runs that a benchmark starts, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_python(threads: int, *arguments: object) -> None:
    """`python` with these arguments, in the checkout.

    Args:
        threads: that it may use.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        command = " ".join(map(str, arguments))
        raise RuntimeError(f"{command} failed, exit code {done.returncode}:\n{done.stderr[-4000:]}")
