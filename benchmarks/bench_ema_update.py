"""ema_update_ on the parameters of real encoders, against torch's foreach functions.

`pytest benchmarks/bench_ema_update.py`; what counts is the ratio to `_foreach_lerp_`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from jepa_fast.nn.vit import create_encoder
from jepa_fast.ops import ema_update_
from jepa_fast.ops.ema_update import reference

MOMENTUM = 0.996
FP32, BF16 = torch.float32, torch.bfloat16
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_GPU)]


def _parameters(encoder: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in create_encoder(encoder).parameters()]
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(s, device=device, generator=generator).to(dtype) for s in shapes]


def _bytes(*lists: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensors in lists for tensor in tensors)


def _check(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor]) -> None:
    """The last, first and largest tensors, against the reference."""
    chosen = {0, len(targets) - 1, max(range(len(targets)), key=lambda i: targets[i].numel())}
    for i in chosen:
        got, want = targets[i].clone(), targets[i].clone()
        shadow = [shadows[i].clone()] if shadows else []
        ema_update_([got], [sources[i]], MOMENTUM, shadow)
        reference.ema_update_([want], [sources[i]], [], MOMENTUM)
        torch.testing.assert_close(got, want)
        for copy in shadow:
            torch.testing.assert_close(copy, want.to(copy.dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("encoder", ["vit_base_patch16"])
def bench_float32(encoder: str, device: str, race: Callable[..., Any]) -> None:
    targets, sources = (_parameters(encoder, FP32, device) for _ in range(2))
    race(
        device,
        lambda: _check(targets, sources, []),
        _bytes(targets, targets, sources),
        ours=lambda: ema_update_(targets, sources, MOMENTUM),
        foreach_lerp=lambda: torch._foreach_lerp_(targets, sources, 1 - MOMENTUM),
        loop=lambda: reference.ema_update_(targets, sources, [], MOMENTUM),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("encoder", ["vit_base_patch16"])
def bench_float32_from_bfloat16(encoder: str, device: str, race: Callable[..., Any]) -> None:
    """`_foreach_lerp_` takes one dtype, so the sources are cast first."""
    targets, sources = _parameters(encoder, FP32, device), _parameters(encoder, BF16, device)
    race(
        device,
        lambda: _check(targets, sources, []),
        _bytes(targets, targets, sources),
        ours=lambda: ema_update_(targets, sources, MOMENTUM),
        cast_and_foreach_lerp=lambda: torch._foreach_lerp_(
            targets, [source.float() for source in sources], 1 - MOMENTUM
        ),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("encoder", ["vit_base_patch16"])
def bench_bfloat16_shadow(encoder: str, device: str, race: Callable[..., Any]) -> None:
    targets, sources = (_parameters(encoder, FP32, device) for _ in range(2))
    shadows = _parameters(encoder, BF16, device)

    def lerp_and_copy() -> None:
        torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)
        torch._foreach_copy_(shadows, targets)

    race(
        device,
        lambda: _check(targets, sources, shadows),
        _bytes(targets, targets, sources, shadows),
        ours=lambda: ema_update_(targets, sources, MOMENTUM, shadows),
        foreach_lerp_and_copy=lerp_and_copy,
    )
