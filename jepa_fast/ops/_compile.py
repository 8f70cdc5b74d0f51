"""Compiling Triton kernels ahead of time, for GPUs that are not here.

A Triton file with a function `compile_cases() -> list[CompileCase]` has every case compiled for
every architecture by the tests. Cases are the shipped configs in the shapes that matter.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from jepa_fast.ops._registry import OPERATORS

ARCHITECTURES = (80, 90, 100)
"""sm_80 (A100), sm_90 (H100, H200), sm_100 (B200)."""


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one specialisation.

    Args:
        name: for messages: the operator, the config, the dtypes.
        kernel: the `@triton.jit` function.
        signature: argument name -> Triton type, `"*fp32"`, `"i32"`; `"constexpr"` for constants.
        constants: the values of the constants.
        divisible: arguments that are multiples of 16, as Triton finds for itself at a launch.
        num_warps, num_stages, fp_fusion: as at the launch.
        wide: whether its loads and stores of tensor data are all of 16 bytes.
        options: further ones of the compiler, as at the launch: `{"maxnreg": 128}`.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    fp_fusion: bool = True
    wide: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def compile(self, architecture: int) -> Any:
        """The compiled kernel; its `asm` has "ttgir", "ptx" and "cubin"."""
        import triton
        from triton.backends.compiler import GPUTarget

        names = list(self.signature)
        source = triton.compiler.ASTSource(
            fn=self.kernel,
            signature=self.signature,
            constexprs={(names.index(name),): value for name, value in self.constants.items()},
            attrs={
                (names.index(name),): [["tt.divisibility", 16]]
                for name in names
                if name in self.divisible
            },
        )
        return triton.compile(
            source,
            target=GPUTarget("cuda", architecture, 32),
            options={
                "num_warps": self.num_warps,
                "num_stages": self.num_stages,
                "enable_fp_fusion": self.fp_fusion,
                **self.options,
            },
        )


def triton_modules() -> list[ModuleType]:
    """The Triton files of all operators that have one."""
    names = {
        operator.backends["triton"].function.partition(":")[0]
        for operator in OPERATORS.values()
        if "triton" in operator.backends
    }
    return [importlib.import_module(name) for name in sorted(names)]


def all_cases() -> list[CompileCase]:
    """The cases of every operator that has a Triton kernel."""
    return [case for module in triton_modules() for case in module.compile_cases()]
