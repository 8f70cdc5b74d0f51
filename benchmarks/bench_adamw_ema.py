"""AdamW with the EMA, and a copy of that in bfloat16, on the parameters of encoders.

Against what trains such a pair otherwise: torch's AdamW, fused or as it is set up by default, then
`_foreach_lerp_`, then `_foreach_copy_`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from cases import adamw_ema_cost, vit_parameters
from plain import PLAIN, Compiled, assert_agree, backend_of, compiled, in_float64, values
from torch import Tensor

from jepa_fast import ops
from jepa_fast.perf import Case, Race, benchmark

MOMENTUM, LEARNING_RATE, WEIGHT_DECAY = 0.996, 1e-4, 0.04
# As in bench_ema_update.py: a shard of a flat parameter, small enough that times repeat.
_SHARD = {"elements": 2**20}
_BASE = {"D": 768, "depth": 12}
_LARGE = {"D": 1024, "depth": 24}


@benchmark(
    [
        Case("adamw_ema_", "shard", _SHARD, quick=True),
        Case("adamw_ema_", "vit-l", _LARGE, devices=("cuda",)),
    ]
)
def bench_adamw_ema(case: Case, device: str) -> Race:
    """Parameters and teacher in float32."""
    return _race(case, device, None)


@benchmark([Case("adamw_ema_", "vit-b-bfloat16-shadow", _BASE)])
def bench_adamw_ema_shadow(case: Case, device: str) -> Race:
    """With a copy of the teacher for its forward pass in bfloat16."""
    return _race(case, device, "bfloat16")


@dataclass
class State:
    """What a step reads and writes: lists, and torch's optimizers of them."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    targets: list[Tensor]
    shadows: list[Tensor]
    optimizers: dict[str, torch.optim.AdamW] = field(default_factory=dict)

    @property
    def lists(self) -> list[list[Tensor]]:
        return [getattr(self, each.name) for each in fields(self)[:-1]]

    def copied(self, wide: bool) -> State:
        """The same numbers elsewhere, in float64 where asked for."""
        lists = [[x.detach().clone() for x in each] for each in self.lists]
        return State(*(in_float64(lists) if wide else lists))

    @property
    def outcome(self) -> list[Tensor]:
        return [x.detach() for each in (self.params, self.targets, self.shadows) for x in each]


_Way = Callable[[State], None]


def _race(case: Case, device: str, shadow: str | None) -> Race:
    if "elements" in case.sizes:
        shapes: list[tuple[int, ...]] = [(case["elements"],)]
    else:
        shapes = vit_parameters(case["D"], case["depth"])

    def drawn(first: int, dtype: str = "float32") -> list[Tensor]:
        return [
            values(*shape, dtype=dtype, device=device, seed=first + i)
            for i, shape in enumerate(shapes)
        ]

    count = len(shapes)
    state = State(
        params=drawn(0),
        grads=drawn(count),
        exp_avgs=drawn(2 * count),
        exp_avg_sqs=[x.square_() for x in drawn(3 * count)],
        steps=[torch.full((), 9.0, device=device) for _ in shapes],
        targets=drawn(4 * count),
        shadows=[] if shadow is None else drawn(0, shadow),
    )
    ways: dict[str, _Way] = {"eager": _loop}
    if "elements" in case.sizes:
        built, why_not = compiled(_loop, device)
        ways |= built
    else:
        why_not = {"compile": "a loop over hundreds of tensors takes minutes to compile"}
    ways["adamw_fused_lerp_cast"] = functools.partial(_torch, "fused")
    ways["adamw_default_lerp_cast"] = functools.partial(_torch, "default")

    def check() -> None:
        exact = state.copied(wide=True)
        _loop(exact)
        for name, way in {"ours": _ours, **ways}.items():
            if isinstance(way, Compiled) and not way.built:
                continue
            got = state.copied(wide=False)
            way(got)
            kept = 2 * count
            assert_agree(name, got.outcome[:kept], exact.outcome[:kept], "float32")
            assert_agree(name, got.outcome[kept:], exact.outcome[kept:], shadow or "float32")

    scalars = [torch.tensor(x, dtype=torch.float64) for x in (1.0, 1.0, 1.0)]
    return Race(
        ours=functools.partial(_ours, state),
        others={name: functools.partial(way, state) for name, way in ways.items()},
        check=check,
        cost=adamw_ema_cost(sum(map(torch.Tensor.numel, state.params)), shadow),
        backend=backend_of(
            "adamw_ema_", *state.lists, *scalars, None, None, None, 0.9, 0.999, 1e-8, False
        ),
        why_not=why_not,
    )


def _ours(state: State) -> None:
    ops.adamw_ema_(*state.lists, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM)


def _loop(state: State) -> None:
    PLAIN["adamw_ema_"](
        *state.lists, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM
    )


def _torch(kind: str, state: State) -> None:
    if kind not in state.optimizers:
        state.optimizers[kind] = _optimizer(kind, state)
    state.optimizers[kind].step()
    torch._foreach_lerp_(state.targets, [p.detach() for p in state.params], 1 - MOMENTUM)
    if state.shadows:
        torch._foreach_copy_(state.shadows, state.targets)


def _optimizer(kind: str, state: State) -> torch.optim.AdamW:
    """torch's, of the same moments."""
    fused = True if kind == "fused" else None
    for p, grad in zip(state.params, state.grads, strict=True):
        p.requires_grad_().grad = grad
    optimizer = torch.optim.AdamW(
        state.params, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused
    )
    for p, m, v, step in zip(
        state.params, state.exp_avgs, state.exp_avg_sqs, state.steps, strict=True
    ):
        step = step if fused else step.cpu()
        optimizer.state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
    return optimizer
