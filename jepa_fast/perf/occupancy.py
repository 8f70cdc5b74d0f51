"""How many warps of a kernel a multiprocessor holds at once, from what the kernel takes.

The limits are those of the CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability"; the rounding is that of NVIDIA's `cuda_occupancy.h`, which the tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536
"""32-bit registers of a multiprocessor, and the most that one block may take."""
_REGISTER_UNIT = 256  # registers are handed to a warp in multiples of it
_PARTITIONS = 4  # a quarter of the registers and of the warps is each scheduler's own
_SHARED_UNIT = 128
SHARED_RESERVED = 1024
"""Bytes that the system takes of every block's shared memory, from compute capability 8.0 on."""
_MOST_THREADS = 1024


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor.

    Args:
        warps, blocks: resident at once.
        shared: bytes of shared memory.
        shared_block: bytes of it that one block can have.
    """

    warps: int
    blocks: int
    shared: int
    shared_block: int


LIMITS = {
    "sm_80": Limits(64, 32, 164 * 1024, 163 * 1024),
    "sm_86": Limits(48, 16, 100 * 1024, 99 * 1024),
    "sm_89": Limits(48, 24, 100 * 1024, 99 * 1024),
    "sm_90": Limits(64, 32, 228 * 1024, 227 * 1024),
    "sm_100": Limits(64, 32, 228 * 1024, 227 * 1024),
    "sm_120": Limits(48, 24, 100 * 1024, 99 * 1024),
}
"""A100; A10 and RTX 30; L40 and RTX 40; H100, H200; B200; RTX 50."""


def blocks_at_once(chip: str, threads: int, registers: int, shared: int) -> int:
    """Blocks of a kernel that a multiprocessor of `chip` holds at once; 0: it cannot be launched.

    Args:
        chip: a key of `LIMITS`.
        threads: of a block.
        registers: a thread.
        shared: bytes a block, static and dynamic.
    """
    limits = LIMITS[chip]
    if threads > _MOST_THREADS or shared > limits.shared_block:
        return 0
    warps = -(-threads // WARP)
    by_warps = limits.warps // warps
    a_warp = _round_up(max(registers, 1) * WARP, _REGISTER_UNIT)
    # Warps come in fours, one a scheduler; a block of five takes the registers of eight at its own
    # limit, yet only of five at the multiprocessor's.
    if _round_up(warps, _PARTITIONS) * a_warp > REGISTERS:
        return 0
    by_registers = REGISTERS // _PARTITIONS // a_warp * _PARTITIONS // warps
    by_shared = limits.shared // _round_up(shared + SHARED_RESERVED, _SHARED_UNIT)
    return min(limits.blocks, by_warps, by_registers, by_shared)


def occupancy(chip: str, threads: int, registers: int, shared: int) -> float:
    """Resident warps over those that a multiprocessor can hold, 0 to 1. As `blocks_at_once`."""
    blocks = blocks_at_once(chip, threads, registers, shared)
    return blocks * -(-threads // WARP) / LIMITS[chip].warps


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
