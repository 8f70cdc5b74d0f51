"""adamw_ema_: AdamW and the EMA in one pass, against torch's AdamW and against float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends import backends, needs_native
from samples import Sample
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from jepa_fast import BackendError
from jepa_fast.ops import adamw_ema_, ema_update_
from jepa_fast.ops._registry import OPERATORS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Tail only, whole vectors, several blocks with a tail, nothing, a number.
SHAPES = ((3,), (8, 16), (3, 5001), (0, 5), ())
TARGETS = 4  # of the five have one
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}

pytestmark = pytest.mark.usefixtures("nearest_bfloat16")
each_backend = backends(OPERATORS["adamw_ema_"].backends)


def _stepped(*tensors: Tensor, shadow: bool, backend: str = "auto") -> tuple[Tensor, ...]:
    """The operator as a function: parameters and gradients."""
    half = len(tensors) // 2
    params = [tensor.detach().clone() for tensor in tensors[:half]]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    steps = [torch.zeros(()) for _ in params]
    targets = [torch.zeros_like(p) for p in params[:1]]
    shadows = [torch.zeros_like(t) for t in targets] if shadow else []
    lists = (params, list(tensors[half:]), *moments, steps, targets, shadows)
    adamw_ema_(*lists, **OPTIONS, backend=backend)
    return (*params, *moments[0], *moments[1], *targets, *shadows)


SAMPLES = [
    Sample(
        name="shadow" if shadow else "plain",
        function=_stepped,
        operators=("adamw_ema_",),
        make=lambda dtype, generator: tuple(
            torch.randn(shape, dtype=dtype, generator=generator) for shape in 2 * ((3, 5), (7,))
        ),
        keywords={"shadow": shadow},
        differentiable=False,
    )
    for shadow in (False, True)
]


class _State:
    """Parameters in training, the same at every call, with gradients that are."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: str,
        target_dtype: torch.dtype | None = None,
        shadow_dtype: torch.dtype | None = None,
    ) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.params = self.randoms(dtype, device)
        self.exp_avgs = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.params]
        self.steps = [torch.zeros((), device=device) for _ in self.params]
        with_target = self.params[:TARGETS]
        self.targets = [p.to(target_dtype, copy=True) for p in with_target if target_dtype]
        self.shadows = [t.to(shadow_dtype, copy=True) for t in self.targets if shadow_dtype]

    def randoms(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        return [torch.randn(s, generator=self.generator).to(device, dtype) for s in SHAPES]

    @property
    def lists(self) -> tuple[list[Tensor], ...]:
        return (
            self.exp_avgs, self.exp_avg_sqs, self.steps, self.targets, self.shadows
        )  # fmt: skip

    def step(self, grads: list[Tensor] | None = None, **options: Any) -> list[Tensor]:
        """A step, by gradients that are drawn; gives these."""
        if grads is None:
            grads = self.randoms(self.params[0].dtype, str(self.params[0].device))
        adamw_ema_(self.params, grads, *self.lists, **{**OPTIONS, **options})
        return grads

    @property
    def written(self) -> list[Tensor]:
        return [x for each in (self.params, *self.lists) for x in each]


def _assert_close(got: list[Tensor], want: list[Tensor], *through: torch.dtype) -> None:
    """Within some roundings of the largest number of each tensor, by its own dtype.

    Args:
        through: dtypes that the tensors were computed from, of which the narrowest counts.
    """
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        if one.numel():
            eps = max(torch.finfo(dtype).eps for dtype in (one.dtype, *through))
            bound = 4 * eps * other.abs().max().item()
            assert (one.double() - other.double()).abs().max().item() <= bound


@each_backend
@pytest.mark.parametrize("shadow_dtype", [None, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("target_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_mix_of_dtypes(
    dtype: torch.dtype,
    target_dtype: torch.dtype | None,
    shadow_dtype: torch.dtype | None,
    backend: str,
    device: str,
    backends_run: list[tuple[str, str]],
) -> None:
    """torch's fused AdamW, and ours of the EMA."""
    state = _State(dtype, device, target_dtype, shadow_dtype)
    params = [p.clone().requires_grad_() for p in state.params]
    averages, copies = ([x.clone() for x in each] for each in (state.targets, state.shadows))
    options = {name: OPTIONS[name] for name in ("lr", "weight_decay")}
    adamw = torch.optim.AdamW(params, fused=True, **options)
    for _ in range(3):
        grads = state.step(backend=backend)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        adamw.step()
        sources = [p.detach() for p in params[: len(averages)]]
        ema_update_(averages, sources, 0.9, copies, backend="reference")
    assert {run for run in backends_run if run[0] == "adamw_ema_"} == {("adamw_ema_", backend)}
    theirs = [adamw.state[p] for p in params]
    _assert_close(state.params, [p.detach() for p in params])
    for name, mine in zip(("exp_avg", "exp_avg_sq", "step"), state.lists[:3], strict=True):
        _assert_close(mine, [each[name] for each in theirs])
    _assert_close(state.targets, averages, dtype)
    _assert_close(state.shadows, copies, dtype, target_dtype or dtype)


@each_backend
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.0), (0.3, 0.99)], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_in_float64_it_is_the_formula(
    betas: tuple[float, float], maximize: bool, backend: str, device: str
) -> None:
    state = _State(torch.float64, device, torch.float64)
    p, m, v, t = (
        x.clone() for x in (state.params[1], *(torch.zeros(8, 16).double(),) * 2, state.targets[1])
    )
    m, v = m.to(device), v.to(device)
    for step in range(1, 6):
        grads = state.step(betas=betas, eps=1e-3, maximize=maximize, backend=backend)
        g = -grads[1] if maximize else grads[1]
        p = p - 1e-2 * 0.1 * p
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        corrected = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
        p = p - 1e-2 * corrected[0] / (corrected[1].sqrt() + 1e-3)
        t = 0.9 * t + 0.1 * p
    got = (state.params[1], state.exp_avgs[1], state.exp_avg_sqs[1], state.targets[1])
    for one, other in zip(got, (p, m, v, t), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert all(float(each) == 5 for each in state.steps)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_the_reference(dtype: torch.dtype, backend: str, device: str) -> None:
    one, other = (_State(dtype, device, torch.float32, torch.bfloat16) for _ in range(2))
    for _ in range(3):
        one.step(backend=backend)
        other.step(backend="reference")
    _assert_close(one.written, other.written)


def test_compiled_rates_are_not_baked_in() -> None:
    """Numbers that change every step compile twice, the second time for good."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    one, other = (_State(torch.float32, "cpu", torch.float32) for _ in range(2))

    def step(state: _State, grads: list[Tensor], lr: float, momentum: float) -> None:
        adamw_ema_(state.params, grads, *state.lists, lr=lr, weight_decay=0.1, momentum=momentum)

    compiled = torch.compile(step, backend=graphs, fullgraph=True)
    for i in range(4):
        grads = one.randoms(torch.float32, "cpu")
        for run, state in ((compiled, one), (step, other)):
            run(state, grads, 1e-2 / (i + 1), 0.9 + 0.01 * i)
    for got, want in zip(one.written, other.written, strict=True):
        assert torch.equal(got, want)
    assert graphs.frame_count <= 2


@backends(("cpu", "cuda"))
def test_more_parameters_than_a_launch_takes(backend: str, device: str) -> None:
    """Half of them with averages; some of several thread blocks."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(5 + i) if i % 100 else 9_000 + i for i in range(900)]
    outcomes = []
    values = [torch.randn(size, generator=generator).to(device) for size in sizes]
    for each in (backend, "reference"):
        p, g, m, v = ([x.clone() * scale for x in values] for scale in (1, 2, 0, 0))
        t = [x.bfloat16() for x in values[:450]]
        s = [x.clone() for x in t]
        steps = [torch.tensor(float(i % 7), device=device) for i in range(len(values))]
        adamw_ema_(p, g, m, v, steps, t, s, **OPTIONS, rounding_seed=7, backend=each)
        outcomes.append([*p, *m, *v, *steps, *t, *s])
    _assert_close(*outcomes, torch.bfloat16)


@each_backend
def test_stochastic_rounding_keeps_small_steps(backend: str, device: str) -> None:
    """bfloat16 parameters and averages follow those in float32, in the mean."""
    size, steps = 4096, 100

    def trained(dtype: torch.dtype, seeded: bool) -> tuple[Tensor, Tensor]:
        p, t = (torch.ones(size, dtype=dtype, device=device) for _ in "ab")
        m, v, g = torch.zeros_like(p), torch.zeros_like(p), torch.full_like(p, 0.5)
        count = torch.zeros((), device=device)
        for step in range(steps):
            adamw_ema_(
                [p], [g], [m], [v], [count], [t], lr=1e-4, weight_decay=0.0, momentum=0.9,
                rounding_seed=step if seeded else None, backend=backend,
            )  # fmt: skip
        return p.double(), t.double()

    exact = [x.mean().item() for x in trained(torch.float32, False)]
    assert exact == pytest.approx([0.99, 0.9909], abs=1e-4)
    assert all(bool((x == 1).all()) for x in trained(torch.bfloat16, False))
    for x, want in zip(trained(torch.bfloat16, True), exact, strict=True):
        assert abs(x.mean().item() - want) < 5 * x.std().item() / size**0.5


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_backends_draw_the_same(dtype: torch.dtype, backend: str, device: str) -> None:
    """But where the last bits of float32 differ, which is rare."""
    one, other = (_State(dtype, device, dtype, torch.float16) for _ in range(2))
    one.step(rounding_seed=3, backend=backend)
    other.step(rounding_seed=3, backend="reference")
    for a, b in zip(one.written, other.written, strict=True):
        assert int((a != b).sum()) <= a.numel() / 1000


@each_backend
@pytest.mark.parametrize("scalars", ["number", "float32", "float64", "bfloat16"])
def test_scalars_in_every_form(scalars: str, backend: str, device: str) -> None:
    numbers = {"lr": 0.5, "weight_decay": 0.25, "momentum": 0.75}  # which bfloat16 has
    given: dict[str, Any] = dict(numbers)
    if scalars != "number":
        dtype = getattr(torch, scalars)
        given = {k: torch.tensor(x, dtype=dtype, device=device) for k, x in numbers.items()}
    one, other = (_State(torch.float32, device, torch.float32) for _ in range(2))
    one.step(**given, backend=backend)
    other.step(**numbers, backend=backend)
    assert all(map(torch.equal, one.written, other.written))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scaled_gradients_are_unscaled(dtype: torch.dtype, backend: str, device: str) -> None:
    one, other = (_State(dtype, device, dtype) for _ in range(2))
    scale = torch.tensor([8.0], device=device)
    plain = other.step(backend=backend)
    scaled = [8 * grad for grad in plain]
    not_found = torch.zeros(1, device=device)
    one.step(scaled, grad_scale=scale, found_inf=not_found, backend=backend)
    assert all(map(torch.equal, one.written, other.written))
    assert all(map(torch.equal, scaled, plain))


@each_backend
def test_found_inf_skips_all_but_the_average(backend: str, device: str) -> None:
    state = _State(torch.float32, device, torch.float32, torch.bfloat16)
    state.step(backend=backend)
    before = [x.clone() for x in state.written]
    grads = [torch.full_like(p, float("inf")) for p in state.params]
    scale, found = torch.tensor(2.0, device=device), torch.tensor(1.0, device=device)
    state.step(grads, grad_scale=scale, found_inf=found, backend=backend)
    kept = len(before) - len(state.targets) - len(state.shadows)
    assert all(map(torch.equal, state.written[:kept], before[:kept]))
    averages = before[kept : kept + TARGETS]
    ema_update_(averages, state.params[:TARGETS], 0.9)
    _assert_close(state.targets, averages)
    assert all(
        torch.equal(s, t.bfloat16()) for s, t in zip(state.shadows, state.targets, strict=True)
    )


@each_backend
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "sliced", "mixed"])
def test_any_strides(layout: str, backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def strided(x: Tensor, i: int) -> Tensor:
        x = x.clone()
        if layout == "transposed" or (layout == "mixed" and i % 2):
            return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        if layout == "channels_last":
            return x.to(memory_format=torch.channels_last)
        if layout == "sliced":
            return torch.stack([x, x], -1)[..., 0]
        return x

    values = [torch.randn(6, 8, 4, 10, generator=generator).to(device) for _ in range(6)]
    values[3].abs_()
    outcomes = []
    for make in (strided, lambda x, i: x.clone()):
        p, g, m, v, t, s = (make(x, i) for i, x in enumerate(values))
        step = torch.zeros((), device=device)
        adamw_ema_([p], [g], [m], [v], [step], [t], [s], **OPTIONS, backend=backend)
        outcomes.append([p, m, v, t, s])
    _assert_close(*outcomes)
    assert all(x.stride() == strided(x, 0).stride() for x in outcomes[0][:1])
    one, step = torch.ones(4, device=device), torch.zeros((), device=device)
    zeros = [torch.zeros(4, device=device) for _ in range(2)]
    expanded = torch.ones((), device=device).expand(4)  # what sum().backward() gives
    adamw_ema_([one], [expanded], [zeros[0]], [zeros[1]], [step], backend=backend)
    assert one.tolist() == pytest.approx([1 - 1e-5 - 1e-3] * 4)


@each_backend
@pytest.mark.parametrize("seed", [None, 7])
def test_nothing_beside_the_tensors_is_written(seed: int | None, backend: str, device: str) -> None:
    """Neighbours in one poisoned stretch of memory: aligned or not, of one block or of several."""
    sizes, starts = (1, 7, 16, 128, 1000, 40_000), []
    end = 0
    for i, size in enumerate(sizes):
        starts.append(end)
        end += (size + 17 if i % 2 else size + 16) // 16 * 16 + (i == 2)
    values = [x.to(device) for x in torch.randn(6, end, generator=torch.Generator().manual_seed(0))]
    values[3].abs_()
    free = torch.ones(end, dtype=torch.bool, device=device)
    for start, size in zip(starts, sizes, strict=True):
        free[start : start + size] = False
    dtypes = [*[torch.float32] * 4, torch.bfloat16, torch.float16]
    outcomes = []
    for each in (backend, "reference"):
        stretches = [
            x.to(dtype).masked_fill(free, float("nan"))
            for x, dtype in zip(values, dtypes, strict=True)
        ]
        p, g, m, v, t, s = (
            [x[start : start + size] for start, size in zip(starts, sizes, strict=True)]
            for x in stretches
        )
        steps = [torch.zeros((), device=device) for _ in p]
        adamw_ema_(p, g, m, v, steps, t, s, **OPTIONS, rounding_seed=seed, backend=each)
        assert all(torch.equal(x.isnan(), free) for x in stretches)
        outcomes.append([x[~free] for x in stretches])
    _assert_close(*outcomes)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(threads: int) -> None:
    sizes = (1, 70_001, 0, 33_001, 12, 40_000)
    outcomes = []
    before = torch.get_num_threads()
    for count in (threads, before):
        torch.set_num_threads(count)
        try:
            p = [torch.linspace(-1, 1, size) for size in sizes]
            g, m, v, t = ([x.clone() for x in p] for _ in range(4))
            v = [x.abs() for x in v]
            steps = [torch.zeros(()) for _ in p]
            adamw_ema_(p, g, m, v, steps, t, [x.bfloat16() for x in t], **OPTIONS, backend="cpu")
        finally:
            torch.set_num_threads(before)
        outcomes.append([*p, *m, *v, *t])
    assert all(map(torch.equal, *outcomes))


@each_backend
def test_autograd_sees_the_write(backend: str, device: str) -> None:
    p = torch.nn.Parameter(torch.ones(4, device=device))
    weight = torch.ones(4, device=device, requires_grad=True)
    loss = p @ weight
    others = [torch.zeros(4, device=device) for _ in range(3)]
    adamw_ema_([p], *([x] for x in others), [torch.zeros((), device=device)], backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert p.requires_grad


@each_backend
def test_empty_lists(backend: str, device: str) -> None:
    adamw_ema_([], [], [], [], [], backend=backend)


def test_what_no_kernel_takes_goes_to_the_reference(backends_run: list[tuple[str, str]]) -> None:
    p, m, v = (torch.zeros(4) for _ in range(3))
    grad = torch.ones(4, dtype=torch.bfloat16)
    adamw_ema_([p], [grad], [m], [v], [torch.zeros(())])
    assert backends_run == [("adamw_ema_", "reference")]
    with pytest.raises(BackendError, match=r"cpu: .*(moments of their parameters' dtypes|native)"):
        adamw_ema_([p], [grad], [m], [v], [torch.zeros(())], backend="cpu")


@needs_native
def test_auto_takes_the_native_kernel(backends_run: list[tuple[str, str]]) -> None:
    _State(torch.float32, "cpu").step()
    assert backends_run == [("adamw_ema_", "cpu")]


X, ZERO = torch.zeros(4), torch.zeros(())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"grads": []}, ValueError, "grads must be as long as params, got 0 and 1"),
        ({"steps": []}, ValueError, "steps must be as long as params"),
        ({"steps": None}, TypeError, "steps must be a list of tensors, got NoneType"),
        ({"grads": 1.0}, TypeError, "grads must be a list of tensors, got float"),
        ({"targets": [X, X]}, ValueError, "targets must not be more than params, got 2 and 1"),
        ({"shadows": [X]}, ValueError, "shadows must be as long as targets, got 1 and 0"),
        ({"grads": [3]}, TypeError, r"grads\[0\] must be a tensor, got int"),
        ({"grads": [X.int()]}, TypeError, r"grads\[0\] must be of a floating dtype"),
        ({"params": [X + 0j]}, TypeError, r"params\[0\] must be of a floating dtype"),
        ({"grads": [X.to_sparse()]}, TypeError, r"grads\[0\] must be dense"),
        ({"exp_avgs": [torch.zeros(3)]}, ValueError, r"exp_avgs\[0\] must have the shape"),
        ({"steps": [torch.zeros(1)]}, ValueError, r"steps\[0\] must be a 0-dim floating tensor"),
        ({"lr": -1.0}, ValueError, "lr must be in 0 or more, got -1.0"),
        ({"lr": "1"}, TypeError, "lr must be a real number or a tensor, got str"),
        ({"lr": torch.zeros(2)}, ValueError, "lr tensor must be one floating number"),
        ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be in \[0, 1\), got 1.0"),
        ({"eps": -1.0}, ValueError, "eps must be 0 or more"),
        ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
        ({"betas": 0.9}, TypeError, r"betas must be a pair of numbers, got 0\.9"),
        ({"betas": (0.9,)}, TypeError, "betas must be a pair of numbers"),
        ({"betas": ("high", 0.9)}, TypeError, r"betas\[0\] must be a number, got str"),
        ({"maximize": "yes"}, TypeError, "maximize must be True or False, got 'yes'"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be 0 or more, got -1.0"),
        ({"lr": torch.tensor(torch.nan)}, ValueError, "lr must be 0 or more, got nan"),
        ({"weight_decay": torch.tensor(-1.0)}, ValueError, "weight_decay must be 0 or more"),
        ({"found_inf": 1.0}, ValueError, "found_inf must be None or a tensor of one number"),
        ({"rounding_seed": 0.5}, TypeError, "rounding_seed must be None, an int or a tensor"),
    ],
)
def test_bad_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {
        "params": [torch.zeros(4)],
        "grads": [torch.ones(4)],
        "exp_avgs": [torch.zeros(4)],
        "exp_avg_sqs": [torch.zeros(4)],
        "steps": [torch.zeros(())],
    }
    with pytest.raises(error, match=f"adamw_ema_: .*{message}"):
        adamw_ema_(**{**given, **changed})


