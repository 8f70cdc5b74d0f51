"""affine_coupling alone, and in a RealNVP against other implementations of the flow."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import HEAD, HEAD_L, affine_coupling_cost, realnvp_cost
from plain import (
    Compiled,
    assert_agree,
    backend_of,
    compiled,
    in_float64,
    operator_race,
    plain_operators,
    values,
)
from torch import Tensor, nn

from jepa_fast.nn.heads.flow import CouplingFlowHead
from jepa_fast.perf import Case, Race, benchmark

_SMALL = {"T": 256, "D": 192}
_BOUND = 2.0
_REALNVP = {"T": 1024, "D": 384, "d": 384, "H": 512, "couplings": 6}


@benchmark(
    [
        Case("affine_coupling", "small", _SMALL, quick=True),
        Case("affine_coupling", "2048-tokens", HEAD, devices=("cpu",)),
        # In float32: in less, a flow's inverse is none.
        Case("affine_coupling", "vit-l", HEAD_L, devices=("cuda",)),
    ]
)
def bench_affine_coupling(case: Case, device: str) -> Race:
    """Forward and backward of one coupling, without its network."""
    shape = (case["T"], case["D"])
    x, raw_scale, shift, grad = (
        values(*shape, dtype=case.dtype, device=device, seed=seed) for seed in range(4)
    )
    x, raw_scale, shift = (tensor.requires_grad_() for tensor in (x, raw_scale, shift))
    mask = torch.arange(case["D"], device=device) % 2 == 0
    return operator_race(
        case,
        device,
        affine_coupling_cost(case, backward=True),
        (x, raw_scale, shift, mask),
        backend=backend_of("affine_coupling", x, raw_scale, shift, mask, _BOUND, False),
        grads=[grad, torch.full((case["T"],), 1 / case["T"], device=device)],
    )


@benchmark([Case("affine_coupling", "realnvp", _REALNVP)])
def bench_realnvp(case: Case, device: str) -> Race:
    """Forward and backward of six couplings with their networks.

    `eager` and `compile` are written for couplings of halves, as our head is: their networks read
    and write only the coordinates that count. `plain` is our head on plain operators. The flows of
    zuko and nflows differ from ours in their activations and scales, so nothing but their time
    compares.
    """
    tokens, width = case["T"], case["D"]
    condition = values(tokens, case["d"], device=device, grad=True)
    target = values(tokens, width, device=device, seed=1)
    head = _head(case).to(device)
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    halves = _halves(head)

    def ours() -> list[Tensor]:
        return _with_gradients(head(condition, target), [condition, *parameters])

    def plain() -> list[Tensor]:
        with plain_operators():
            return ours()

    def by_halves(way: Callable[..., Tensor]) -> list[Tensor]:
        return _with_gradients(way(halves, condition, target), [condition, *_leaves(halves)])

    built, why_not = compiled(_nll_of_halves, device)
    ways: dict[str, Callable[..., Tensor]] = {"eager": _nll_of_halves, **built}
    others: dict[str, Callable[[], list[Tensor]]] = {
        name: functools.partial(by_halves, way) for name, way in ways.items()
    }
    for library, make in (("zuko", _Zuko), ("nflows", _Nflows)):
        if importlib.util.find_spec(library) is None:
            why_not[library] = f"{library} is not installed"
        else:
            others[library] = _of_library(make(case).to(device), condition, target)

    def check() -> None:
        wide = copy.deepcopy(head).double()
        inputs = in_float64([condition, target])
        with plain_operators():
            exact = _with_gradients(wide(*inputs), [inputs[0], *wide.parameters()])
        for name, way in {"ours": ours, "plain": plain}.items():
            assert_agree(name, way(), exact, case.dtype)
        for name, halved in ways.items():
            if not isinstance(halved, Compiled) or halved.built:
                # Of the parameters the halves have parts only.
                assert_agree(name, by_halves(halved)[:2], exact[:2], case.dtype)
        for name in {"zuko", "nflows"} & others.keys():
            shapes = [tensor.shape for tensor in others[name]()[:2]]
            assert shapes == [exact[0].shape, exact[1].shape], f"{name} gives {shapes}"

    # What changes, its scale and its shift are of half the target's width.
    half = target[:, : width // 2]
    arguments = (half, half, half, head.couplings[0].none_passes, _BOUND, False)
    return Race(
        ours=ours,
        others={**others, "plain": plain},
        check=check,
        cost=realnvp_cost(case),
        backend=backend_of("affine_coupling", *arguments),
        why_not=why_not,
    )


def _head(case: Case) -> CouplingFlowHead:
    """A head past its start, where every coupling is the identity."""
    head = CouplingFlowHead(case["d"], case["D"], case["couplings"], case["H"], _BOUND)
    couplings: Any = head.couplings
    for seed, coupling in enumerate(couplings):
        output = coupling.output
        with torch.no_grad():
            drawn = values(*output.weight.shape, seed=seed)
            output.weight.copy_(drawn * 0.1 * output.in_features**-0.5)
    return head.eval()  # so that no ActNorm waits for a batch to start from


def _with_gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


_Layers = list[dict[str, Tensor]]


def _halves(head: CouplingFlowHead) -> _Layers:
    """The head's parameters, those of the networks cut to the coordinates that they are about."""
    layers = []
    pairs: Any = zip(head.norms, head.couplings, strict=True)
    for norm, coupling in pairs:
        kept, free = coupling.mask, ~coupling.mask
        both = torch.cat([free, free])
        layer = {
            "loc": norm.loc,
            "log_scale": norm.log_scale,
            "from_target": coupling.from_target.weight[:, kept],
            "from_target_bias": coupling.from_target.bias,
            "from_condition": coupling.from_condition.weight,
            "hidden": coupling.hidden.weight,
            "hidden_bias": coupling.hidden.bias,
            "output": coupling.output.weight[both],
            "output_bias": coupling.output.bias[both],
        }
        layers.append({name: x.detach().clone().requires_grad_() for name, x in layer.items()})
    return layers


