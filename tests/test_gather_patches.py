"""gather_patches."""

from __future__ import annotations

import torch
from samples import Sample, indices, normal

from jepa_fast import ops

OPERATORS = ("gather_patches", "gather_patches_backward")


def _sample(name: str, x: tuple[int, ...], index: tuple[int, ...], dtype=torch.int64) -> Sample:
    def make(float_dtype: torch.dtype, generator: torch.Generator):
        return (
            normal(*x, dtype=float_dtype, generator=generator),
            indices(x[1], *index, generator=generator, dtype=dtype),
        )

    return Sample(name, ops.gather_patches, OPERATORS, make)


SAMPLES = [
    _sample("one index a row", (3, 5, 4), (3, 1)),
    _sample("overlapping blocks", (2, 6, 3), (2, 4, 5)),
    _sample("int32", (2, 6, 3), (2, 4), torch.int32),
    _sample("batch 0", (0, 6, 3), (0, 4)),
    _sample("K 0", (2, 6, 3), (2, 0)),
    _sample("K = N", (2, 6, 3), (2, 6)),
]
