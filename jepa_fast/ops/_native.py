"""The native library `jepa_fast/_native.abi3.so`: whether it is there, and why not.

It holds C++ and CUDA implementations of the schemas that operators define here, in a namespace of
their own: the public operator selects a backend first, and the native ones then call these.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops import _build

_HOW_TO_ADD = "`jepa-fast build` builds it"
_SCHEMAS = torch.library.Library("jepa_fast_native", "DEF")


def define(schema: str) -> Any:
    """Defines an operator for the library to implement: `torch.ops.jepa_fast_native.<op>`."""
    _SCHEMAS.define(schema)
    return getattr(torch.ops.jepa_fast_native, schema.partition("(")[0])


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in one piece, as kernels take masks; None stays."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def missing() -> list[str]:
    """Why the native CPU kernels cannot run here; empty if they can."""
    return _load()["cpu"]


def missing_cuda() -> list[str]:
    """Why the native CUDA kernels cannot run here; empty if they can."""
    reasons = _load()["cuda"]
    if not reasons and not torch.cuda.is_available():
        return ["no CUDA device is visible"]
    return reasons


@functools.cache
def _load() -> dict[str, list[str]]:
    """Loads the library, once; for each part why it is not there."""
    path = _build.library_folder() / _build.LIBRARY
    record = _build.Record.read()
    if not path.is_file() or record is None:
        why_not = record.why_not if record else {}
        return {part: _not_built(part, why_not.get(part)) for part in _build.PARTS}
    if record.is_older_than_sources():
        warnings.warn(
            "the native library was built from other sources than those in "
            f"{_build.source_folder()}: run `jepa-fast build`",
            RuntimeWarning,
            stacklevel=2,
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = f"{path} does not load ({error}): `jepa-fast build` builds it anew"
        return {part: [reason] for part in _build.PARTS}
    return {
        part: [] if part in record.parts else _not_built(part, record.why_not.get(part))
        for part in _build.PARTS
    }


def _not_built(part: str, why: str | None) -> list[str]:
    reason = f"the native library has no {part} kernels"
    return [f"{reason} ({why}); {_HOW_TO_ADD}" if why else f"{reason}; {_HOW_TO_ADD}"]
