"""The Triton kernels: hundreds of parameters in one launch for each combination of dtypes.

A small kernel counts the update of every parameter and leaves what its elements share. The large
one goes over chunks of parameters, whose addresses are in a table on the device. Gradients may move
from step to step, so that table is short: a row a parameter. Which chunk belongs to which row does
not change, and is in a table of its own.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_fast.ops import _configs, _memory, _triton_tables
from jepa_fast.ops._compile import CompileCase
from jepa_fast.ops._launch import TRITON_DTYPES, launch, recorded_cases
from jepa_fast.ops._rounding import NARROW
from jepa_fast.ops._traffic import TrafficCase
from jepa_fast.ops._triton_elements import interpolated, mix, random_bits, rounded
from jepa_fast.ops.adamw_ema import memory

_OP = "adamw_ema_"
CONFIGS = Path(__file__).parent / "configs"

Row = tuple[int, int, int, int, int, int, int, int]
"""Addresses of parameter, gradient, both moments, target and shadow (0 without), number of
elements, number of the parameter."""


@triton.jit
def adamw_count_kernel(
    steps,  # [parameters, 1] addresses of their counts
    betas,  # [7] as of `_betas`
    lr,  # [1]
    weight_decay,  # [1]
    coefficients,  # [parameters, 3] float64: what a parameter is multiplied by; step size; 1 / root
    found_inf,  # [1] float32, or None
):
    number = tl.program_id(0).to(tl.int64)
    address = tl.load(steps + number).to(tl.pointer_type(tl.float32))
    before = tl.load(address)
    step = before + 1.0
    if found_inf is None:
        tl.store(address, step)
    else:
        tl.store(address, tl.where(tl.load(found_inf) == 0.0, step, before))
    rate = tl.load(lr).to(tl.float64)
    first_power = tl.exp2(step.to(tl.float64) * tl.load(betas + 5))
    second_power = tl.exp2(step.to(tl.float64) * tl.load(betas + 6))
    row = coefficients + number * 3
    tl.store(row, 1.0 - rate * tl.load(weight_decay).to(tl.float64))
    tl.store(row + 1, rate / (1.0 - first_power))
    tl.store(row + 2, 1.0 / tl.sqrt(1.0 - second_power))


@triton.jit
def _quotient(x, y):
    """Rounded to the nearest in float32, too."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def _square_root(x):
    """Rounded to the nearest in float32, too."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def adamw_ema_kernel(
    chunks,  # [chunks, 2] row of the table, first element
    table,  # [parameters of this launch, 8] rows as above
    coefficients,  # [parameters of all launches, 3] float64, as above
    betas,  # [7] as of `_betas`
    momentum,  # [1]
    grad_scale,  # [1] float32, or None
    found_inf,  # [1] float32, or None
    seed,  # [1] int64, or None: round to the nearest
    PARAM: tl.constexpr,
    TARGET: tl.constexpr,  # None without targets
    SHADOW: tl.constexpr,  # None without shadows
    COMPUTE: tl.constexpr,
    AVERAGE: tl.constexpr,  # what targets are computed in
    MAXIMIZE: tl.constexpr,
    WIDE: tl.constexpr,  # addresses and sizes are multiples of 16
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = chunks + tl.program_id(0).to(tl.int64) * 2
    row = table + tl.load(chunk) * 8
    first = tl.load(chunk + 1)
    param = tl.load(row).to(tl.pointer_type(PARAM)) + first
    grad = tl.load(row + 1).to(tl.pointer_type(PARAM)) + first
    exp_avg = tl.load(row + 2).to(tl.pointer_type(PARAM)) + first
    exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(PARAM)) + first
    size = tl.minimum(tl.load(row + 6) - first, CHUNK).to(tl.int32)
    changed = size  # elements that AdamW changes: all or none
    if found_inf is not None:
        changed = tl.where(tl.load(found_inf) == 0.0, size, 0)
    if WIDE:
        param = tl.multiple_of(param, 16)
        grad = tl.multiple_of(grad, 16)
        exp_avg = tl.multiple_of(exp_avg, 16)
        exp_avg_sq = tl.multiple_of(exp_avg_sq, 16)
        size = tl.multiple_of(size, 16)
        changed = tl.multiple_of(changed, 16)
    number = tl.load(row + 7)
    kept = tl.load(coefficients + number * 3).to(COMPUTE)
    step_size = tl.load(coefficients + number * 3 + 1).to(COMPUTE)
    inverse_root = tl.load(coefficients + number * 3 + 2).to(COMPUTE)
    beta1 = tl.load(betas)
    near_grad = beta1 <= 0.5
    beta1 = beta1.to(COMPUTE)
    one_minus_beta1 = tl.load(betas + 1).to(COMPUTE)
    beta2 = tl.load(betas + 2).to(COMPUTE)
    one_minus_beta2 = tl.load(betas + 3).to(COMPUTE)
    eps = tl.load(betas + 4).to(COMPUTE)
    if grad_scale is not None:
        scale = tl.load(grad_scale).to(COMPUTE)
    if seed is not None:
        stream = number * 3
        drawn = mix(tl.load(seed).to(tl.uint64))
    if TARGET is not None:
        target = tl.load(row + 4).to(tl.pointer_type(TARGET)) + first
        if WIDE:
            target = tl.multiple_of(target, 16)
        keep = tl.load(momentum).to(tl.float64)
        near_param = keep <= 0.5
        move = (1.0 - keep).to(AVERAGE)
        keep = keep.to(AVERAGE)
    if SHADOW is not None:
        shadow = tl.load(row + 5).to(tl.pointer_type(SHADOW)) + first
        if WIDE:
            shadow = tl.multiple_of(shadow, 16)
    for start in range(0, CHUNK, BLOCK):
        i = start + tl.arange(0, BLOCK)  # [BLOCK], below CHUNK: 32 bits will do
        inside = i < size
        changes = i < changed
        old = tl.load(param + i, mask=inside)
        g = tl.load(grad + i, mask=changes).to(COMPUTE)
        m = tl.load(exp_avg + i, mask=changes).to(COMPUTE)
        v = tl.load(exp_avg_sq + i, mask=changes).to(COMPUTE)
        if grad_scale is not None:
            unscaled = _quotient(g, scale).to(PARAM)
            tl.store(grad + i, unscaled, mask=changes)
            g = unscaled.to(COMPUTE)
        if MAXIMIZE:
            g = -g
        m = interpolated(m, g, near_grad, beta1, one_minus_beta1)
        v = v * beta2 + one_minus_beta2 * g * g
        denominator = _square_root(v) * inverse_root + eps
        new = old.to(COMPUTE) * kept - _quotient(step_size * m, denominator)
        if seed is not None and PARAM.primitive_bitwidth == 16:
            of_param = mix(drawn + stream.to(tl.uint64))
            new = rounded(new, random_bits(of_param, first + i), PARAM)
        new = new.to(PARAM)
        tl.store(param + i, new, mask=changes)
        tl.store(exp_avg + i, m.to(PARAM), mask=changes)
        tl.store(exp_avg_sq + i, v.to(PARAM), mask=changes)
        if TARGET is not None:
            if found_inf is not None:
                new = tl.where(changes, new, old)
            average = tl.load(target + i, mask=inside).to(AVERAGE)
            average = interpolated(average, new.to(AVERAGE), near_param, keep, move)
            if seed is not None and TARGET.primitive_bitwidth == 16:
                of_target = mix(drawn + (stream + 1).to(tl.uint64))
                average = rounded(average, random_bits(of_target, first + i), TARGET)
            average = average.to(TARGET)
            tl.store(target + i, average, mask=inside)
            if SHADOW is not None:
                # By way of float32, as PyTorch does: the interpreter has no float64 to bfloat16.
                copy = average if SHADOW == tl.float64 else average.to(tl.float32)
                if seed is not None and SHADOW.primitive_bitwidth == 16:
                    of_shadow = mix(drawn + (stream + 2).to(tl.uint64))
                    copy = rounded(copy, random_bits(of_shadow, first + i), SHADOW)
                tl.store(shadow + i, copy.to(SHADOW), mask=inside)


@dataclass(frozen=True)
class Kind:
    """What one launch serves.

    Args:
        param, target, shadow: the tensors' dtypes; no target, no shadow: None.
        wide: whether all addresses and sizes are multiples of 16, so that 16 bytes can be moved at
            once throughout.
        stochastic: whether something is rounded stochastically.
    """

    param: torch.dtype
    target: torch.dtype | None
    shadow: torch.dtype | None
    wide: bool
    stochastic: bool

    @property
    def config_key(self) -> str:
        """`"wide-float32"` and so on, by the dtype that AdamW is computed in."""
        compute = "float64" if self.param == torch.float64 else "float32"
        return f"{'wide' if self.wide else 'narrow'}-{compute}"

    def constants(self, config: _configs.Config, maximize: bool) -> dict[str, Any]:
        """The kernel's constants."""
        return {
            "PARAM": TRITON_DTYPES[self.param],
            "TARGET": None if self.target is None else TRITON_DTYPES[self.target],
            "SHADOW": None if self.shadow is None else TRITON_DTYPES[self.shadow],
            "COMPUTE": tl.float64 if self.param == torch.float64 else tl.float32,
            "AVERAGE": tl.float64 if self.target == torch.float64 else tl.float32,
            "MAXIMIZE": maximize,
            "WIDE": self.wide,
            "CHUNK": config["chunk"],
            "BLOCK": config["block"],
        }


