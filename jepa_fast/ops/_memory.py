"""Lists of tensors as memory: what fits, what may not overlap, what is walked as flat arrays.

For operators that go through the i-th tensors of several lists element by element, and write some.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jepa_fast.ops._checks import check_tensor, only_kernel_dtypes

DTYPE = operator.attrgetter("dtype")
DEVICE = operator.attrgetter("device")
BYTES = operator.attrgetter("nbytes")
_SHAPE = operator.attrgetter("shape")
_LAYOUT = operator.attrgetter("layout")
_PLAIN = {Tensor, torch.nn.Parameter}


def as_list(op: str, name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Raises TypeError if they are none; what is in them `check_fit` looks at."""
    try:
        return list(tensors)
    except TypeError:
        got = type(tensors).__name__
        raise TypeError(f"{op}: {name} must be a list of tensors, got {got}") from None


def check_fit(
    op: str, name: str, tensors: list[Tensor], owners: list[Tensor], owner: str, hint: str = ""
) -> None:
    """Raises unless each tensor is floating, dense and of the shape of its owner.

    Args:
        op, name: of the operator and the argument, for messages.
        tensors: one an owner, or fewer.
        owners: the i-th is that of the i-th tensor.
        owner: what they are, `"target"`.
        hint: what to do with integers.
    """
    if not torch.compiler.is_compiling() and _all_fit(tensors, owners):
        return
    for i, tensor in enumerate(tensors):
        check_tensor(op, f"{name}[{i}]", tensor)
        if not tensor.is_floating_point():
            raise TypeError(
                f"{op}: {name}[{i}] must be of a floating dtype, got {tensor.dtype}{hint}"
            )
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{op}: {name}[{i}] must be dense, got {tensor.layout}; use .to_dense()"
            )
        if tensor.shape != owners[i].shape:
            raise ValueError(
                f"{op}: {name}[{i}] must have the shape of its {owner}, "
                f"{list(owners[i].shape)}, got {list(tensor.shape)}"
            )


def _all_fit(tensors: list[Tensor], owners: list[Tensor]) -> bool:
    """Whether plain tensors surely fit; in a few C loops, as this runs at every call."""
    return (
        set(map(type, tensors)) <= _PLAIN
        and all(map(Tensor.is_floating_point, tensors))
        and set(map(_LAYOUT, tensors)) <= {torch.strided}
        and (tensors is owners or all(map(operator.eq, map(_SHAPE, tensors), map(_SHAPE, owners))))
    )


def unsupported(tensors: list[Tensor]) -> list[str]:
    """Why a kernel cannot walk these, from metadata alone: dtypes and devices."""
    reasons = only_kernel_dtypes(*tensors)
    if len(set(map(DEVICE, tensors))) > 1:
        reasons.append("takes tensors of one device, got several")
    return reasons


def check_apart(
    op: str, written: Mapping[str, list[Tensor]], read: Mapping[str, list[Tensor]]
) -> None:
    """Raises ValueError if a tensor to be written overlaps itself or any other one.

    Args:
        op: the operator's name, for messages.
        written: lists by argument name.
        read: the same; these may overlap each other.
    """
    if not _all_apart([*itertools.chain(*written.values(), *read.values())]):
        _check_overlap(op, written, read)


def _all_apart(tensors: list[Tensor]) -> bool:
    """Whether the tensors are surely disjoint; in a few C loops, as this runs at every call."""
    if not all(map(Tensor.is_contiguous, tensors)):
        return False
    sizes = dict(zip(map(Tensor.data_ptr, tensors), map(BYTES, tensors), strict=True))
    starts = sorted(sizes)
    ends = map(operator.add, starts, map(sizes.__getitem__, starts))
    # Tensors that begin alike share memory, or are empty.
    return len(starts) == len(tensors) and all(map(operator.le, ends, starts[1:]))


@dataclass
class _Span:
    """A tensor between the addresses of its first byte and of what follows its last."""

    start: int
    end: int
    written: bool
    name: str
    tensor: Tensor

    @classmethod
    def of(cls, tensor: Tensor, written: bool, name: str) -> _Span:
        start, item = tensor.data_ptr(), tensor.element_size()
        last = sum(stride * (size - 1) for stride, size in _dimensions(tensor))
        return cls(start, start + last + item, written, name, tensor)

    def shares(self, other: _Span) -> bool:
        """Whether any byte is in both: of two whose addresses overlap, if one has gaps."""
        if is_dense(self.tensor) and is_dense(other.tensor):
            return True
        reach: dict[int, list[int]] = {}  # by stride, how far the elements of both lie apart
        for tensor, end in ((self.tensor, 1), (other.tensor, 0)):
            for stride, size in _dimensions(tensor):
                reach.setdefault(stride, [0, 0])[end] += size - 1
        steps = [(stride, -below, above) for stride, (below, above) in reach.items()]
        apart = self.start - other.start
        return _sums_reach(
            1 - self.tensor.element_size() - apart, other.tensor.element_size() - 1 - apart, steps
        )


