"""The audit of one Triton kernel, anybody's: `jepa_fast.perf.audit`.

    from jepa_fast.perf import Cost, Launch, audit

    report = audit(
        my_kernel,
        {"x": "*fp32:16", "out": "*fp32:16", "n": "i32"},
        [{"BLOCK": 1024, "num_warps": 4}, {"BLOCK": 2048, "num_warps": 8}],
        launch=Launch(
            grid=lambda config: (-(-5000 // config["BLOCK"]),),
            arguments={"x": torch.ones(5000), "out": torch.empty(5000), "n": 5000},
            minimum=Cost(read=20000, written=20000),
        ),
    )
    print(report)
    report.compare("baseline.json")  # a list of findings, empty if nothing got worse

`examples/audit_kernel.py` is a whole file of it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa_fast.ops._compile import CompileCase
from jepa_fast.perf import interpreted, machine_code
from jepa_fast.perf.audit_report import CallTraffic, CompiledKernel, Report
from jepa_fast.perf.errors import BuildFailed
from jepa_fast.perf.machine_code import Code
from jepa_fast.perf.occupancy import LIMITS, WARP, occupancy
from jepa_fast.perf.race import Cost

TARGETS = ("sm_80", "sm_90", "sm_100")
"""A100; H100 and H200; B200."""

Config = Mapping[str, Any]

_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")
_TYPE = re.compile(
    r"(?P<type>\*?k?(?:i1|i8|i16|i32|i64|u1|u8|u16|u32|u64|fp16|bf16|fp32|fp64|"
    r"fp8e4nv|fp8e4b8|fp8e4b15|fp8e5|fp8e5b16)|tensordesc<.+>)(?P<hint>:16)?"
)


@dataclass(frozen=True)
class Launch:
    """A launch for the interpreter to count the traffic of.

    Args:
        grid: numbers of programs, one to three; or a function from a config to them.
        arguments: CPU tensors and numbers by the kernel's names of them, without the constants.
            Sizes that take several programs, and that no block divides, show most; the interpreter
            takes about a second a million elements.
        minimum: bytes that the work has to read and write, for the report to show beside.
    """

    grid: tuple[int, ...] | Callable[[Config], tuple[int, ...]]
    arguments: Mapping[str, Any]
    minimum: Cost | None = None


def audit(
    kernel: Any,
    signature: Mapping[str, str],
    configs: Sequence[Config],
    targets: Sequence[str] = TARGETS,
    launch: Launch | None = None,
) -> Report:
    """What the compiler, and the interpreter, can prove of a Triton kernel without a GPU.

    Args:
        kernel: a function under `@triton.jit`; of one under `@triton.autotune`, its `.fn`.
        signature: Triton's type of every argument that is no constant, by name, as Triton's own
            ahead-of-time compiler takes it: `"*fp32"` a pointer, `"i32"` an integer; with `":16"`
            (`"*fp32:16"`) where the value is a multiple of 16, which a launch finds out by itself,
            and which wide loads depend on: tensors' addresses are, as are most strides.
        configs: of each the values of the constants by name, and the options `num_warps`,
            `num_stages`, `num_ctas`, `maxnreg`, `enable_fp_fusion` where they are not Triton's own.
        targets: chips to compile for.
        launch: also count the traffic of one launch in each config. The kernel's file is imported
            anew for that, in another process: it must be a file, and if it is the script that calls
            `audit`, the call must stand below `if __name__ == "__main__":`.

    Returns:
        Registers, spills, shared memory, occupancy and the mix of instructions of every config on
        every chip, and the traffic of every config, without `launch` None. Deterministic.

    Raises:
        TypeError: `kernel` is no function under `@triton.jit`, or an argument has another type.
        ValueError: arguments missing from `signature` and `configs` or unknown to the kernel; a
            type or chip unknown; no configs, or two that are the same; a kernel without a file.
        BuildFailed: the kernel does not compile, or does not run in the interpreter.
    """
    cases = _cases(kernel, signature, configs)
    _check_targets(targets)
    traffic = None
    if launch is not None:  # first: its mistakes show sooner
        grids = _check_launch(kernel, launch, signature, configs)
        names = [case.name for case in cases]
        traffic = _traffic(kernel, launch, names, grids, [case.constants for case in cases])
    return Report(versions(), compile_all(cases, targets), traffic)


def compile_all(cases: Sequence[CompileCase], targets: Sequence[str]) -> list[CompiledKernel]:
    """Every case for every chip.

    Raises:
        BuildFailed: one does not compile, or cannot be read.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise BuildFailed("TRITON_INTERPRET=1 keeps Triton from compiling: run without it")
    both = [(case, target) for case in cases for target in targets]
    # Reading takes longer than compiling, and is another process's work.
    scratch = tempfile.TemporaryDirectory(prefix="jepa_fast_audit_")
    with scratch as folder, ThreadPoolExecutor(max_workers=2) as readers:
        files = [Path(folder, f"{i}.cubin") for i in range(len(both))]
        reading = [
            readers.submit(_read, case, target, _compile(case, target, file), file)
            for (case, target), file in zip(both, files, strict=True)
        ]
        return [each.result() for each in reading]