def adamw_ema_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    targets: list[Tensor],
    shadows: list[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    momentum: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rounding_seed: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
) -> None:
    """As `reference.adamw_ema_`."""
    own, teacher = (params, grads, exp_avgs, exp_avg_sqs), (targets, shadows)
    memory.check(*own, steps, *teacher, lr, weight_decay, momentum, grad_scale)
    if not params:
        return
    device = params[0].device
    grad_scale, found_inf = (memory.of_scaler(x, device) for x in (grad_scale, found_inf))
    seed = None if rounding_seed is None else _triton_tables.scalar(rounding_seed, device)
    flat = _memory.Flat.of(*own, *teacher)
    p, g, m, v, t, s = flat.lists
    with torch.cuda.device_of(params[0]):
        betas = _betas(beta1, beta2, eps, device)
        arguments = {
            "coefficients": _count(steps, betas, lr, weight_decay, found_inf),
            "betas": betas,
            "momentum": _triton_tables.scalar(momentum, device),
            "grad_scale": grad_scale,
            "found_inf": found_inf,
        }
        for kind, rows in _by_kind(p, g, m, v, t, s, seed is not None).items():
            drawn = {"seed": seed if kind.stochastic else None}
            _update(kind, rows, {**arguments, **drawn}, device, maximize)
    written = (p, m, v, t, s) if grad_scale is None else (p, g, m, v, t, s)
    torch.autograd.graph.increment_version([*itertools.chain(*written, steps)])
    flat.write_back(written)


