"""The Triton kernel: hundreds of tensors in one launch for each combination of dtypes.

The tensors are cut into chunks, and a table on the device holds each chunk's addresses. Addresses
of parameters do not change from step to step, so the table is made once and then found again.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_fast.ops import _configs, _memory, _triton_tables
from jepa_fast.ops._compile import CompileCase
from jepa_fast.ops._launch import TRITON_DTYPES
from jepa_fast.ops._rounding import NARROW
from jepa_fast.ops._traffic import TrafficCase
from jepa_fast.ops._triton_elements import interpolated, mix, random_bits, rounded
from jepa_fast.ops.ema_update import memory

CONFIGS = Path(__file__).parent / "configs"

Row = tuple[int, int, int, int, int]
"""Addresses of target, source and shadow (0 without), number of elements, number of the tensor.

In a table of 6 columns the last two are the chunk's first element and the tensor's number."""


@triton.jit
def ema_update_kernel(
    table,  # [chunks, COLUMNS] rows as above; of them 4 where nothing is rounded stochastically
    momentum,  # [1]
    seed,  # [1] int64, or None: round to the nearest
    TARGET: tl.constexpr,
    SOURCE: tl.constexpr,
    SHADOW: tl.constexpr,  # None without shadows
    COMPUTE: tl.constexpr,
    WIDE: tl.constexpr,  # addresses and sizes are multiples of 16
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COLUMNS: tl.constexpr = 4 if seed is None else 6
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    target = tl.load(row).to(tl.pointer_type(TARGET))
    source = tl.load(row + 1).to(tl.pointer_type(SOURCE))
    size = tl.load(row + 3).to(tl.int32)
    if WIDE:
        target = tl.multiple_of(target, 16)
        source = tl.multiple_of(source, 16)
        size = tl.multiple_of(size, 16)
    keep = tl.load(momentum).to(tl.float64)
    near_source = keep <= 0.5
    move = (1.0 - keep).to(COMPUTE)
    keep = keep.to(COMPUTE)
    if seed is not None:
        first = tl.load(row + 4)
        number = tl.load(row + 5) * 2
        drawn = mix(tl.load(seed).to(tl.uint64))
    for start in range(0, CHUNK, BLOCK):
        i = start + tl.arange(0, BLOCK)  # [BLOCK], below CHUNK: 32 bits will do
        inside = i < size
        old = tl.load(target + i, mask=inside).to(COMPUTE)
        toward = tl.load(source + i, mask=inside).to(COMPUTE)
        new = interpolated(old, toward, near_source, keep, move)
        if seed is not None and TARGET.primitive_bitwidth == 16:
            new = rounded(new, random_bits(mix(drawn + number.to(tl.uint64)), first + i), TARGET)
        new = new.to(TARGET)
        tl.store(target + i, new, mask=inside)
        if SHADOW is not None:
            shadow = tl.load(row + 2).to(tl.pointer_type(SHADOW))
            if WIDE:
                shadow = tl.multiple_of(shadow, 16)
            # By way of float32, as PyTorch does: the interpreter has no float64 to bfloat16.
            copy = new if SHADOW == tl.float64 else new.to(tl.float32)
            if seed is not None and SHADOW.primitive_bitwidth == 16:
                stream = mix(drawn + (number + 1).to(tl.uint64))
                copy = rounded(copy, random_bits(stream, first + i), SHADOW)
            tl.store(shadow + i, copy.to(SHADOW), mask=inside)


@dataclass(frozen=True)
class Kind:
    """What one launch serves.

    Args:
        target, source, shadow: the tensors' dtypes; no shadows: None.
        wide: whether all addresses and sizes are multiples of 16, so that 16 bytes can be moved at
            once throughout.
        stochastic: whether something is rounded stochastically.
    """

    target: torch.dtype
    source: torch.dtype
    shadow: torch.dtype | None
    wide: bool
    stochastic: bool = False

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.target == torch.float64 else torch.float32

    @property
    def config_key(self) -> str:
        """`"wide-float32"` and so on."""
        return f"{'wide' if self.wide else 'narrow'}-{str(self.compute).removeprefix('torch.')}"

    def constants(self, config: _configs.Config) -> dict[str, Any]:
        """The kernel's constants."""
        return {
            "TARGET": TRITON_DTYPES[self.target],
            "SOURCE": TRITON_DTYPES[self.source],
            "SHADOW": None if self.shadow is None else TRITON_DTYPES[self.shadow],
            "COMPUTE": TRITON_DTYPES[self.compute],
            "WIDE": self.wide,
            "CHUNK": config["chunk"],
            "BLOCK": config["block"],
        }


