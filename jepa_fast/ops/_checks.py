"""Argument checks that operators share. Each error says argument, expected, got, and the fix.

All but `check_index_range` and `check_finite` look at metadata alone, so they run under
`torch.compile` too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from jepa_fast._arguments import switched_on

INDEX_DTYPES = (torch.int32, torch.int64)
_DTYPE = operator.attrgetter("dtype")


KERNEL_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
"""What kernels take; the references take whatever PyTorch does."""
FLOAT32_KERNEL_DTYPES = KERNEL_DTYPES - {torch.float64}
"""What those take that compute in float32."""


def only_kernel_dtypes(*tensors: Tensor) -> list[str]:
    """Why kernels cannot take tensors of these dtypes, for a backend's `unsupported`."""
    unknown = set(map(_DTYPE, tensors)) - KERNEL_DTYPES
    if not unknown:
        return []
    names = ", ".join(sorted(map(str, unknown)))
    return [f"takes float32, float64, bfloat16 and float16, got {names}"]


def only_float32_kernel_dtypes(*tensors: Tensor) -> list[str]:
    """As `only_kernel_dtypes`, for kernels that compute in float32 whatever they are given."""
    others = set(map(_DTYPE, tensors)) - FLOAT32_KERNEL_DTYPES
    return [f"computes in float32, got {dtype}" for dtype in sorted(others, key=str)]


def no_wrong_products(tensor: Tensor) -> list[str]:
    """Why Triton's kernels cannot multiply matrices of this dtype there, for `unsupported`."""
    if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu":
        return ["products of bfloat16 are wrong in Triton's interpreter"]
    return []


def check_tensor(op: str, argument: str, value: object) -> None:
    """Raises TypeError if `value` is not a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(value).__name__}")


def check_floating(op: str, argument: str, tensor: Tensor) -> None:
    """Raises TypeError if `tensor` is not a tensor of a floating dtype."""
    check_tensor(op, argument, tensor)
    if not tensor.is_floating_point():
        raise TypeError(
            f"{op}: {argument} must be of a floating dtype, got {tensor.dtype}; use .float()"
        )


def check_vectors(op: str, argument: str, tensor: Tensor) -> None:
    """Raises TypeError if `tensor` is not a dense tensor of a floating dtype to compute with."""
    check_floating(op, argument, tensor)
    check_dense(op, argument, tensor)
    if tensor.dtype.itemsize == 1:
        raise TypeError(
            f"{op}: {argument} must be in float32, float64, bfloat16 or float16, got "
            f"{tensor.dtype}; use .float(), times its scale"
        )


def check_dense(op: str, argument: str, tensor: Tensor) -> None:
    """Raises TypeError if `tensor` is sparse, nested or the like."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {argument} must be dense, got {tensor.layout}; use .to_dense()")
    if tensor.is_nested:  # which may be strided, too
        raise TypeError(
            f"{op}: {argument} must be dense, got a nested one; use .to_padded_tensor() and a mask"
        )


def check_integer(op: str, argument: str, value: object) -> None:
    """Raises TypeError if `value` is no integer."""
    if not isinstance(value, Integral):
        raise TypeError(f"{op}: {argument} must be an integer, got {value!r}")