def _compile(case: CompileCase, target: str, file: Path) -> Any:
    try:
        compiled = case.compile(int(target.removeprefix("sm_")))
    except Exception as error:  # Triton's errors have no common class
        raise BuildFailed(f"{case.name} does not compile for {target}: {error}") from error
    file.write_bytes(compiled.asm["cubin"])
    return compiled.metadata


def _read(case: CompileCase, target: str, metadata: Any, file: Path) -> CompiledKernel:
    (code,) = machine_code.read(file)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    config = {name: _plain(value) for name, value in {**case.constants, **options}.items()}
    threads = WARP * metadata.num_warps  # as compiled: specialised warps come on top
    shared = metadata.shared + code.resources.shared
    return described(code, case.name, metadata.name, "triton", config, threads, shared)


def described(
    code: Code,
    name: str,
    kernel: str,
    compiler: str,
    config: Mapping[str, Any],
    threads: int | None,
    shared: int,
) -> CompiledKernel:
    """A kernel as the report has it, for the chip of `code`."""
    taken = code.resources
    fitting = None
    if threads is not None and code.chip in LIMITS:
        fitting = occupancy(code.chip, threads, taken.registers, shared)
    return CompiledKernel(
        name,
        kernel,
        code.chip,
        compiler,
        config,
        threads,
        taken.registers,
        taken.stack,
        taken.local,
        shared,
        fitting,
        code.instructions,
    )


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def versions() -> dict[str, str]:
    """Of what compiles and reads Triton's kernels."""
    import triton

    import jepa_fast

    found = {"jepa_fast": jepa_fast.__version__, "triton": triton.__version__}
    for name in ("ptxas", "ptxas_blackwell", "cuobjdump"):
        try:
            found[name] = getattr(triton.knobs.nvidia, name).version
        except (AttributeError, RuntimeError):  # a Triton built without it
            found[name] = "not in this Triton"
    return found


def _cases(
    kernel: Any, signature: Mapping[str, str], configs: Sequence[Config]
) -> list[CompileCase]:
    from triton.runtime.jit import JITFunction

    if type(kernel).__name__ == "InterpretedFunction":  # its module needs more than is here
        raise TypeError(
            "audit: kernel is interpreted, and cannot be compiled: run without TRITON_INTERPRET=1. "
            "Where that is not set, the kernel's file calls audit() as it is imported: put that "
            'below `if __name__ == "__main__":`'
        )
    if not isinstance(kernel, JITFunction):
        raise TypeError(
            f"audit: kernel must be a function under @triton.jit, got {type(kernel).__name__}; of "
            f"an autotuned one give its .fn"
        )
    if not configs:
        raise ValueError("audit: configs must hold at least one config, got none: [{}] will do")
    types, divisible = _types(signature)
    cases = [_case(kernel, types, divisible, config) for config in configs]
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"audit: configs must differ from each other, got {', '.join(names)}")
    return cases