def ema_update_(
    targets: list[Tensor],
    sources: list[Tensor],
    shadows: list[Tensor],
    momentum: Tensor,
    rounding_seed: Tensor | None = None,
) -> None:
    """As `reference.ema_update_`."""
    memory.check(targets, sources, shadows, momentum)
    if not targets:
        return
    device = targets[0].device
    keep = _triton_tables.scalar(momentum, device)
    seed = None if rounding_seed is None else _triton_tables.scalar(rounding_seed, device)
    flat = _memory.Flat.of(targets, sources, shadows)
    to, by, copies = flat.lists
    with torch.cuda.device_of(targets[0]):
        for kind, rows in _by_kind(to, by, copies, seed is not None).items():
            config = _configs.lookup(CONFIGS, kind.config_key, device)
            table = _triton_tables.keep(_table(tuple(rows), kind, config["chunk"], device))
            if len(table):
                ema_update_kernel[(len(table),)](
                    table,
                    keep,
                    seed if kind.stochastic else None,
                    **kind.constants(config),
                    num_warps=config["num_warps"],
                    enable_fp_fusion=False,
                )
    torch.autograd.graph.increment_version([*to, *copies])
    flat.write_back((to, copies))


def _by_kind(
    targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor], stochastic: bool
) -> dict[Kind, list[Row]]:
    found: dict[Kind, list[Row]] = defaultdict(list)
    lists = itertools.zip_longest(targets, sources, shadows)
    for i, (target, source, shadow) in enumerate(lists):
        copy = 0 if shadow is None else shadow.data_ptr()
        row = (target.data_ptr(), source.data_ptr(), copy, target.numel(), i)
        wide = (row[0] | row[1] | row[2] | row[3]) % 16 == 0
        dtype = None if shadow is None else shadow.dtype
        narrow = stochastic and not NARROW.isdisjoint((target.dtype, dtype))
        found[Kind(target.dtype, source.dtype, dtype, wide, narrow)].append(row)
    return found


@functools.lru_cache(maxsize=64)
def _table(
    rows: tuple[Row, ...], kind: Kind, chunk: int, device: torch.device
) -> _triton_tables.Placed:
    """[chunks, 4 or 6] int64 for the device: the rows cut into chunks."""
    to, by, copy = (d.itemsize if d else 0 for d in (kind.target, kind.source, kind.shadow))
    columns = 6 if kind.stochastic else 4
    cut = [
        (target + to * i, source + by * i, shadow + copy * i, min(chunk, size - i), i, number)
        for target, source, shadow, size, number in rows
        for i in range(0, size, chunk)
    ]
    return _triton_tables.place("ema_update_", [row[:columns] for row in cut], device)


def compile_cases() -> list[CompileCase]:
    """The shipped configs, in the dtypes that training uses."""
    single, double = torch.float32, torch.float64
    half, brain = torch.float16, torch.bfloat16
    dtypes = [
        (single, single, None),
        (single, single, brain),
        (single, brain, half),
        (brain, brain, None),
        (double, double, single),
    ]
    kinds = [Kind(*three, wide) for wide in (True, False) for three in dtypes]
    kinds += [Kind(brain, brain, half, wide, stochastic=True) for wide in (True, False)]
    return [
        _case(gpu, kind, configs[kind.config_key])
        for gpu, configs in _configs.shipped(CONFIGS).items()
        for kind in kinds
        if kind.config_key in configs
    ]


def traffic_cases() -> list[TrafficCase]:
    """Tensors that share one launch: of several chunks with a tail, of one, and of none."""
    single, half, brain = torch.float32, torch.float16, torch.bfloat16
    return [
        _traffic("float32", (40_000, 16, 0), single, single),
        _traffic("float32-narrow", (10_001, 3), single, single),
        _traffic("float32-bfloat16-shadow-bfloat16", (40_000, 4_096), single, brain, brain),
        _traffic("float32-shadow-float16", (20_000,), single, single, half),
    ]


def _traffic(
    name: str,
    sizes: tuple[int, ...],
    target: torch.dtype,
    source: torch.dtype,
    shadow: torch.dtype | None = None,
) -> TrafficCase:
    targets = [torch.zeros(size, dtype=target) for size in sizes]
    sources = [torch.ones(size, dtype=source) for size in sizes]
    shadows = [torch.zeros(size, dtype=shadow) for size in sizes if shadow is not None]
    momentum = torch.tensor([0.5], dtype=torch.float64)[0]
    return TrafficCase(
        f"ema_update_-{name}",
        lambda: ema_update_(targets, sources, shadows, momentum),
        memory.cost(targets, sources, shadows),
    )


def _case(gpu: str, kind: Kind, config: _configs.Config) -> CompileCase:
    constants = kind.constants(config)
    dtypes = [str(d).removeprefix("torch.") for d in (kind.target, kind.source, kind.shadow)]
    if kind.stochastic:
        dtypes.append("stochastic")
    return CompileCase(
        name=f"ema_update_-{gpu}-{'wide' if kind.wide else 'narrow'}-{'-'.join(dtypes)}",
        kernel=ema_update_kernel,
        signature={
            "table": "*i64",
            "momentum": "*fp64",
            "seed": "*i64" if kind.stochastic else "constexpr",
            **dict.fromkeys(constants, "constexpr"),
        },
        constants=constants if kind.stochastic else {"seed": None, **constants},
        divisible=("table", "momentum", *(("seed",) if kind.stochastic else ())),
        num_warps=config["num_warps"],
        fp_fusion=False,
        wide=kind.wide,
    )