def check_flag(op: str, argument: str, value: object) -> None:
    """Raises TypeError if `value` is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {argument} must be True or False, got {value!r}; use bool()")


def number_tensor(op: str, argument: str, number: object, most: float) -> Tensor:
    """A real number (also numpy's) in [0, most] as a 0-dim float64 tensor on the CPU.

    Raises:
        TypeError: it is none.
        ValueError: it is out of range.
    """
    if not isinstance(number, Real):
        raise TypeError(
            f"{op}: {argument} must be a real number or a tensor, got {type(number).__name__}"
        )
    value = float(number)
    if not 0.0 <= value <= most:
        interval = "0 or more" if most == math.inf else f"[0, {most:g}]"
        raise ValueError(f"{op}: {argument} must be in {interval}, got {number}")
    if torch.compiler.is_compiling():
        # torch.tensor(value) would be compiled anew for every value.
        return torch.ones((), dtype=torch.float64, device="cpu") * value
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def check_number(op: str, argument: str, value: object, learned: str = "") -> None:
    """Raises TypeError if `value` is no number. A tensor, too: it would silently take no gradient.

    Args:
        learned: what the caller can do instead of passing a tensor that takes gradients.
    """
    if not isinstance(value, (float, int)) and not isinstance(value, Real):
        fix = ""
        if isinstance(value, Tensor):
            fix = f"; it takes no gradient: pass float({argument})"
            fix += f", or {learned}" if learned else ""
        raise TypeError(f"{op}: {argument} must be a number, got {type(value).__name__}{fix}")


def check_positive(op: str, argument: str, value: float, learned: str = "") -> None:
    """Raises unless `value` is a positive and finite number.

    Args:
        learned: as in `check_number`.

    Raises:
        TypeError: it is no number.
        ValueError: it is not positive and finite.
    """
    check_number(op, argument, value, learned)
    if not 0 < value < math.inf:
        raise ValueError(f"{op}: {argument} must be positive and finite, got {value}")


def check_dim(
    op: str, argument: str, tensor: Tensor, dims: int | Collection[int], shape: str
) -> None:
    """Raises if `tensor` has not one of the numbers of dimensions that the named `shape` has."""
    check_tensor(op, argument, tensor)
    allowed = (dims,) if isinstance(dims, int) else dims
    if tensor.ndim not in allowed:
        raise ValueError(f"{op}: {argument} must be {shape}, got shape {list(tensor.shape)}")


def check_index(
    op: str, argument: str, index: Tensor, dims: int | Collection[int], shape: str
) -> None:
    """Raises if `index` is not an int32 or int64 tensor of the named `shape`."""
    check_dim(op, argument, index, dims, shape)
    if index.dtype not in INDEX_DTYPES:
        fix = "turn a mask into indices with mask.nonzero()"
        raise TypeError(
            f"{op}: {argument} must be int32 or int64, got {index.dtype}; "
            f"{fix if index.dtype == torch.bool else 'use .long()'}"
        )


def check_same_size(
    op: str, first: str, a: Tensor, a_dim: int, second: str, b: Tensor, b_dim: int
) -> None:
    """Raises ValueError if two dimensions that must agree differ."""
    if a.shape[a_dim] != b.shape[b_dim]:
        raise ValueError(
            f"{op}: {first}.shape[{a_dim}] and {second}.shape[{b_dim}] must be equal, "
            f"got {first} {list(a.shape)} and {second} {list(b.shape)}"
        )


def check_choice(op: str, argument: str, value: str, choices: Collection[str]) -> None:
    """Raises ValueError if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {argument} must be one of {tuple(choices)}, got {value!r}")


def check_index_range(op: str, argument: str, index: Tensor, size: int) -> None:
    """Raises ValueError if an index is outside [0, size). Not for tracing: reads the values, as
    `reads_values` says.
    """
    if index.numel() == 0 or not reads_values(index):
        return
    low, high = (int(value) for value in torch.aminmax(index))
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise ValueError(f"{op}: {argument} must be in [0, {size}), got {wrong}")


def check_finite_target(op: str, target: Tensor, nll: Tensor) -> None:
    """Raises ValueError for NaN and infinity in target [T, D], on a CPU: a GPU is not waited for.

    Looks for them only where nll [T], made of it, is not finite.
    """
    if nll.device.type != "cpu" or bool(nll.isfinite().all()):
        return
    bad = (~target.isfinite()).any(-1).nonzero()
    if len(bad) > 0:
        raise ValueError(
            f"{op}: target must be finite, got NaN or infinity for {len(bad)} of {len(target)} "
            f"tokens, the first of them token {int(bad[0])}"
        )


def check_mask(op: str, argument: str, mask: Tensor, shape: Sequence[int]) -> None:
    """Raises TypeError unless a mask is a dense bool tensor, ValueError for another shape."""
    check_tensor(op, argument, mask)
    check_dense(op, argument, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: {argument} must be bool, got {mask.dtype}; use .bool()")
    if mask.shape != torch.Size(shape):
        raise ValueError(f"{op}: {argument} must have shape {list(shape)}, got {list(mask.shape)}")


def may_be_read(tensor: Tensor) -> bool:
    """Whether Python may ask for the tensor's values: it is not traced, fake, mapped or on meta."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not tensor.is_meta
    )


def may_be_checked(tensor: Tensor) -> bool:
    """Whether checks read such a tensor's values: both `may_be_read` and `reads_values` say so."""
    return may_be_read(tensor) and reads_values(tensor)


def check_finite(op: str, argument: str, tensor: Tensor) -> None:
    """Raises ValueError if an element is NaN or infinite, of a tensor that `may_be_checked`."""
    if not may_be_checked(tensor):
        return
    bad = ~tensor.isfinite()
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: {argument} must be finite, got {tensor[tuple(place)].item()} at {place}"
        )


def reads_values(tensor: Tensor) -> bool:
    """Whether checks read the values of such a tensor.

    On a GPU that would wait for the device, so there they do with `JEPA_FAST_DEBUG=1` only.
    """
    if tensor.is_cuda:
        return switched_on("JEPA_FAST_DEBUG")
    return tensor.device.type != "meta"
