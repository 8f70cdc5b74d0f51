"""The native library `jepa_fast/_native.abi3.so`: whether it is there, and why not."""

from __future__ import annotations


def missing() -> list[str]:
    """Why the native CPU kernels cannot run here; empty if they can."""
    return ["the native library is not built: run `jepa-fast build`"]


def missing_cuda() -> list[str]:
    """Why the native CUDA kernels cannot run here; empty if they can."""
    return missing()
