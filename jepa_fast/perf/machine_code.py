"""What NVIDIA's `cuobjdump` reads from compiled kernels: resources, and the mix of instructions.

A file is a cubin (one chip) or a library with several. Global memory counts loads and stores by the
bytes that a thread moves at once; those through the tensor memory accelerator (TMA) and atomics are
counted apart. Generic accesses (`LD`, `ST`), whose memory the compiler could not tell, count as
global: in these kernels they are.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from jepa_fast.perf.errors import BuildFailed
from jepa_fast.perf.occupancy import SHARED_RESERVED

Counts = Mapping[str, int]
Widths = Mapping[int, int]
"""Bytes that a thread moves at once -> how many instructions do."""

_CHIP = re.compile(r"^arch = (sm_\d+)|^\s*code for (sm_\d+)", re.MULTILINE)
_FUNCTION = re.compile(r"^\s*Function\s*:?\s*([^\s:]+)")
# `        /*0330*/              @!P0 LDG.E.128 R4, [R2.64] ;`
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_WIDTHS = {"U8": 1, "S8": 1, "8": 1, "U16": 2, "S16": 2, "16": 2, "64": 8, "128": 16, "256": 32}
_LOADS = ("LDG", "LDGSTS", "LD")
_STORES = ("STG", "ST")
_ATOMICS = ("ATOM", "ATOMG", "RED", "REDG")


@dataclass(frozen=True)
class Resources:
    """What a kernel takes.

    Args:
        registers: a thread.
        stack, local: bytes a thread, of memory behind registers that did not suffice.
        shared: bytes a block, known at compile time.
    """

    registers: int
    stack: int
    shared: int
    local: int


@dataclass(frozen=True)
class Instructions:
    """How many instructions there are, of all and of the kinds that matter.

    Args:
        total: all.
        tensor_core: matrix products by opcode: `{"HMMA": 16}`, on sm_90 also `HGMMA`, on sm_100
            `UTCHMMA` and so on.
        loads, stores: of global memory, by width.
        tma: bulk copies by opcode: `UTMALDG`, `UTMASTG`, `UBLKCP`, ...
        local_loads, local_stores: of spilled registers, or of arrays that are not in registers.
        atomics: on global memory.
    """

    total: int = 0
    tensor_core: Counts = field(default_factory=dict)
    loads: Widths = field(default_factory=dict)
    stores: Widths = field(default_factory=dict)
    tma: Counts = field(default_factory=dict)
    local_loads: int = 0
    local_stores: int = 0
    atomics: int = 0


@dataclass(frozen=True)
class Code:
    """One kernel for one chip, as it lies in a file.

    Args:
        chip: `"sm_90"`.
        symbol: the kernel's name in the file, mangled where C++ made it.
        threads: the most that a block may have, by the kernel's launch bounds; None: none, or not
            asked for.
    """

    chip: str
    symbol: str
    resources: Resources
    instructions: Instructions
    threads: int | None


def read(file: Path, *, launch_bounds: bool = False) -> list[Code]:
    """Every kernel in a cubin or a library, for every chip in it; `launch_bounds`: with `threads`.

    Raises:
        BuildFailed: no cuobjdump is here, or none that is can read the file.
    """
    resources = read_resources(cuobjdump(file, "-res-usage"))
    instructions = read_instructions(cuobjdump(file, "-sass"))
    threads = read_threads(cuobjdump(file, "-elf")) if launch_bounds else {}
    # A cubin is of one chip, and only -sass says which.
    chips = {chip: chip if (chip, symbol) in resources else "" for chip, symbol in instructions}
    try:
        return [
            Code(
                chip,
                symbol,
                _of_the_kernel(chip, resources[chips[chip], symbol]),
                mix,
                threads.get((chips[chip], symbol)),
            )
            for (chip, symbol), mix in instructions.items()
        ]
    except KeyError as error:
        raise BuildFailed(f"cuobjdump -res-usage does not list {error} of {file}") from error


def _of_the_kernel(chip: str, taken: Resources) -> Resources:
    """Without the shared memory that is the system's: from sm_90 on, ptxas lays it out first."""
    if int(chip.removeprefix("sm_")) >= 90 and taken.shared >= SHARED_RESERVED:
        return replace(taken, shared=taken.shared - SHARED_RESERVED)
    return taken


