"""Launches of Triton kernels that work on rows, and the compile cases that follow from them.

Every launch goes through `launch`; `recorded_cases` calls launchers without a GPU and turns what
they would have launched into `CompileCase`s, so that what is tested is what is launched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_fast.ops import _configs
from jepa_fast.ops._compile import CompileCase

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}
_ALIGNED = 16
_recorded: list[CompileCase] | None = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Tensor | int | float | None],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int = 3,
    **options: int,
) -> None:
    """Launches a kernel on the device of its first argument; nothing where the grid is empty.

    Args:
        kernel: a `@triton.jit` function.
        grid: of programs.
        arguments: by the kernel's names, tensors and numbers; None where one is left out.
        constants: the kernel's `tl.constexpr` arguments.
        num_warps: of a program.
        num_stages: how many iterations of its loops are under way at once.
        options: further ones of the compiler: `maxnreg`.
    """
    if _recorded is not None:
        case = _case(kernel, arguments, constants, num_warps)
        _recorded.append(replace(case, num_stages=num_stages, options=options))
        return
    if 0 in grid:
        return
    tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device_of(tensor):
        kernel[grid](
            **arguments,
            **constants,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=False,
            **options,
        )


def most_registers(config: _configs.Config) -> dict[str, int]:
    """The compiler's option for `registers` of a config, the most of a thread, where it has that.

    Left alone, ptxas sometimes spills registers for the sake of occupancy.
    """
    return {"maxnreg": config["registers"]} if "registers" in config else {}


def loop_bound(number: int) -> Any:
    """A loop's bound that is known at the launch alone, as an argument of the kernel.

    The interpreter of Triton 3.6 takes no loops to numbers, only to constants.
    """
    return tl.constexpr(number) if triton.knobs.runtime.interpret else number


def row_warps(block: int, *tensors: Tensor) -> int:
    """How many warps move `block` elements of the narrowest of the tensors, 16 bytes a thread."""
    item = min(tensor.dtype.itemsize for tensor in tensors)
    return min(8, max(1, block * item // (32 * _ALIGNED)))


def recorded_cases(
    folder: Path, calls: dict[str, Callable[[], object]], narrow: frozenset[str] = frozenset()
) -> list[CompileCase]:
    """What calls of launchers launch, for every GPU whose configs are shipped.

    Args:
        folder: of the configs.
        calls: by name, `"gather_patches-bfloat16"`, launchers with arguments on the CPU, of which
            shapes, strides and alignment count; a case's name is the operator, the GPU, the rest
            and, where a call launches several kernels, the kernel, from its second launch on
            with a number.
        narrow: names of calls whose rows do not allow 16 bytes at once.
    """
    found = []
    for gpu in _configs.shipped(folder):
        for name, call in calls.items():
            operator, _, rest = name.partition("-")
            with _configs.pretend(gpu), _recording() as cases:
                call()
            launches: Counter[str] = Counter()
            for case in cases:
                launches[case.name] += 1
                kernel = f"-{case.name}" if len(cases) > 1 else ""
                number = f"-{launches[case.name]}" if launches[case.name] > 1 else ""
                case_name = f"{operator}-{gpu}-{rest}{kernel}{number}"
                found.append(replace(case, name=case_name, wide=name not in narrow))
    return found


def distinct(cases: Iterable[CompileCase], known: Iterable[CompileCase] = ()) -> list[CompileCase]:
    """The cases without those that compile to what another before them does, or one of `known`."""
    seen = {_compiled_from(case) for case in known}
    found = []
    for case in cases:
        key = _compiled_from(case)
        if key not in seen:
            seen.add(key)
            found.append(case)
    return found


def _compiled_from(case: CompileCase) -> str:
    return repr(replace(case, name=case.kernel.fn.__name__, kernel=None))


@contextmanager
def _recording() -> Iterator[list[CompileCase]]:
    global _recorded
    cases: list[CompileCase] = []
    _recorded = cases
    try:
        yield cases
    finally:
        _recorded = None


def _case(
    kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], num_warps: int
) -> CompileCase:
    """As Triton specialises the launch: 1 is a constant, 16s and what they divide are known, other
    numbers not.

    A kernel declares what is an address as `tl.int64`: those of a CPU may fit into 32 bits.
    """
    declared = kernel.fn.__annotations__
    any_number = getattr(kernel, "do_not_specialize", None) or ()  # the interpreter has none
    known = {
        name: value
        for name, value in arguments.items()
        if value is None
        or (type(value) is int and value == 1 and name not in (*declared, *any_number))
    }
    constants = {**known, **constants}
    signature, divisible = {}, []
    for name, value in arguments.items():
        if name in known:
            signature[name], aligned = "constexpr", False
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            aligned = value.data_ptr() % _ALIGNED == 0
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            is_wide = value >= 2**31 or declared.get(name) == "tl.int64"
            signature[name] = "i64" if is_wide else "i32"
            aligned = value % _ALIGNED == 0 and name not in any_number
        if aligned:
            divisible.append(name)
    signature |= dict.fromkeys(constants, "constexpr")
    return CompileCase(
        name=kernel.fn.__name__,
        kernel=kernel,
        signature={name: signature[name] for name in kernel.arg_names},  # compiled by position
        constants=constants,
        divisible=tuple(divisible),
        num_warps=num_warps,
        fp_fusion=False,
    )
