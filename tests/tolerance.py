"""The rule for rounding errors: as good as plain PyTorch in the same dtype, in every row."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Error against float64 at most twice eager's, plus one rounding step of the largest value.

    Holds for each row (the last dimension), so that one bad row cannot hide, and for the root mean
    square over everything.

    Args:
        got: what is tested.
        eager: the same by plain PyTorch, in the dtype of `got`.
        exact: the same in float64.
    """
    assert got.dtype == eager.dtype, (got.dtype, eager.dtype)
    assert got.shape == eager.shape == exact.shape
    assert exact.dtype == torch.float64
    if got.numel() == 0:
        return
    step = torch.finfo(got.dtype).eps
    error, allowed = (got.double() - exact).abs(), (eager.double() - exact).abs()
    rows = (error, allowed, exact.abs())
    worst, bound, largest = (x.reshape(-1, x.shape[-1] if x.ndim else 1).amax(-1) for x in rows)
    bad = ~(worst <= 2 * bound + step * largest)  # NaN is bad
    assert not bad.any(), (
        f"{int(bad.sum())} of {len(bad)} rows are too far off; row {int(bad.nonzero()[0])} has "
        f"error {worst[bad][0]:.3g}, eager's is {bound[bad][0]:.3g}"
    )
    rms, rms_bound, rms_value = (x.square().mean().sqrt() for x in rows)
    assert rms <= 2 * rms_bound + step * rms_value, (rms, rms_bound)
