"""denoising_loss, which draws the noise once more.

So does `eager`, from a generator that starts anew. `kept` and `compile` read noise that was drawn
before and takes as much memory as the prediction in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import HEAD, HEAD_L, denoising_loss_cost
from plain import Compiled, assert_agree, backend_of, compiled, in_float64, run, values
from torch import Tensor

from jepa_fast import ops
from jepa_fast.ops._normal import standard_normal
from jepa_fast.perf import Case, Race, benchmark

_SMALL = {"T": 256, "D": 192}
_S = {size: HEAD[size] for size in _SMALL}
_L = {size: HEAD_L[size] for size in _SMALL}


@benchmark(
    [
        Case("denoising_loss", "small", _SMALL, quick=True),
        Case("denoising_loss", "2048-tokens", _S, devices=("cpu",)),
        Case("denoising_loss", "vit-l", _L, "bfloat16", ("cuda",)),
    ]
)
def bench_denoising_loss(case: Case, device: str) -> Race:
    """Forward and backward."""
    prediction = values(case["T"], case["D"], dtype=case.dtype, device=device, grad=True)
    seed = torch.ones(1, dtype=torch.int64, device=device)
    kept = standard_normal(seed, 0, case["T"], case["D"])
    grads = [torch.ones((), device=device)]
    generator = torch.Generator(device)

    def ours(*tensors: Tensor) -> Tensor:
        return ops.denoising_loss(*tensors)

    def eager(prediction: Tensor) -> Tensor:
        noise = torch.empty_like(kept).normal_(generator=generator.manual_seed(1))
        return _mse(prediction, noise)

    built, why_not = compiled(_mse, device)
    with_kept: dict[str, Callable[..., Tensor]] = {"kept": _mse, **built}

    def check() -> None:
        exact = run(F.mse_loss, in_float64([prediction, kept]), grads)
        assert_agree("ours", run(ours, (prediction, seed), grads), exact, case.dtype)
        for name, way in with_kept.items():
            if not isinstance(way, Compiled) or way.built:
                assert_agree(name, run(way, (prediction, kept), grads), exact, case.dtype)
        # Of other numbers; the square of a normal number of mean p has the variance 2 + 4 p^2.
        squares = prediction.detach().double().square().mean()
        spread = ((2 + 4 * squares) / prediction.numel()).sqrt()
        assert (eager(prediction.detach()) - (1 + squares)).abs() < 5 * spread, "eager is off"

    return Race(
        ours=functools.partial(run, ours, (prediction, seed), grads),
        others={
            "eager": functools.partial(run, eager, (prediction,), grads),
            **{
                name: functools.partial(run, way, (prediction, kept), grads)
                for name, way in with_kept.items()
            },
        },
        check=check,
        cost=denoising_loss_cost(case, backward=True),
        backend=backend_of("denoising_loss", prediction, None, seed, 0, True),
        why_not=why_not,
    )


def _mse(prediction: Tensor, noise: Tensor) -> Tensor:
    return F.mse_loss(prediction.float(), noise)
