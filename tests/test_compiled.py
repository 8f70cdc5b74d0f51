"""Tier 2: every GPU kernel compiled for GPUs that are not here, and what the machine code says.

Triton kernels join through `compile_cases()` in their `triton.py`, CUDA kernels through csrc/cuda.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401  (before triton)

from jepa_fast import ops  # noqa: F401  (registers the operators)
from jepa_fast.ops import _build
from jepa_fast.ops._compile import ARCHITECTURES, CompileCase, all_cases

triton = pytest.importorskip("triton", reason="needs triton to compile its kernels")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.tier2

CASES = all_cases()
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536  # of a multiprocessor

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@functools.cache
def _compiled(case_index: int, architecture: int) -> Any:
    return CASES[case_index].compile(architecture)


@functools.cache
def _cuobjdump() -> str:
    """NVIDIA's reader of machine code; triton's wheel has one."""
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = str(bundled) if bundled.is_file() else shutil.which("cuobjdump")
    if found is None:
        pytest.skip("needs cuobjdump, which this triton does not bring")
    return found


@dataclass(frozen=True)
class Resources:
    architecture: str  # not in a cubin, which is of one
    kernel: str
    registers: int
    stack: int
    shared: int
    local: int


def _resources(file: Path) -> list[Resources]:
    """What every kernel in a cubin or a library takes, for every architecture in it."""
    text = subprocess.run(
        [_cuobjdump(), "-res-usage", str(file)], capture_output=True, text=True, check=True
    ).stdout
    found, architecture, kernel = [], "", ""
    for line in text.splitlines():
        if match := re.search(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            kernel = match[1]
        elif "REG:" in line:
            usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
            found.append(
                Resources(
                    architecture,
                    kernel,
                    usage["REG"],
                    usage["STACK"],
                    usage["SHARED"],
                    usage["LOCAL"],
                )
            )
    return found


def _access_bytes(ptx: str) -> Iterator[int]:
    """The width of every load from and store to global memory, a thread at a time."""
    for match in re.finditer(r"\b(?:ld|st)\.global(?:\.\w+(?:::\w+)*)*", ptx):
        parts = match[0].split(".")
        vector = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
        bits = next(int(p[1:]) for p in reversed(parts) if re.fullmatch(r"[bufs]\d+", p))
        yield vector * bits // 8


def _narrow_products(ttir: str) -> list[str]:
    """Products in 32 bits of values unknown at compile time that an address is made from.

    Such a product overflows silently from 2^31 elements on. A range times a constant is fine.
    """
    definitions = dict(re.findall(r"^\s*(%[\w#]+)(?::\d+)? = (.*)$", ttir, re.MULTILINE))

    def operands(definition: str) -> list[str]:
        return re.findall(r"%[\w#]+", definition.partition(" loc(")[0])

    def bounded(name: str) -> bool:
        definition = definitions.get(name)  # arguments and loop variables have none
        if definition is None:
            return False
        if re.match(r"arith\.constant|tt\.make_range", definition):
            return True
        passes = r"tt\.(splat|expand_dims|broadcast)|arith\.(addi|subi|muli|extsi|remsi|remui)"
        return bool(re.match(passes, definition)) and all(map(bounded, operands(definition)))

    def narrow_product(name: str) -> str | None:
        definition = definitions.get(name, "")
        if re.match(r"arith\.muli", definition):
            narrow = re.search(r": (?:tensor<[\dx]*x)?i32", definition)
            if narrow and not all(map(bounded, operands(definition))):
                return f"{name} = {definition}"
        passes = r"tt\.(splat|expand_dims|broadcast)|arith\.(addi|subi|muli|ext[su]i)"
        if re.match(passes, definition):
            return next(filter(None, map(narrow_product, operands(definition))), None)
        return None

    offsets = [
        operands(definition)[1]
        for definition in definitions.values()
        if definition.startswith("tt.addptr")
    ]
    return sorted({found for offset in offsets if (found := narrow_product(offset))})


@each_architecture
@each_case
def test_no_spills_and_it_fits(case: CompileCase, architecture: int, tmp_path: Path) -> None:
    compiled = _compiled(CASES.index(case), architecture)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    (usage,) = _resources(cubin)
    assert compiled.metadata.target.arch == architecture
    assert (usage.stack, usage.local) == (0, 0), "registers are spilled"
    assert usage.registers * 32 * case.num_warps <= REGISTERS
    assert compiled.metadata.shared <= SHARED_MEMORY[architecture]


@each_architecture
@pytest.mark.parametrize("case", [case for case in CASES if case.wide], ids=str)
def test_memory_is_moved_sixteen_bytes_at_once(case: CompileCase, architecture: int) -> None:
    compiled = _compiled(CASES.index(case), architecture)
    scalar = len(re.findall(r"tt\.(?:load|store) .*: !tt\.ptr", compiled.asm["ttir"]))
    narrow = [width for width in _access_bytes(compiled.asm["ptx"]) if width < 16]
    assert len(narrow) <= scalar, narrow


@each_case
def test_addresses_are_not_multiplied_in_32_bits(case: CompileCase) -> None:
    compiled = _compiled(CASES.index(case), ARCHITECTURES[0])
    assert _narrow_products(compiled.asm["ttir"]) == []


@triton.jit
def _overflowing(x, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) * stride
    fine = tl.arange(0, BLOCK) * 4
    tl.store(x + row + fine, tl.load(x + fine))


def test_the_address_rule_fires() -> None:
    case = CompileCase(
        name="overflowing",
        kernel=_overflowing,
        signature={"x": "*fp32", "stride": "i32", "BLOCK": "constexpr"},
        constants={"BLOCK": 256},
    )
    compiled = case.compile(90)
    (product,) = _narrow_products(compiled.asm["ttir"])
    assert "i32" in product
    assert set(_access_bytes(compiled.asm["ptx"])) == {4}


def test_every_triton_operator_has_cases() -> None:
    from jepa_fast.ops._registry import OPERATORS

    with_triton = {name for name, operator in OPERATORS.items() if "triton" in operator.backends}
    assert {case.name.partition("-")[0] for case in CASES} >= with_triton
    assert len({case.name for case in CASES}) == len(CASES)


def _native_kernels() -> list[Resources]:
    record = _build.Record.read()
    if record is None or "cuda" not in record.parts:
        why = record.why_not.get("cuda", "") if record else "nothing was built"
        if shutil.which("nvcc") is not None and "left it out" not in why:
            pytest.fail(f"nvcc is here, but the native library has no CUDA kernels: {why}")
        pytest.skip(f"the native library has no CUDA kernels: {why}")
    return _resources(_build.PACKAGE / _build.LIBRARY)


def test_native_cuda_kernels_do_not_spill() -> None:
    kernels = [usage for usage in _native_kernels() if "jepa_fast" in usage.kernel]
    assert {usage.architecture for usage in kernels} == {
        f"sm_{architecture}" for architecture in _build.CUDA_ARCHITECTURES
    }
    for usage in kernels:
        where = f"{usage.kernel} on {usage.architecture}"
        assert (usage.stack, usage.local) == (0, 0), f"{where} spills"


def test_native_cuda_kernels_move_sixteen_bytes_at_once() -> None:
    _native_kernels()
    library = str(_build.PACKAGE / _build.LIBRARY)
    code = subprocess.run(
        [_cuobjdump(), "-sass", "-arch", "sm_90", library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for function in code.split("Function : ")[1:]:
        name = function.split()[0]
        if "jepa_fast" in name:
            assert re.search(r"LDG\.E[\w.]*\.128", function), f"{name} has no 16-byte load"
            assert re.search(r"STG?\.E[\w.]*\.128", function), f"{name} has no 16-byte store"
