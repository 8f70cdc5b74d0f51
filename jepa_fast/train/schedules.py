"""The papers' schedules, as pure functions of the step.

`step` may be any real number; values outside `[0, total]` are held at the end values. The public
I-JEPA code advances learning rate and weight decay *before* an update and the momentum *after* it,
so update number `n` (from 0) uses `warmup_cosine(n + 1)`, `cosine(n + 1)` and `linear(n)`.
"""

from __future__ import annotations

import math


def linear(step: float, *, total: float, start: float, final: float) -> float:
    """Straight line from `start` at step 0 to `final` at `total`.

    I-JEPA's teacher momentum: .996 -> 1.
    """
    return start + (final - start) * _progress(step, total)


def cosine(step: float, *, total: float, start: float, final: float) -> float:
    """Half a cosine from `start` at step 0 to `final` at `total`.

    I-JEPA's weight decay: .04 -> .4.
    """
    return final + (start - final) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, total)))


def warmup_cosine(
    step: float, *, total: float, warmup: float, start: float, peak: float, final: float
) -> float:
    """Straight line from `start` to `peak` over `warmup` steps, then half a cosine to `final`.

    I-JEPA's learning rate: 2e-4 -> 1e-3 over 40 epochs, then down to 1e-6.
    """
    if step < warmup:
        return linear(step, total=warmup, start=start, final=peak)
    return cosine(step - warmup, total=total - warmup, start=peak, final=final)


def _progress(step: float, total: float) -> float:
    return min(max(step / total, 0.0), 1.0) if total > 0 else 1.0