@each_backend
def test_shared_memory_is_refused(backend: str, device: str) -> None:
    p, g, m, v = (torch.zeros(4, device=device) for _ in range(4))
    step = torch.zeros((), device=device)

    def refuses(*lists: list[Tensor]) -> None:
        with pytest.raises(ValueError, match=r"adamw_ema_: .* share memory"):
            adamw_ema_(*lists, backend=backend)

    refuses([p], [p], [m], [v], [step])
    refuses([p], [g], [m], [m], [step])
    refuses([p], [g], [m], [v], [step], [p])
    refuses([p], [g], [m], [v], [step], [torch.zeros(4, device=device)], [v])
    halves = [p[:2], p[2:]], [g[:2], g[2:]], [m[:2], m[2:]], [v[:2], v[2:]]
    refuses(*halves, [step, step])


def test_shards(tmp_path: Path) -> None:
    """DTensors, as FSDP2 makes them, in a process of their own mesh."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs torch.distributed, in a process that has no group yet")
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        plain, sharded = _State(torch.float32, "cpu", torch.float32), _State(torch.float32, "cpu")
        sharded.targets = [p.clone() for p in sharded.params[:TARGETS]]

        def spread(tensors: list[Tensor]) -> list[Tensor]:
            return [
                distribute_tensor(x, mesh, [Shard(0) if x.ndim else Replicate()]) for x in tensors
            ]

        for name in ("params", "exp_avgs", "exp_avg_sqs", "targets"):
            setattr(sharded, name, spread(getattr(sharded, name)))
        grads = plain.step()
        sharded.step(spread([grad.clone() for grad in grads]))
        for got, want in zip(sharded.written, plain.written, strict=True):
            assert torch.equal(getattr(got, "full_tensor", lambda x=got: x)(), want)
        with pytest.raises(ValueError, match=r"params\[0\] is a DTensor and grads\[0\] is none"):
            sharded.step(grads)
    finally:
        dist.destroy_process_group()


@pytest.mark.tier3
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cuda_graph_follows_the_scalars(backend: str) -> None:
    state, other = (_State(torch.float32, "cuda", torch.float32, torch.bfloat16) for _ in range(2))
    lr, momentum = (torch.tensor(x, device="cuda") for x in (0.1, 0.5))
    grads = other.randoms(torch.float32, "cuda")
    scalars: dict[str, Any] = {"lr": lr, "momentum": momentum, "backend": backend}
    state.step(grads, **scalars)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state.step(grads, **scalars)
    other.step(grads, lr=0.1, momentum=0.5, backend=backend)
    for value in (0.2, 0.3):
        lr.fill_(value)
        momentum.fill_(value)
        graph.replay()
        other.step(grads, lr=value, momentum=value, backend=backend)
    _assert_close(state.written, other.written)


@pytest.mark.tier3
def test_a_cuda_graph_of_tensors_never_seen_is_refused() -> None:
    """Where their addresses would have to be placed while the graph is captured."""
    state = _State(torch.float32, "cuda", torch.float32)
    grads = state.randoms(torch.float32, "cuda")
    with (
        pytest.raises(RuntimeError, match=r"adamw_ema_: .* one call with the same tensors before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        state.step(grads, backend="triton")


@pytest.mark.tier3
@pytest.mark.parametrize(
    ("backend", "kernels"),
    [("triton", ["adamw_count_kernel", "adamw_ema_kernel"]), ("cuda", ["adamw_ema_kernel"])],
)
def test_hundreds_of_parameters_in_few_launches(backend: str, kernels: list[str]) -> None:
    p = [torch.randn(64 * (1 + i % 9), device="cuda") for i in range(400)]
    g, m, v, t = ([torch.rand_like(x) for x in p] for _ in range(4))
    steps = [torch.zeros((), device="cuda") for _ in p]
    adamw_ema_(p, g, m, v, steps, t, backend=backend)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        adamw_ema_(p, g, m, v, steps, t, backend=backend)
        torch.cuda.synchronize()
    launched = sorted(event.name for event in profile.events() if "adamw_" in event.name)
    assert len(launched) == len(kernels)
    for name, kernel in zip(launched, kernels, strict=True):
        assert kernel in name


def test_a_table_is_read_once_it_is_there_on_any_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are shared by optimizers, and these may run on streams of their own."""
    tables = pytest.importorskip("jepa_fast.ops._triton_tables", reason="needs triton")
    done: list[tuple[str, object]] = []
    stream = SimpleNamespace(wait_event=lambda event: done.append(("waits for", event)))
    table = SimpleNamespace(device="cuda:1", record_stream=lambda on: done.append(("read on", on)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", {"cuda:1": stream}.__getitem__)
    assert tables.keep(tables.Placed(table, "its copy")) is table
    assert done == [("waits for", "its copy"), ("read on", stream)]


@pytest.mark.tier3
def test_optimizers_on_two_streams_share_tables() -> None:
    states = [_State(torch.float32, "cuda", torch.float32) for _ in range(3)]
    grads = states[0].randoms(torch.float32, "cuda")
    torch.cuda.synchronize()
    options: dict[str, Any] = {"betas": (0.875, 0.96875), "backend": "triton"}  # of no other test
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(one):
        torch.cuda._sleep(200_000_000)  # the copies of the tables stand behind it
        states[0].step(grads, **options)
    with torch.cuda.stream(other):
        states[1].step(grads, **options)
    torch.cuda.synchronize()
    states[2].step(grads, **options)
    for state in states[:2]:
        _assert_close(state.written, states[2].written)


@pytest.mark.tier3
def test_moved_gradients_make_the_host_wait_for_nothing() -> None:
    """Gradients lie elsewhere at every step where zero_grad() frees them."""
    state = _State(torch.float32, "cuda", torch.float32, torch.bfloat16)
    state.step(backend="triton")
    grads = state.randoms(torch.float32, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        state.step(grads, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
