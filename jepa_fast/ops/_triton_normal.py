"""Standard normal numbers from a counter in Triton: `ops/_normal.py`, csrc/common/normal.h."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(seed, row, group, lane):
    """Four uint32 words of every lane of every group of a row.

    Args:
        seed: uint64.
        row: int64.
        group: int64, [G, 1].
        lane: int32, [1, L].
    """
    low = seed & 0xFFFFFFFF
    high = seed >> 32
    x = row.to(tl.uint32)
    y = (row >> 32).to(tl.uint32)
    z = group.to(tl.uint32)
    w = lane.to(tl.uint32)
    for _ in tl.static_range(10):
        first = x.to(tl.uint64) * 0xD2511F53
        second = z.to(tl.uint64) * 0xCD9E8D57
        x = (second >> 32).to(tl.uint32) ^ y ^ low.to(tl.uint32)
        y = second.to(tl.uint32)
        z = (first >> 32).to(tl.uint32) ^ w ^ high.to(tl.uint32)
        w = first.to(tl.uint32)
        low += 0x9E3779B9
        high += 0xBB67AE85
    return x, y, z, w


@triton.jit
def logarithm(x):
    """log(x) in float32 for normal, positive x, as in csrc/common/exponential.h."""
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    n = (bits >> 23).to(tl.float32)
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = 6.74649202e-2 * f - 1.16756158e-1
    p = p * f + 1.1888211e-1
    p = p * f - 1.24055978e-1
    p = p * f + 1.42195465e-1
    p = p * f - 1.66679952e-1
    p = p * f + 2.0002119e-1
    p = p * f - 2.50000096e-1
    p = p * f + 3.33333126e-1
    square = f * f
    rest = (f * square) * p - 0.5 * square + n * -2.12194442e-4
    return n * 0.693359375 + (f + rest)


@triton.jit
def normal_pair(radius, angle):
    """Two independent standard normal numbers from two words."""
    u = ((radius >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    r = tl.sqrt(-2.0 * logarithm(u))
    f = (angle << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10  # 2^-32
    square = f * f
    p = -4.60165786e-3 * square + 7.96800330e-2
    p = p * square - 6.45963490e-1
    sine = (p * square + 1.57079637) * f * r
    q = 9.06703295e-4 * square - 2.08615139e-2
    q = q * square + 2.53669411e-1
    q = q * square - 1.23370051
    cosine = (q * square + 1.0) * r
    sign = angle & 0x80000000
    cosine = (cosine.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    swap = (angle & 0x40000000) != 0
    return tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)


@triton.jit
def normals(seed, row, group, lane):
    """Four standard normal numbers of every lane, [G, L] each: of columns 16 apart."""
    x, y, z, w = philox(seed, row, group, lane)
    first, second = normal_pair(x, y)
    third, fourth = normal_pair(z, w)
    return first, second, third, fourth