def _leaves(layers: _Layers) -> list[Tensor]:
    return [tensor for layer in layers for tensor in layer.values()]


def _nll_of_halves(layers: _Layers, condition: Tensor, target: Tensor) -> Tensor:
    """The loss of a CouplingFlowHead with alternating masks: even coordinates pass first."""
    z = target
    logdet = torch.zeros_like(z[:, 0])
    for i, layer in enumerate(layers):
        z = (z - layer["loc"]) * torch.exp(-layer["log_scale"])
        logdet = logdet - layer["log_scale"].sum()
        kept, free = z[:, i % 2 :: 2], z[:, 1 - i % 2 :: 2]
        seen = F.linear(kept, layer["from_target"], layer["from_target_bias"])
        h = F.silu(seen + F.linear(condition, layer["from_condition"]))
        h = F.silu(F.linear(h, layer["hidden"], layer["hidden_bias"]))
        raw_scale, shift = F.linear(h, layer["output"], layer["output_bias"]).chunk(2, -1)
        log_scale = _BOUND * torch.tanh(raw_scale)
        free = free * torch.exp(log_scale) + shift
        logdet = logdet + log_scale.sum(-1)
        pair = (kept, free) if i % 2 == 0 else (free, kept)
        z = torch.stack(pair, -1).flatten(1)
    log_prob = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1) + logdet
    return -log_prob.mean() / target.shape[1]


def _of_library(flow: nn.Module, condition: Tensor, target: Tensor) -> Callable[[], list[Tensor]]:
    parameters = list(flow.parameters())

    def call() -> list[Tensor]:
        loss = -flow(condition, target).mean() / target.shape[1]
        return _with_gradients(loss, [condition, *parameters])

    return call


class _Zuko(nn.Module):
    """zuko's RealNVP, a masked one."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        flows: Any = importlib.import_module("zuko.flows")
        hidden = (case["H"], case["H"])
        self.flow = flows.RealNVP(
            case["D"], case["d"], transforms=case["couplings"], hidden_features=hidden
        )

    def forward(self, condition: Tensor, target: Tensor) -> Tensor:
        return self.flow(condition).log_prob(target)


class _Nflows(nn.Module):
    """nflows' affine couplings, of halves, with networks of our head's sizes."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        coupling: Any = importlib.import_module("nflows.transforms.coupling")
        create = functools.partial(_Network, case["d"], case["H"])
        self.couplings = nn.ModuleList(
            coupling.AffineCouplingTransform(
                [(c + i) % 2 for c in range(case["D"])], transform_net_create_fn=create
            )
            for i in range(case["couplings"])
        )

    def forward(self, condition: Tensor, target: Tensor) -> Tensor:
        z, logdet = target, torch.zeros_like(target[:, 0])
        for coupling in self.couplings:
            z, change = coupling(z, context=condition)
            logdet = logdet + change
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1) + logdet


class _Network(nn.Module):
    """What nflows calls with the half that passes, and the condition."""

    def __init__(self, condition_dim: int, hidden_dim: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs + condition_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, outputs),
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.layers(torch.cat([x, condition], -1))