def _check_overlap(
    op: str, written_lists: Mapping[str, list[Tensor]], read_lists: Mapping[str, list[Tensor]]
) -> None:
    """The same with strides, and with what is read and may overlap; says what overlaps."""
    spans = []
    lists = [(True, *each) for each in written_lists.items()]
    lists += [(False, *each) for each in read_lists.items()]
    for written, name, tensors in lists:
        for i, tensor in enumerate(tensors):
            if tensor.numel() == 0:
                continue
            if written and not is_dense(tensor):
                _refuse_folded(op, f"{name}[{i}]", tensor)
            spans.append(_Span.of(tensor, written, f"{name}[{i}]"))
    before: list[_Span] = []  # those that end after the present one begins
    for span in sorted(spans, key=lambda span: span.start):
        before = [each for each in before if each.end > span.start]
        for other in before:
            if (span.written or other.written) and span.shares(other):
                raise ValueError(
                    f"{op}: {span.name} and {other.name} share memory; what is written needs "
                    f"memory of its own: list a tied tensor once, or clone() one"
                )
        before.append(span)


def _refuse_folded(op: str, name: str, tensor: Tensor) -> None:
    """Raises ValueError if elements of the tensor share memory, as those of expand and unfold."""
    item, steps = tensor.element_size(), _dimensions(tensor)
    is_expanded = len(steps) < sum(size > 1 for size in tensor.shape)
    # Two elements differ in some dimension first; whichever it is, say that it is upwards.
    if is_expanded or any(
        _sums_reach(
            1 - item,
            item - 1,
            [(stride, 1, size - 1), *((s, 1 - n, n - 1) for s, n in steps[i + 1 :])],
        )
        for i, (stride, size) in enumerate(steps)
    ):
        raise ValueError(
            f"{op}: {name} is written and must have memory for each of its elements, got "
            f"shape {list(tensor.shape)} with strides {list(tensor.stride())}: clone() it"
        )


def _dimensions(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride in bytes, size) of the dimensions that lead from one address to another."""
    item = tensor.element_size()
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return [(stride * item, size) for stride, size in pairs if size > 1 and stride > 0]


def _sums_reach(low: int, high: int, steps: list[tuple[int, int, int]]) -> bool:
    """Whether a sum of `stride * k`, with a whole k in [least, most] for each of `steps`, lies in
    [low, high]. Mostly every stride is larger than all that the smaller ones add up to, and then
    two numbers at the most are to be tried for each.
    """
    steps = sorted(steps, reverse=True)
    if not steps:
        return low <= 0 <= high
    (stride, least, most), *rest = steps
    rest_low = sum(s * a for s, a, _ in rest)
    rest_high = sum(s * b for s, _, b in rest)
    first = max(least, -((rest_high - low) // stride))
    last = min(most, (high - rest_low) // stride)
    return any(
        _sums_reach(low - stride * k, high - stride * k, rest) for k in range(first, last + 1)
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def share_order(group: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape are dense, and all have their elements in the same order."""
    strides = group[0].stride()
    return is_dense(group[0]) and all(tensor.stride() == strides for tensor in group)


@dataclass
class Flat:
    """Lists in which the i-th tensors have the same elements in the same order, without gaps.

    Tensors that were not so are contiguous copies here; `write_back` returns what was written.

    Args:
        lists: of which all but the first may be shorter than it.
        copies: pairs of a tensor and its copy.
    """

    lists: list[list[Tensor]]
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, *lists: list[Tensor]) -> Flat:
        if all(map(Tensor.is_contiguous, itertools.chain(*lists))):
            return cls(list(lists))
        flat = cls([[] for _ in lists])
        for group in itertools.zip_longest(*lists):
            there = [tensor for tensor in group if tensor is not None]
            alike = all(map(Tensor.is_contiguous, there)) or share_order(there)
            for tensor, out in zip(group, flat.lists, strict=True):
                if tensor is None:
                    continue
                dense = tensor if alike else tensor.contiguous()
                if dense is not tensor:
                    flat.copies.append((tensor, dense))
                out.append(dense)
        return flat

    def write_back(self, written: Sequence[list[Tensor]]) -> None:
        """Copies back what kernels wrote.

        Args:
            written: those of `lists` that they wrote.
        """
        if not self.copies:
            return
        names = {id(tensor) for each in written for tensor in each}
        for tensor, copy in self.copies:
            if id(copy) in names:
                tensor.copy_(copy)