def tools() -> list[str]:
    """The copies of cuobjdump here: the one in Triton's wheel first, as it knows Triton's chips."""
    places = []
    try:
        import triton

        places.append(str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"))
    except ImportError:  # the CUDA toolkit's will do
        pass
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    places += ["cuobjdump", f"{home}/bin/cuobjdump"]
    return list(dict.fromkeys(found for place in places if (found := shutil.which(place))))


def cuobjdump(file: Path, *options: str) -> str:
    """What cuobjdump prints of `file`, by the first copy that can read it. Raises as `read`."""
    failures = []
    for tool in tools():
        done = subprocess.run(
            [tool, *options, str(file)], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return done.stdout
        failures.append(f"{tool}: {(done.stderr or done.stdout).strip()}")
    if failures:
        raise BuildFailed(f"no cuobjdump here can read {file}:\n" + "\n".join(failures))
    raise BuildFailed(
        "reading compiled kernels needs cuobjdump, which this Triton does not bring: install "
        "NVIDIA's CUDA toolkit, or a Triton from PyPI"
    )


def read_resources(text: str) -> dict[tuple[str, str], Resources]:
    """From `cuobjdump -res-usage`: by chip (empty for a cubin) and symbol."""
    found = {}
    for chip, symbol, lines in _by_function(text):
        for line in lines:
            if "REG:" in line:
                usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
                found[chip, symbol] = Resources(
                    usage["REG"], usage["STACK"], usage["SHARED"], usage["LOCAL"]
                )
    return found


def read_instructions(text: str) -> dict[tuple[str, str], Instructions]:
    """From `cuobjdump -sass`: by chip and symbol."""
    return {(chip, symbol): count_instructions(lines) for chip, symbol, lines in _by_function(text)}


def count_instructions(lines: Iterable[str]) -> Instructions:
    """The mix in the lines of one function's SASS."""
    total = local_loads = local_stores = atomics = 0
    tensor_core: Counter[str] = Counter()
    tma: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        total += 1
        opcode, *modifiers = match[1].split(".")
        if opcode.endswith("MMA"):
            tensor_core[opcode] += 1
        elif opcode.startswith(("UTMA", "UBLK")):
            tma[opcode] += 1
        elif opcode in _LOADS:
            loads[_width(modifiers)] += 1
        elif opcode in _STORES:
            stores[_width(modifiers)] += 1
        elif opcode == "LDL":
            local_loads += 1
        elif opcode == "STL":
            local_stores += 1
        elif opcode in _ATOMICS:
            atomics += 1
    return Instructions(
        total,
        dict(sorted(tensor_core.items())),
        dict(sorted(loads.items())),
        dict(sorted(stores.items())),
        dict(sorted(tma.items())),
        local_loads,
        local_stores,
        atomics,
    )


def _width(modifiers: list[str]) -> int:
    # Not `"LTC128B"`, which is a hint for the cache.
    return next((_WIDTHS[each] for each in modifiers if each in _WIDTHS), 4)


def read_threads(text: str) -> dict[tuple[str, str], int]:
    """Launch bounds from `cuobjdump -elf`, of the kernels that have some: by chip and symbol."""
    found = {}
    chip, symbol, attribute = "", "", ""
    for line in text.splitlines():
        if match := _CHIP.match(line):
            chip = match[1] or match[2]
        elif match := re.match(r"\.nv\.info\.(\S+)$", line):
            symbol = match[1]
        elif line.startswith("."):
            symbol = ""  # another section
        elif match := re.match(r"\s*Attribute:\s*(\w+)", line):
            attribute = match[1]
        elif symbol and attribute in ("EIATTR_MAX_THREADS", "EIATTR_REQNTID"):
            sizes = re.findall(r"0x\w+", line) if "Value:" in line else []
            if sizes:  # x, y, z
                found[chip, symbol] = math.prod(int(size, 16) for size in sizes)
    return found


def _by_function(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """(chip, symbol, lines) of every function that cuobjdump lists."""
    chip, symbol, lines = "", "", list[str]()
    for line in text.splitlines():
        new_chip, new_symbol = _CHIP.match(line), _FUNCTION.match(line)
        if new_chip is None and new_symbol is None:
            lines.append(line)
            continue
        if symbol:
            yield chip, symbol, lines
        symbol, lines = new_symbol[1] if new_symbol else "", []
        if new_chip:
            chip = new_chip[1] or new_chip[2]
    if symbol:
        yield chip, symbol, lines


def readable(symbol: str) -> str:
    """`jepa_fast::my_kernel<float>` for its mangled name: no arguments, no anonymous namespace.

    The compiler's name for an anonymous namespace holds a digest that differs from build to build.
    """
    # The C++ runtime is there: torch stands on it. c++filt need not be.
    runtime = ctypes.CDLL("libstdc++.so.6")
    demangle = runtime.__cxa_demangle
    demangle.restype = ctypes.c_void_p
    pointer = demangle(symbol.encode(), None, None, None)
    if not pointer:
        return symbol  # C's names are not mangled
    name = ctypes.string_at(pointer).decode()
    runtime.free.argtypes = [ctypes.c_void_p]
    runtime.free(pointer)
    name = re.sub(r"_GLOBAL__N__\w+::|\(anonymous namespace\)::", "", name)
    return _without_arguments(name).removeprefix("void ")


def _without_arguments(name: str) -> str:
    """Cuts the parenthesis that the name ends with."""
    depth = 0
    for position in range(len(name) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(name[position], 0)
        if name[position] == "(" and depth == 0:
            return name[:position]
        if depth == 0:
            break
    return name
