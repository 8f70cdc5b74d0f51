"""Attention within sequences that lie one after the other, by whichever kernel serves."""

from __future__ import annotations

import functools
import importlib.util
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jepa_fast.errors import BackendError
from jepa_fast.nn.attention import attend
from jepa_fast.ops._autograd import may_be_saved
from jepa_fast.ops._checks import may_be_checked

BACKENDS = ("varlen", "flash_attn", "xformers", "sdpa")
"""In the order in which `"auto"` tries them."""


@dataclass(eq=False)
class Sequences:
    """Where sequences begin in a row of T tokens. The last one is slack, which nobody reads.

    Args:
        offsets: ``[S + 2]`` int32, the beginnings of S sequences and of the slack, and T.
        tokens: T.
        longest: most tokens of a sequence other than the slack.
        backend: of attention: ``"auto"`` or one of :data:`BACKENDS`.

    Raises:
        TypeError: offsets that are no int32 tensor.
        ValueError: offsets that do not ascend from 0 to T, or a sequence of more than ``longest``
            tokens. On a GPU they are read with ``JEPA_FAST_DEBUG=1`` alone, in compiled code never.
    """

    offsets: Tensor
    tokens: int
    longest: int
    backend: str = "auto"
    _found: tuple[Tensor, Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    _bounded: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            return
        if not isinstance(self.offsets, Tensor) or self.offsets.dtype != torch.int32:
            got = getattr(self.offsets, "dtype", type(self.offsets).__name__)
            raise TypeError(f"offsets: expected an int32 tensor [S + 2], got {got}; use .int()")
        if not may_be_checked(self.offsets):
            return
        offsets = self.offsets.tolist()
        lengths = list(map(operator.sub, offsets[1:], offsets))
        if not lengths or offsets[0] != 0 or offsets[-1] != self.tokens or min(lengths) < 0:
            raise ValueError(
                f"offsets: expected the beginnings of sequences and of the slack, ascending from 0 "
                f"to tokens={self.tokens}, got {offsets}"
            )
        most = max(lengths[:-1], default=0)
        if most > self.longest:  # slots would overlap
            raise ValueError(
                f"longest: expected at least {most}, the tokens of sequence {lengths.index(most)}, "
                f"got {self.longest}"
            )

    def bounded_offsets(self) -> tuple[Tensor, int]:
        """Offsets of sequences of so many tokens at the most: the slack is cut into pieces.

        Kernels make room, and start blocks, for a longest sequence everywhere, and the length of
        the slack is not known to the host. How many pieces there are follows from T and ``longest``
        alone; those that the slack does not fill are empty.
        """
        most = max(self.longest, 1)
        if self._bounded is None or not may_be_saved(self._bounded):
            begin = self.offsets[:-1]
            piece = torch.arange(1, -(-self.tokens // most) + 1, device=begin.device)
            ends = (begin[-1] + most * piece).clamp(max=self.tokens)
            self._bounded = torch.cat([begin, ends.to(begin.dtype)])
        return self._bounded, most

    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows to slots, slots to rows, and which slots hold a token.

        Every sequence has a slot more than its longest can fill. It never counts, so whatever
        slack is put there gets no gradient; and slots without a token read the last row, whatever
        it is, and give none back. So one index is the other's transpose, and neither needs sums.
        """
        # Not by functools.cached_property, whose lock is not compiled.
        if self._found is not None and may_be_saved(self._found[0]):
            return self._found
        begin = self.offsets[:-2].long()
        lengths = self.offsets[1:-1].long() - begin
        slots = self.longest + 1
        slot = torch.arange(slots, device=begin.device)
        filled = slot < lengths[:, None]  # [S, slots]
        row = torch.where(filled, begin[:, None] + slot, self.tokens - 1)
        token = torch.arange(self.tokens, device=begin.device)
        sequence = torch.searchsorted(self.offsets[1:-1].contiguous(), token.int(), right=True)
        known = sequence < len(begin)
        first = self.offsets[sequence.clamp(max=max(len(begin) - 1, 0))]
        of_token = torch.where(known, sequence * slots + token - first, self.longest)
        self._found = row.flatten(), of_token, filled
        return self._found

    @property
    def filled(self) -> Tensor:
        """``[S, longest + 1]`` bool: which slots of :meth:`unpack` hold a token."""
        return self._places()[2]

    def unpack(self, x: Tensor) -> Tensor:
        """``[T, ...]`` to ``[S, longest + 1, ...]``; slots without a token are finite."""
        row, slot, filled = self._places()
        return _Rearranged.apply(x, row, slot, None).unflatten(0, filled.shape)

    def pack(self, x: Tensor) -> Tensor:
        """``[S, longest + 1, ...]`` to ``[T, ...]``; slack holds something finite."""
        row, slot, filled = self._places()
        if not filled.shape[0]:  # nor is there a slot that slack could read
            return x.new_zeros(self.tokens, *x.shape[2:])
        return _Rearranged.apply(x.flatten(0, 1), slot, row, filled.flatten())


class _Rearranged(torch.autograd.Function):
    """`x[index]`, where the gradient is `grad[inverse]`, 0 where `taken` is False."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor, taken: Tensor | None) -> Tensor:
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        index, inverse, taken = ctx.saved_tensors
        grad = _Rearranged.apply(grad, inverse, index, None)
        if taken is not None:
            grad.mul_(taken.view(-1, *[1] * (grad.ndim - 1)))
        return grad, None, None, None


def attend_packed(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """Scaled dot-product attention of every token to those of its own sequence.

    Args:
        q, k, v: ``[T, heads, head dim]``.
        sequences: of the T tokens.

    Returns:
        ``[T, heads, head dim]``; of slack something finite.

    Raises:
        ValueError: an unknown backend.
        BackendError: the requested backend cannot run here.
    """
    return _FUNCTIONS[choose_backend(q, sequences.backend)](q, k, v, sequences)


def choose_backend(q: Tensor, requested: str = "auto") -> str:
    """The backend for such a query.

    Raises:
        ValueError: an unknown backend.
        BackendError: the requested one cannot run here; says why.
    """
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {BACKENDS}, got {requested!r}")
    for backend in BACKENDS if requested == "auto" else (requested,):
        reasons = unsupported(backend, q)
        if not reasons:
            return backend
        if requested != "auto":
            raise BackendError(f"packed attention by {backend!r} cannot run: {'; '.join(reasons)}")
    raise BackendError("no backend of packed attention can run")


def unsupported(backend: str, q: Tensor) -> list[str]:
    """Why a backend cannot serve such a query; empty if it can."""
    if backend == "sdpa":
        return []
    if not q.is_cuda:
        return [f"needs cuda tensors, got {q.device.type}"]
    reasons = []
    if q.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"takes bfloat16 and float16, got {q.dtype}")
    size = q.shape[-1]
    # flash-attn itself pads the others; torch's kernel, the same one, does not.
    if size > 256 or (size % 8 and backend != "flash_attn"):
        multiple = "" if backend == "flash_attn" else "of a multiple of 8 "
        reasons.append(f"takes heads {multiple}up to 256, got {size}")
    module, fix = _MODULES[backend]
    if not _is_there(module):
        reasons.append(f"{module} is not there{fix}")
    return reasons


_MODULES = {
    "varlen": ("torch.nn.attention.varlen", ""),
    "flash_attn": ("flash_attn", ""),
    "xformers": ("xformers", ': pip install "jepa-fast[xformers]"'),
}
"""Where a backend's kernels are, and how to get them."""


@functools.cache
def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _by_varlen(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    offsets, most = sequences.bounded_offsets()
    attended: Any = varlen_attn(q, k, v, offsets, offsets, most, most)
    return attended


def _by_flash_attn(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    offsets, most = sequences.bounded_offsets()
    return flash_attn_varlen_func(q, k, v, offsets, offsets, most, most)


def _by_xformers(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    from xformers.ops import memory_efficient_attention

    mask = _xformers_mask(sequences)
    attended: Any = memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)
    return attended[0]


def _xformers_mask(sequences: Sequences) -> Any:
    """xformers' mask of the sequences, made on their device: the host waits for nothing.

    ``BlockDiagonalMask.from_seqlens`` wants every length on the host. For this mask the kernels
    read the offsets on the device, and bounds of the lengths; offsets on the host are for causal
    masks, for keys that heads share, for ``split`` and for ``materialize``. These find an empty
    list, and fail.
    """
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask, _SeqLenInfo

    offsets, most = sequences.bounded_offsets()
    lengths = _SeqLenInfo(seqstart=offsets, max_seqlen=most, min_seqlen=0, seqstart_py=[])
    return BlockDiagonalMask(q_seqinfo=lengths, k_seqinfo=lengths)


def _by_sdpa(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """Through slots: attention alone sees padding."""
    q, k, v = sequences.unpack(torch.stack([q, k, v], 1)).unbind(2)  # [S, slots, heads, head dim]
    # A softmax over nothing is NaN: the first slot of an empty sequence stands in for its tokens.
    first = torch.arange(q.shape[1], device=q.device) == 0
    mask = (sequences.filled | first)[:, None, None]
    attended = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
    return sequences.pack(attended.transpose(1, 2))


_FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Sequences], Tensor]] = {
    "varlen": _by_varlen,
    "flash_attn": _by_flash_attn,
    "xformers": _by_xformers,
    "sdpa": _by_sdpa,
}
