"""denoising_loss, which draws the noise once more where others have kept it."""

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

_SMALL = {"T": 64, "D": 192}
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
    """Forward and backward; the others read noise that was drawn before and has been kept."""
    prediction = values(case["T"], case["D"], dtype=case.dtype, device=device, grad=True)
    seed = torch.ones(1, dtype=torch.int64, device=device)
    kept = standard_normal(seed, 0, case["T"], case["D"])
    grads = [torch.ones((), device=device)]
    built, why_not = compiled(_mse, device)
    ways: dict[str, Callable[..., Tensor]] = {"eager": _mse, **built}

    def ours(*tensors: Tensor) -> Tensor:
        return ops.denoising_loss(*tensors)

    def check() -> None:
        exact = run(F.mse_loss, in_float64([prediction, kept]), grads)
        assert_agree("ours", run(ours, (prediction, seed), grads), exact, case.dtype)
        for name, way in ways.items():
            if not isinstance(way, Compiled) or way.built:
                assert_agree(name, run(way, (prediction, kept), grads), exact, case.dtype)

    return Race(
        ours=functools.partial(run, ours, (prediction, seed), grads),
        others={
            name: functools.partial(run, way, (prediction, kept), grads)
            for name, way in ways.items()
        },
        check=check,
        cost=denoising_loss_cost(case, backward=True),
        backend=backend_of("denoising_loss", prediction[None], None, seed, 0, True),
        why_not=why_not,
    )


def _mse(prediction: Tensor, noise: Tensor) -> Tensor:
    return F.mse_loss(prediction.float(), noise)