def _betas(beta1: float, beta2: float, eps: float, device: torch.device) -> Tensor:
    """[1, 7] float64: each beta and what it lacks to 1, eps, the binary logarithms of the betas."""
    logs = (math.log2(beta) if beta > 0.0 else -math.inf for beta in (beta1, beta2))
    row = (beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, *logs)
    return _triton_tables.keep(_triton_tables.placed(_OP, (row,), device, torch.float64))


def _count(
    steps: list[Tensor],
    betas: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    found_inf: Tensor | None,
) -> Tensor:
    """Counts an update of every parameter; gives the coefficients, [parameters, 3] float64."""
    device = betas.device
    addresses = tuple((step.data_ptr(),) for step in steps)
    coefficients = torch.empty(len(steps), 3, dtype=torch.float64, device=device)
    launch(
        adamw_count_kernel,
        (len(steps),),
        {
            "steps": _triton_tables.keep(_triton_tables.placed(_OP, addresses, device)),
            "betas": betas,
            "lr": _triton_tables.scalar(lr, device),
            "weight_decay": _triton_tables.scalar(weight_decay, device),
            "coefficients": coefficients,
            "found_inf": found_inf,
        },
        {},
        num_warps=1,
    )
    return coefficients


def _by_kind(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    targets: list[Tensor],
    shadows: list[Tensor],
    stochastic: bool,
) -> dict[Kind, list[Row]]:
    """Rows of the parameters that have elements."""
    found: dict[Kind, list[Row]] = defaultdict(list)
    groups = itertools.zip_longest(params, grads, exp_avgs, exp_avg_sqs, targets, shadows)
    for number, group in enumerate(groups):
        size = group[0].numel()
        if size == 0:
            continue
        p, g, m, v, t, s = (0 if x is None else x.data_ptr() for x in group)
        param = group[0].dtype
        target, shadow = (None if x is None else x.dtype for x in group[4:])
        wide = (p | g | m | v | t | s | size) % 16 == 0
        narrow = stochastic and not NARROW.isdisjoint((param, target, shadow))
        row = (p, g, m, v, t, s, size, number)
        found[Kind(param, target, shadow, wide, narrow)].append(row)
    return found


def _update(
    kind: Kind,
    rows: list[Row],
    arguments: dict[str, Tensor | None],
    device: torch.device,
    maximize: bool,
) -> None:
    """Launches the update of some parameters; `arguments` are all but the tables."""
    config = _configs.lookup(CONFIGS, kind.config_key, device)
    sizes = tuple(row[6] for row in rows)
    chunks = _triton_tables.keep(_triton_tables.chunks(_OP, sizes, config["chunk"], device))
    table = _triton_tables.keep(_triton_tables.placed(_OP, tuple(rows), device))
    launch(
        adamw_ema_kernel,
        (len(chunks),),
        {
            "chunks": chunks,
            "table": table,
            **arguments,
        },
        kind.constants(config, maximize),
        config["num_warps"],
    )