def _types(signature: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Types without hints, and the names of those with ":16"."""
    types, divisible = {}, []
    for name, text in signature.items():
        match = _TYPE.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(
                f"audit: signature[{name!r}] must be a type of Triton's such as '*fp32:16' or "
                f"'i32', got {text!r}; constants belong into configs"
            )
        types[name] = match["type"]
        if match["hint"]:
            divisible.append(name)
    return types, tuple(divisible)


def _case(
    kernel: Any, types: Mapping[str, str], divisible: tuple[str, ...], config: Config
) -> CompileCase:
    options = {name: value for name, value in config.items() if name in _OPTIONS}
    constants = {name: value for name, value in config.items() if name not in _OPTIONS}
    name = " ".join([kernel.fn.__name__, *(f"{key}={value}" for key, value in config.items())])
    unknown = [each for each in [*types, *constants] if each not in kernel.arg_names]
    missing = [each for each in kernel.arg_names if each not in types and each not in constants]
    twice = [each for each in constants if each in types]
    if unknown or missing or twice:
        wrong = {"unknown": unknown, "missing": missing, "given in both": twice}
        told = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
        raise ValueError(
            f"audit: signature and config together must give each of {name.split()[0]}'s "
            f"arguments ({', '.join(kernel.arg_names)}) once, got {told}"
        )
    return CompileCase(
        name=name,
        kernel=kernel,
        # In the kernel's order, by which the compiler counts.
        signature={each: types.get(each, "constexpr") for each in kernel.arg_names},
        constants=constants,
        divisible=divisible,
        num_warps=options.pop("num_warps", 4),
        num_stages=options.pop("num_stages", 3),
        fp_fusion=options.pop("enable_fp_fusion", True),
        options=options,
    )


def _check_targets(targets: Sequence[str]) -> None:
    unknown = [target for target in targets if target not in LIMITS]
    if unknown or isinstance(targets, str) or not targets:
        raise ValueError(
            f"audit: targets must be a list of some of {', '.join(LIMITS)}, got {targets!r}"
        )


def _check_launch(
    kernel: Any, launch: Launch, signature: Mapping[str, str], configs: Sequence[Config]
) -> list[tuple[int, ...]]:
    """Checks the launch; gives the grid of every config."""
    import torch

    if not isinstance(launch, Launch):
        raise TypeError(f"audit: launch must be a Launch, got {type(launch).__name__}")
    if set(launch.arguments) != set(signature):
        raise ValueError(
            f"audit: launch.arguments must be those of the signature, {', '.join(signature)}; got "
            f"{', '.join(launch.arguments) or 'none'}"
        )
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            raise ValueError(
                f"audit: launch.arguments[{name!r}] must be on the CPU, got {value.device}"
            )
        if not isinstance(value, (torch.Tensor, int, float)):
            raise TypeError(
                f"audit: launch.arguments[{name!r}] must be a tensor or a number, got "
                f"{type(value).__name__}"
            )
    grids = [launch.grid(config) if callable(launch.grid) else launch.grid for config in configs]
    for grid in grids:
        if (
            not isinstance(grid, tuple)
            or not 1 <= len(grid) <= 3
            or not all(isinstance(each, int) and each > 0 for each in grid)
        ):
            raise ValueError(
                f"audit: launch.grid must be one to three positive integers, such as (4,), or a "
                f"function from a config to them, got {grid!r}"
            )
    return grids


def _traffic(
    kernel: Any,
    launch: Launch,
    names: Sequence[str],
    grids: Sequence[tuple[int, ...]],
    constants: Sequence[Config],
) -> list[CallTraffic]:
    launches = [
        {"name": name, "grid": grid, "constants": dict(values)}
        for name, grid, values in zip(names, grids, constants, strict=True)
    ]
    calls = interpreted.kernel_traffic(kernel, launches, launch.arguments)
    least = launch.minimum
    if least is None:
        return calls
    return [
        CallTraffic(call.name, call.kernels, call.torch_operations, least.read, least.written)
        for call in calls
    ]
