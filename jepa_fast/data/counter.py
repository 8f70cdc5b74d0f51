"""Random numbers as pure functions of integer keys (seed, epoch, sample id, ...).

No generator carries state, so a resumed run, another number of workers or another order of
reading draws the same numbers. The mixing function is the finaliser of SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def bits(*keys: Any) -> NDArray[np.uint64]:
    """64 random bits for every entry of the keys, which broadcast (integers, arrays, tensors)."""
    state: Any = np.uint64(0)
    with np.errstate(over="ignore"):
        for key in keys:
            state = (state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * _FIRST
            state = (state ^ (state >> np.uint64(27))) * _SECOND
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def uniform(*keys: Any) -> NDArray[np.float64]:
    """Uniform in [0, 1), for every entry of the broadcast keys."""
    return (bits(*keys) >> np.uint64(11)) * 2.0**-53


def integers(high: Any, *keys: Any) -> NDArray[np.int64]:
    """Uniform integers in [0, high); `high` broadcasts with the keys."""
    return (uniform(*keys) * high).astype(np.int64)


def normal(*keys: Any) -> NDArray[np.float64]:
    """Standard normal (Box-Muller), for every entry of the broadcast keys."""
    radius = np.sqrt(-2 * np.log1p(-uniform(*keys, 0)))
    return radius * np.cos(2 * np.pi * uniform(*keys, 1))


def permutation(n: int, *keys: int) -> NDArray[np.int64]:
    """A random order of `range(n)`."""
    return np.argsort(bits(*keys, np.arange(n)), kind="stable")


def text_key(text: str) -> int:
    """A key for a string, the same in every process (unlike `hash`), in [0, 2^63)."""
    # A file name that is no UTF-8 has surrogates in their place.
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
