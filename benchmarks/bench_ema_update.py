"""ema_update_ on the parameters of encoders, against a loop and torch's foreach functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from cases import ema_update_cost, vit_parameters
from plain import (
    PLAIN,
    Compiled,
    assert_agree,
    backend_of,
    compiled,
    in_float64,
    tensors_in,
    values,
)
from torch import Tensor

from jepa_fast import ops
from jepa_fast.perf import Case, Race, benchmark

MOMENTUM = 0.996
# A shard of a flat parameter, as FSDP has them. Tensors and the kernel's part of the call are large
# enough to tell a slower kernel, and small enough for caches, where times repeat to some per cent.
_SHARD = {"elements": 2**20}
_BASE = {"D": 768, "depth": 12}
_LARGE = {"D": 1024, "depth": 24}
_Way = Callable[[list[Tensor], list[Tensor], list[Tensor]], None]


@benchmark(
    [
        Case("ema_update_", "shard", _SHARD, quick=True),
        Case("ema_update_", "vit-b", _BASE, devices=("cpu",)),
        Case("ema_update_", "vit-l", _LARGE, devices=("cuda",)),
    ]
)
def bench_ema_update(case: Case, device: str) -> Race:
    """Teacher and student in float32."""
    return _race(case, device, "float32", None, {"foreach_lerp": _lerp})


@benchmark([Case("ema_update_", "vit-b-from-bfloat16", _BASE)])
def bench_ema_update_from_bfloat16(case: Case, device: str) -> Race:
    """`_foreach_lerp_` takes one dtype, so the sources are cast first."""
    return _race(case, device, "bfloat16", None, {"cast_and_foreach_lerp": _cast_and_lerp})


@benchmark([Case("ema_update_", "vit-b-bfloat16-shadow", _BASE)])
def bench_ema_update_shadow(case: Case, device: str) -> Race:
    """With a copy of the teacher for its forward pass in bfloat16."""
    return _race(case, device, "float32", "bfloat16", {"foreach_lerp_and_copy": _lerp_and_copy})


def _race(
    case: Case, device: str, source: str, shadow: str | None, others: Mapping[str, _Way]
) -> Race:
    if "elements" in case.sizes:
        shapes: list[tuple[int, ...]] = [(case["elements"],)]
    else:
        shapes = vit_parameters(case["D"], case["depth"])

    def drawn(dtype: str, first: int) -> list[Tensor]:
        return [
            values(*shape, dtype=dtype, device=device, seed=first + i)
            for i, shape in enumerate(shapes)
        ]

    targets, sources = drawn("float32", 0), drawn(source, len(shapes))
    shadows = [] if shadow is None else drawn(shadow, 0)
    built, why_not = compiled(_loop, device)
    ways: dict[str, _Way] = {"eager": _loop, **built, **others}

    def check() -> None:
        exact = _outcome(_loop, *in_float64([targets, sources, shadows]))
        for name, way in {"ours": _ours, **ways}.items():
            if isinstance(way, Compiled) and not way.built:
                continue
            got = _outcome(way, targets, sources, shadows)
            assert_agree(name, got[: len(shapes)], exact[: len(shapes)], "float32")
            assert_agree(name, got[len(shapes) :], exact[len(shapes) :], shadow or "float32")

    return Race(
        # Over and over, the targets reach the sources and stay there.
        ours=functools.partial(_ours, targets, sources, shadows),
        others={
            name: functools.partial(way, targets, sources, shadows) for name, way in ways.items()
        },
        check=check,
        cost=ema_update_cost(sum(map(torch.Tensor.numel, targets)), "float32", source, shadow),
        backend=backend_of(
            "ema_update_", targets, sources, shadows, torch.tensor(MOMENTUM, dtype=torch.float64)
        ),
        why_not=why_not,
    )


def _outcome(way: _Way, *lists: Sequence[Tensor]) -> list[Tensor]:
    """Targets and shadows after a call, on copies."""
    targets, sources, shadows = ([tensor.clone() for tensor in tensors] for tensors in lists)
    way(targets, sources, shadows)
    return tensors_in([targets, shadows])


def _ours(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor]) -> None:
    ops.ema_update_(targets, sources, MOMENTUM, shadows)


def _loop(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor]) -> None:
    PLAIN["ema_update_"](targets, sources, MOMENTUM, shadows)


def _lerp(targets: list[Tensor], sources: list[Tensor], _: list[Tensor]) -> None:
    torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)


def _cast_and_lerp(targets: list[Tensor], sources: list[Tensor], _: list[Tensor]) -> None:
    torch._foreach_lerp_(targets, [source.float() for source in sources], 1 - MOMENTUM)


def _lerp_and_copy(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor]) -> None:
    torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)
    torch._foreach_copy_(shadows, targets)