def compile_cases() -> list[CompileCase]:
    """The shipped configs, in the dtypes that training uses."""
    single, double = torch.float32, torch.float64
    half, brain = torch.float16, torch.bfloat16
    dtypes = [
        (single, None, None),
        (single, single, None),
        (single, single, brain),
        (single, brain, half),
        (brain, brain, None),
        (double, double, single),
    ]
    kinds = [Kind(*three, wide, False) for wide in (True, False) for three in dtypes]
    kinds += [Kind(brain, brain, half, wide, stochastic=True) for wide in (True, False)]
    calls: dict[str, Callable[[], object]] = {
        "adamw_ema_-count": partial(_record_count, False),
        "adamw_ema_-count-scaler": partial(_record_count, True),
        **{f"adamw_ema_-{_name(kind)}": partial(_record_update, kind, False) for kind in kinds},
    }
    scaled = [Kind(half, single, half, wide, stochastic=False) for wide in (True, False)]
    for kind in scaled:
        calls[f"adamw_ema_-{_name(kind)}-scaler"] = partial(_record_update, kind, True)
    return recorded_cases(CONFIGS, calls, frozenset(name for name in calls if "-narrow-" in name))


def _name(kind: Kind) -> str:
    dtypes = [str(d).removeprefix("torch.") for d in (kind.param, kind.target, kind.shadow)]
    words = ["wide" if kind.wide else "narrow", *dtypes, *(["stochastic"] * kind.stochastic)]
    return "-".join(words)


def _record_count(scaler: bool) -> None:
    cpu, number = torch.device("cpu"), torch.tensor(0.5)
    betas = _betas(0.9, 0.999, 1e-8, cpu)
    _count([torch.zeros(())], betas, number, number, torch.zeros(()) if scaler else None)


def _record_update(kind: Kind, scaler: bool) -> None:
    """A launch for one parameter, whose addresses do not count."""
    cpu = torch.device("cpu")
    arguments = {
        "coefficients": torch.zeros(1, 3, dtype=torch.float64),
        "betas": _betas(0.9, 0.999, 1e-8, cpu),
        "momentum": _triton_tables.scalar(torch.tensor(0.5), cpu),
        "grad_scale": torch.zeros(()) if scaler else None,
        "found_inf": torch.zeros(()) if scaler else None,
        "seed": torch.zeros(1, dtype=torch.int64) if kind.stochastic else None,
    }
    _update(kind, [(0, 0, 0, 0, 0, 0, 16, 0)], arguments, cpu, maximize=False)


def traffic_cases() -> list[TrafficCase]:
    """Parameters that share a launch: of several chunks with a tail, of one, and of none."""
    single, half, brain = torch.float32, torch.float16, torch.bfloat16
    return [
        _traffic("float32", (40_000, 16, 0), single, single),
        _traffic("float32-narrow", (10_001, 3), single, single),
        _traffic("float32-without-target", (20_000,), single),
        _traffic("float32-shadow-bfloat16", (40_000, 4_096), single, single, brain),
        _traffic("float32-shadow-float16-unscaled", (20_000,), single, single, half, True),
        _traffic("bfloat16", (40_000,), brain, brain),
    ]


def _traffic(
    name: str,
    sizes: tuple[int, ...],
    param: torch.dtype,
    target: torch.dtype | None = None,
    shadow: torch.dtype | None = None,
    scaler: bool = False,
) -> TrafficCase:
    p, g, m, v = ([torch.ones(size, dtype=param) for size in sizes] for _ in range(4))
    t, s = (
        [torch.ones(size, dtype=dtype) for size in sizes if dtype is not None]
        for dtype in (target, shadow)
    )
    steps = [torch.zeros(()) for _ in sizes]
    number = torch.tensor(0.5, dtype=torch.float64)
    scale, found_inf = (torch.ones(()), torch.zeros(())) if scaler else (None, None)

    def call() -> None:
        scalars = (number, number, number, scale, found_inf, None)
        adamw_ema_(p, g, m, v, steps, t, s, *scalars, 0.9, 0.999, 1e-8, False)

    return TrafficCase(f"adamw_ema_-{name}", call, memory.cost(p, t, s, unscaled=scaler))
