"""What Triton kernels do to an element of a parameter, to the last bit as csrc/common does it.

Interpolation (csrc/common/ema_update.h) and stochastic rounding (csrc/common/rounding.h).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def interpolated(old, toward, near_toward, keep, move):
    """`keep * old + move * toward` from the nearer end, so that weights 1 and 0 and equal ends are
    exact.

    Args:
        near_toward: whether keep <= 0.5.
        keep, move: the weights, which sum up to 1.
    """
    step = toward - old
    return tl.where(near_toward, toward - keep * step, old + move * step)


@triton.jit
def mix(x):
    """A step of splitmix64, as in csrc/common/rounding.h."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def random_bits(stream, element):
    """32 bits for each element: two share a mixed number."""
    pair = mix(stream + (element >> 1).to(tl.uint64))
    return tl.where(element % 2 == 0, pair, pair >> 32).to(tl.uint32)


@triton.jit
def rounded(x, random, DTYPE: tl.constexpr):
    """`x`, in float32, in a narrow dtype; as `_rounding.round_stochastically`."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if DTYPE == tl.bfloat16:
        near = ((bits + (random & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        near = ((bits + (random & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        steps = tl.minimum(tl.abs(x), 1.0) * 16777216.0
        whole = steps.to(tl.int32).to(tl.float32)
        threshold = (random >> 8).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)
        up = (steps - whole > threshold).to(tl.float32)
        small = (whole + up) * (1.0 / 16777216.0)
        near = tl.where(magnitude < 0x38800000, tl.where(x < 0, -small, small), near)
    return tl.where(magnitude < 0x7F800000, near, x).to(DTYPE)
