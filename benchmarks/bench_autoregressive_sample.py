"""Sampling from an autoregressive head, against a full pass of its network a coordinate."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import autoregressive_sample_cost
from plain import Compiled, compiled, degree_mask, values
from torch import Tensor

from jepa_fast.nn.heads.autoregressive import AutoregressiveHead, MaskedLinear, sampling_noise
from jepa_fast.perf import Case, Race, benchmark

_SMALL = {"T": 8, "D": 24, "d": 16, "H": 32, "depth": 2, "K": 5}
_HEAD = {"T": 128, "D": 384, "d": 384, "H": 512, "depth": 2, "K": 5}
_FEW = _HEAD | {"T": 16}  # every round has 384 dense passes of each way but ours


@benchmark(
    [
        Case("autoregressive_sample", "small", _SMALL, quick=True),
        Case("autoregressive_sample", "16-tokens", _FEW, devices=("cpu",)),
        Case("autoregressive_sample", "128-tokens", _HEAD, devices=("cuda",)),
    ]
)
def bench_autoregressive_sample(case: Case, device: str) -> Race:
    """One sample a token, from the same noise in all ways.

    In `eager` and `compile` every coordinate costs a pass of the dense network, whose masked
    weights are made once a sample.
    """
    torch.manual_seed(0)
    head = AutoregressiveHead(
        case["d"], case["D"], case["K"], hidden_dim=case["H"], depth=case["depth"]
    ).to(device)
    condition = values(case["T"], case["d"], device=device)

    def ours(head: AutoregressiveHead = head, condition: Tensor = condition) -> Tensor:
        with torch.no_grad():
            return head.distribution(condition).sample(1, _generator(device))[0]

    built, why_not = compiled(_parameters, device)
    ways: dict[str, Callable[..., Tensor]] = {"eager": _parameters, **built}
    others = {
        name: functools.partial(_naive_sample, way, head, condition) for name, way in ways.items()
    }

    def check() -> None:
        # A component or two may differ where two are all but equally likely.
        samples = {"ours": ours()} | {
            name: others[name]()
            for name, way in ways.items()
            if not isinstance(way, Compiled) or way.built
        }
        exact = samples["eager"]
        for name, sample in samples.items():
            assert sample.shape == exact.shape, f"{name} is {list(sample.shape)}"
            off = ~torch.isclose(sample, exact, rtol=1e-3, atol=1e-3).all(-1)
            assert off.double().mean() < 0.05, f"{name}: {int(off.sum())} tokens are off"
        wide, inputs = copy.deepcopy(head).double(), condition.double()
        some = inputs[:_CHECKED_TOKENS]
        want = _naive_sample(_parameters, wide, some)
        torch.testing.assert_close(ours(wide, some), want, rtol=1e-8, atol=1e-8)

    return Race(
        ours=ours,
        others=others,
        check=check,
        cost=autoregressive_sample_cost(case),
        why_not=why_not,
    )


_CHECKED_TOKENS = 4
_Weights = list[tuple[Tensor, Tensor | None]]


def _generator(device: str | torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


@torch.no_grad()
def _naive_sample(
    parameters: Callable[..., Tensor], head: AutoregressiveHead, condition: Tensor
) -> Tensor:
    """[T, D]: each coordinate from a pass of the whole network over those before it."""
    layers: list[MaskedLinear] = [*head.hidden, head.output]  # type: ignore[list-item]
    weights: _Weights = [
        (layer.weight * degree_mask(layer.in_degree, layer.out_degree, layer.strict), layer.bias)
        for layer in layers
    ]
    film, direct = head.film(condition), head.direct(condition)
    z = condition.new_zeros(len(condition), head.target_dim)
    noise = sampling_noise(head, z.T, _generator(z.device))
    order = layers[0].in_degree.argsort().tolist()
    for coordinate, (choice, deviation) in zip(order, noise, strict=True):
        every = parameters(weights, film, direct, z)
        logits, loc, log_scale = every.unflatten(1, (3, -1, head.target_dim))[
            ..., coordinate
        ].unbind(1)
        component = (logits + choice.T).argmax(1, keepdim=True)
        loc, log_scale = (x.gather(1, component)[:, 0] for x in (loc, log_scale))
        z[:, coordinate] = loc + (head.scale_floor + log_scale.exp()) * deviation
    return z


def _parameters(weights: _Weights, film: Tensor, direct: Tensor, z: Tensor) -> Tensor:
    """[T, 3 K D] of all coordinates, a dense pass."""
    *hidden, output = weights
    h = z
    for (weight, bias), of_layer in zip(hidden, film.chunk(len(hidden), 1), strict=True):
        scale, shift = of_layer.chunk(2, 1)
        h = F.silu(F.linear(h, weight, bias) * (1 + scale) + shift)
    return F.linear(h, *output) + direct
