"""q_sample, whose eager way spends most of its time in torch.randn_like."""

from __future__ import annotations

import functools
import math

import torch
from cases import HEAD, HEAD_L, q_sample_cost
from plain import Compiled, assert_agree, backend_of, compiled, run, values
from torch import Tensor

from jepa_fast import ops
from jepa_fast.ops._normal import standard_normal
from jepa_fast.perf import Case, Race, benchmark

_SMALL = {"T": 256, "D": 192}
_S = {size: HEAD[size] for size in _SMALL}
_L = {size: HEAD_L[size] for size in _SMALL}


@benchmark(
    [
        Case("q_sample", "small", _SMALL, quick=True),
        Case("q_sample", "2048-tokens", _S, devices=("cpu",)),
        Case("q_sample", "vit-l", _L, "bfloat16", ("cuda",)),
    ]
)
def bench_q_sample(case: Case, device: str) -> Race:
    """The forward pass: targets take no gradient. `randn` draws numbers and does nothing else."""
    target = values(case["T"], case["D"], dtype=case.dtype, device=device)
    signal = torch.linspace(0.1, 0.9, case["T"], device=device)
    noise = (1 - signal.square()).sqrt()
    seed = torch.ones(1, dtype=torch.int64, device=device)
    arguments = (target, signal, noise, seed)

    def ours(*tensors: Tensor) -> Tensor:
        return ops.q_sample(*tensors)

    built, why_not = compiled(_eager, device)
    ways = {"eager": _eager, **built, "randn": _randn}

    def check() -> None:
        e = standard_normal(seed, 0, case["T"], case["D"]).double()
        exact = signal.double()[:, None] * target.double() + noise.double()[:, None] * e
        assert_agree("ours", run(ours, arguments, ()), [exact], case.dtype)
        for name, way in ways.items():
            if name != "randn" and (not isinstance(way, Compiled) or way.built):
                _assert_noised(name, way(*arguments), *arguments[:3])

    return Race(
        ours=functools.partial(run, ours, arguments, ()),
        others={name: functools.partial(run, way, arguments, ()) for name, way in ways.items()},
        check=check,
        cost=q_sample_cost(case, backward=False),
        backend=backend_of("q_sample", target, signal, noise, seed, 0),
        why_not=why_not,
    )


def _eager(target: Tensor, signal: Tensor, noise: Tensor, seed: Tensor) -> Tensor:
    wide = target.float()
    e = torch.randn_like(wide)
    return (signal[:, None] * wide + noise[:, None] * e).to(target.dtype)


def _randn(target: Tensor, signal: Tensor, noise: Tensor, seed: Tensor) -> Tensor:
    return torch.randn_like(target)


def _assert_noised(name: str, x: Tensor, target: Tensor, signal: Tensor, noise: Tensor) -> None:
    """Others draw other numbers: what they are made of has mean 0 and variance 1."""
    e = (x.double() - signal.double()[:, None] * target.double()) / noise.double()[:, None]
    spread = 5 / math.sqrt(e.numel())
    assert e.mean().abs() < spread, f"{name}: noise of mean {e.mean():.3g}"
    variance = e.square().mean()
    assert (variance - 1).abs() < 1.5 * spread, f"{name}: noise of variance {variance:.3g}"
