"""What launches move: every address that a kernel loads or stores in Triton's interpreter.

Only where TRITON_INTERPRET=1 was set before triton was imported; `perf.interpreted` sees to that.
Bytes are counted as the kernel asks for them, masked lanes left out. A byte asked for twice within
a launch counts twice in `read` and once in `read_unique`: the difference is what the caches have to
catch. An atomic operation reads and writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_fast.perf.audit_report import Moved

_HELD_ADDRESSES = 1 << 22


@dataclass
class Recording:
    """What happened within `recording()`.

    Args:
        kernels: by the kernels' names, in the order of their first launches.
        torch_operations: how often PyTorch computed or copied beside the launches, by operation:
            on a GPU each is a launch of its own. Views, empty tensors and numbers read by the host
            do not count.
    """

    kernels: dict[str, Moved] = field(default_factory=dict)
    torch_operations: Counter[str] = field(default_factory=Counter)


class _Addresses:
    """Addresses that one launch reads, or writes."""

    def __init__(self) -> None:
        self.total = 0
        self._held = 0
        self._pieces: dict[int, list[np.ndarray]] = {}

    def add(self, handle: Any, mask: np.ndarray | None) -> None:
        """The addresses in a block of pointers where `mask` is set, None: all."""
        addresses = handle.data
        if mask is not None:
            # A mask that was a single number, or made from one, is no array of bool.
            addresses = addresses[np.broadcast_to(np.asarray(mask, bool), addresses.shape)]
        width = max(8, handle.get_element_ty().primitive_bitwidth) // 8
        self.total += addresses.size * width
        piece = np.unique(addresses)
        self._pieces.setdefault(width, []).append(piece)
        self._held += piece.size
        if self._held > _HELD_ADDRESSES:
            self._pieces = {
                width: [np.unique(np.concatenate(pieces))] for width, pieces in self._pieces.items()
            }
            self._held = 0

    def unique(self) -> int:
        """How many bytes they are together, overlaps once."""
        if not self._pieces:
            return 0
        flat = {width: np.concatenate(pieces) for width, pieces in self._pieces.items()}
        starts = np.concatenate(list(flat.values())).astype(np.int64)
        ends = np.concatenate([each.astype(np.int64) + width for width, each in flat.items()])
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], ends[order]
        # Each adds what no earlier one reached.
        reached = np.concatenate([starts[:1], np.maximum.accumulate(ends)[:-1]])
        return int(np.sum(np.maximum(ends, reached) - np.maximum(starts, reached)))


class _Operations(TorchDispatchMode):
    """Counts what PyTorch computes or copies."""

    def __init__(self, counter: Counter[str]) -> None:
        super().__init__()
        self.counter = counter
        self.off = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.off and not _is_free(func):
            self.counter[str(func).rpartition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def _is_free(operation: Any) -> bool:
    """Whether it launches nothing on a GPU: allocations, views, and what the host alone is told."""
    name = operation.name().partition("::")[2].partition(".")[0]
    if "empty" in name or name in ("_local_scalar_dense", "detach", "alias", "set_", "resize_"):
        return True
    returns = operation._schema.returns
    if not returns:
        return False
    if not any("Tensor" in str(each.type) for each in returns):  # such as promote_types
        return True
    return all(each.alias_info is not None and not each.alias_info.is_write for each in returns)


@contextmanager
def recording(*, beside: bool = True) -> Iterator[Recording]:
    """Records every launch in the interpreter.

    Args:
        beside: also count PyTorch's operations; the first time takes a second or two.

    Raises:
        RuntimeError: triton was imported without TRITON_INTERPRET=1.
    """
    import triton
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("traffic is counted under TRITON_INTERPRET=1, which is not set")
    record = Recording()
    operations = _Operations(record.torch_operations)
    reads, writes = _Addresses(), _Addresses()
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas, launch = builder.create_atomic_rmw, builder.create_atomic_cas, executor.__call__

    # Whatever else the builder loads and stores by (unmasked, descriptors, block pointers), it does
    # by these. What follows the first arguments differs between versions of Triton.
    def counted_load(ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        reads.add(ptrs, _data(mask))
        return load(ptrs, mask, *rest, **named)

    def counted_store(ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        writes.add(ptrs, _data(mask))
        return store(ptrs, value, mask, *rest, **named)

    def counted_rmw(kind: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        reads.add(ptr, _data(mask))
        writes.add(ptr, _data(mask))
        return rmw(kind, ptr, value, mask, *rest)

    def counted_cas(ptr: Any, *rest: Any) -> Any:
        reads.add(ptr, None)
        writes.add(ptr, None)
        return cas(ptr, *rest)

    def counted_launch(self: Any, *args: Any, **named: Any) -> Any:
        nonlocal reads, writes
        reads, writes = _Addresses(), _Addresses()
        operations.off = True  # the interpreter's own copies
        try:
            result = launch(self, *args, **named)
        finally:
            operations.off = False
        moved = record.kernels.setdefault(self.fn.__name__, Moved())
        moved.launches += 1
        moved.read += reads.total
        moved.read_unique += reads.unique()
        moved.written += writes.total
        moved.written_unique += writes.unique()
        return result

    replacements: dict[str, Callable[..., Any]] = {
        "create_masked_load": counted_load,
        "create_masked_store": counted_store,
        "create_atomic_rmw": counted_rmw,
        "create_atomic_cas": counted_cas,
    }
    for name, function in replacements.items():
        setattr(builder, name, function)  # on the object, before its class's
    executor.__call__ = counted_launch
    try:
        with operations if beside else nullcontext():
            yield record
    finally:
        executor.__call__ = launch
        for name in replacements:
            delattr(builder, name)


def _data(mask: Any) -> np.ndarray | None:
    return None if mask is None else mask.data


def record_call(call: Callable[[], object]) -> Recording:
    """What the second of two calls does: what the first one made and kept is there by then."""
    with torch.no_grad():
        call()
        with recording() as record:
            call()
    return record
