"""Host memory that a training step frees is kept for the next one.

glibc maps a block of 32 MiB or more by itself and gives it back to the kernel as soon as it is
freed, and returns the end of its heap as well. A training step on a CPU so gets most of its
activations as fresh pages every time, which the kernel has to zero, 4 KiB at a time. Kept, a step
that allocates what the last one did takes no page from the kernel at all. Peak memory stays the
same; between steps the process holds on to its peak.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["keep_host_memory", "kept_host_memory", "return_host_memory"]

# Parameters of mallopt(3), and what glibc comes to by itself where tensors are large.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = -1
_MIB = 2**20
_LARGEST_THRESHOLD = 32 * _MIB
_MOST_BLOCKS = 65536


def keep_host_memory() -> bool:
    """Have the process keep the memory that it frees, from now on, of all sizes.

    :class:`jepa_fast.train.trainer.Trainer` does it on a CPU. Call it before the first step of a
    training loop of your own; nothing but the speed changes. Memory that was freed serves every
    later allocation of the process by ``malloc`` (so by PyTorch on the CPU, and by NumPy), but no
    other process: call :func:`return_host_memory` when the loop is over.

    Returns:
        Whether the C library could do it: True with glibc, False elsewhere (macOS, musl), where
        nothing changes. An allocator that replaces glibc's by LD_PRELOAD is left as it is.
    """
    library = _glibc()
    return library is not None and all(
        [library.mallopt(_TRIM_THRESHOLD, _NEVER), library.mallopt(_MMAP_MAX, 0)]
    )


def return_host_memory(heap: bool = True) -> bool:
    """Undo :func:`keep_host_memory`.

    Args:
        heap: give what is free to the kernel, now and from now on. False: from now on blocks of
            32 MiB and more come from the kernel and go back to it, as without
            :func:`keep_host_memory`, and all that is free now stays where it is.

    Returns:
        As :func:`keep_host_memory`.
    """
    library = _glibc()
    if library is None:
        return False
    done = [
        library.mallopt(_MMAP_MAX, _MOST_BLOCKS),
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD),
    ]
    if heap:
        done.append(library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD))
        library.malloc_trim(0)  # gives 0 where there was nothing to return
    return all(done)


@contextmanager
def kept_host_memory() -> Iterator[bool]:
    """:func:`keep_host_memory` on entry, which gives the value, :func:`return_host_memory` on exit.

    Of nested ones the inner one's end is the end of all.
    """
    kept = keep_host_memory()
    try:
        yield kept
    finally:
        return_host_memory()


@functools.cache
def _glibc() -> Any:
    """The C library of the process; None if it is not glibc."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
