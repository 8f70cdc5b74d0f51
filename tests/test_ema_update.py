"""ema_update_: every backend against float64, and the rules that hold for all of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import backends, needs_native
from hypothesis import given
from hypothesis import strategies as st
from samples import Sample
from tolerance import assert_as_accurate
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_fast import BackendError
from jepa_fast.ops import _memory, ema_update_
from jepa_fast.ops._registry import OPERATORS
from jepa_fast.ops.ema_update import contract, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Tail only, whole vectors, several blocks with a tail, a multiple of everything, nothing, a number.
SHAPES = ((3,), (8, 16), (3, 1001), (2, 4096), (0, 5), ())
MOMENTA = (0.0, 0.3, 0.5, 0.996, 1.0)

each_backend = backends(OPERATORS["ema_update_"].backends)


def _updated(
    *tensors: Tensor,
    momentum: float,
    shadow: bool,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """The operator as a function: half of the tensors are targets, half sources."""
    targets = [tensor.detach().clone() for tensor in tensors[: len(tensors) // 2]]
    sources = list(tensors[len(tensors) // 2 :])
    shadows = [torch.zeros_like(target) for target in targets] if shadow else None
    ema_update_(targets, sources, momentum, shadows, backend=backend)
    return (*targets, *(shadows or ()))


SAMPLES = [
    Sample(
        name="shadow" if shadow else "plain",
        function=_updated,
        operators=("ema_update_",),
        make=lambda dtype, generator: tuple(
            torch.randn(shape, dtype=dtype, generator=generator) for shape in 2 * ((3, 5), (7,))
        ),
        keywords={"momentum": 0.9, "shadow": shadow},
        differentiable=False,
    )
    for shadow in (False, True)
]


def _randoms(dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]


def _exact(target: Tensor, source: Tensor, momentum: float) -> Tensor:
    return momentum * target.double() + (1 - momentum) * source.double()


def _eager(target: Tensor, source: Tensor, momentum: float) -> Tensor:
    wide = torch.promote_types(target.dtype, torch.float32)
    return (momentum * target.to(wide) + (1 - momentum) * source.to(wide)).to(target.dtype)


def _assert_shadow(shadow: Tensor, target: Tensor) -> None:
    """The target in the shadow's dtype; maybe by way of float32, so within a rounding step."""
    assert_as_accurate(shadow, target.to(shadow.dtype), target.double())


@each_backend
@pytest.mark.parametrize("shadow_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("source_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
def test_every_mix_of_dtypes(
    target_dtype: torch.dtype,
    source_dtype: torch.dtype,
    shadow_dtype: torch.dtype | None,
    backend: str,
    device: str,
    backends_run: list[tuple[str, str]],
) -> None:
    momentum = 0.9
    targets, sources = _randoms(target_dtype, device, 0), _randoms(source_dtype, device, 1)
    before = [target.clone() for target in targets]
    shadows = None
    if shadow_dtype is not None:
        shadows = [torch.full_like(t, float("nan"), dtype=shadow_dtype) for t in targets]
    ema_update_(targets, sources, momentum, shadows, backend=backend)
    assert backends_run == [("ema_update_", backend)]
    for target, old, source in zip(targets, before, sources, strict=True):
        assert_as_accurate(target, _eager(old, source, momentum), _exact(old, source, momentum))
    for shadow, target in zip(shadows or (), targets, strict=shadows is not None):
        _assert_shadow(shadow, target)


@each_backend
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("form", ["float", "float32", "float64", "bfloat16"])
def test_momentum_in_every_form(momentum: float, form: str, backend: str, device: str) -> None:
    """A number, or a tensor on the host or the device; the ends are exact."""
    targets, sources = _randoms(torch.float32, device, 0), _randoms(torch.float32, device, 1)
    before = [target.clone() for target in targets]
    value: float | Tensor = momentum
    if form != "float":
        value = torch.tensor(momentum, dtype=getattr(torch, form), device=device)
        momentum = float(value)
    ema_update_(targets, sources, value, backend=backend)
    for target, old, source in zip(targets, before, sources, strict=True):
        if momentum in (0.0, 1.0):
            assert torch.equal(target, old if momentum == 1.0 else source)
        assert_as_accurate(target, _eager(old, source, momentum), _exact(old, source, momentum))


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tensors_stay_equal(dtype: torch.dtype, backend: str, device: str) -> None:
    targets = _randoms(dtype, device, 0)
    sources = [target.clone() for target in targets]
    ema_update_(targets, sources, 0.996, backend=backend)
    assert all(map(torch.equal, targets, sources))


def _layouts(device: str) -> dict[str, Tensor]:
    """[6, 8, 4, 10] in memory of every kind, inside larger memory where there are gaps."""
    return {
        "contiguous": torch.zeros(6, 8, 4, 10, device=device),
        "channels_last": torch.zeros(6, 8, 4, 10, device=device).to(
            memory_format=torch.channels_last
        ),
        "transposed": torch.zeros(10, 4, 8, 6, device=device).permute(3, 2, 1, 0),
        "sliced": torch.zeros(6, 16, 4, 11, device=device)[:, ::2, :, 1:],
        "misaligned": torch.zeros(6 * 8 * 4 * 10 + 1, device=device)[1:].view(6, 8, 4, 10),
    }


@each_backend
@pytest.mark.parametrize("shadow_layout", [None, "contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("source_layout", [*_layouts("cpu"), "expanded"])
@pytest.mark.parametrize("target_layout", _layouts("cpu"))
def test_any_strides(
    target_layout: str, source_layout: str, shadow_layout: str | None, backend: str, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    old, values = (torch.randn(6, 8, 4, 10, generator=generator).to(device) for _ in range(2))
    target = _layouts(device)[target_layout].copy_(old)
    if source_layout == "expanded":
        source = values[:1, :, :1].expand(6, 8, 4, 10)
    else:
        source = _layouts(device)[source_layout].copy_(values)
    shadow = None if shadow_layout is None else _layouts(device)[shadow_layout]
    ema_update_([target], [source], 0.9, None if shadow is None else [shadow], backend=backend)
    assert_as_accurate(target, _eager(old, source, 0.9), _exact(old, source, 0.9))
    if shadow is not None:
        assert torch.equal(shadow, target)


@each_backend
def test_nothing_beside_the_tensors_is_written(backend: str, device: str) -> None:
    """Targets and shadows that are neighbours in one poisoned stretch of memory, odd sizes."""
    sizes = (1, 7, 16, 33, 128, 1000)
    memory = [torch.full((2 * sum(sizes) + 20,), float("nan"), device=device) for _ in range(2)]
    free = [torch.ones_like(stretch, dtype=torch.bool) for stretch in memory]
    views: list[list[Tensor]] = [[], []]
    for stretch, mask, list_of_views in zip(memory, free, views, strict=True):
        start = 3
        for size in sizes:
            list_of_views.append(stretch[start : start + size])
            mask[start : start + size] = False
            start += size + (size % 3)
        for view in list_of_views:
            view.fill_(1.0)
    targets, shadows = views
    ema_update_(targets, [torch.zeros_like(t) for t in targets], 0.25, shadows, backend=backend)
    for stretch, mask in zip(memory, free, strict=True):
        assert torch.equal(stretch.isnan(), mask)
        assert torch.equal(stretch[~mask], torch.full_like(stretch[~mask], 0.25))


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(threads: int) -> None:
    sizes = (1, 70_000, 0, 33_001, 12, 40_000)  # tensors that end inside a thread's share
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(size, generator=generator) for size in sizes]
    targets = [torch.randn(size, generator=generator) for size in sizes]
    expected = [target.clone() for target in targets]
    reference.ema_update_(expected, sources, [], 0.9)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        one = [target.clone() for target in targets]
        ema_update_(one, sources, 0.9, backend="cpu")
    finally:
        torch.set_num_threads(before)
    whole = [target.clone() for target in targets]
    ema_update_(whole, sources, 0.9, backend="cpu")
    assert all(map(torch.equal, one, whole))
    for got, want, target, source in zip(one, expected, targets, sources, strict=True):
        assert_as_accurate(got, want, _exact(target, source, 0.9))


@each_backend
def test_special_values(backend: str, device: str) -> None:
    """Infinities, NaN, subnormal and huge numbers do what they do in the reference."""
    values = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, 3e38, -3e38, 65504.0]
    grid = torch.tensor(values, device=device)
    target = grid.repeat_interleave(len(values)).contiguous()
    source = grid.repeat(len(values))
    want = target.clone()
    reference.ema_update_([want], [source], [], 0.9)
    ema_update_([target], [source], 0.9, backend=backend)
    torch.testing.assert_close(target, want, equal_nan=True, rtol=1e-6, atol=1e-44)


@each_backend
def test_empty_lists(backend: str, device: str) -> None:
    ema_update_([], [], 0.9, backend=backend)
    ema_update_([], [], 0.9, [], backend=backend)
    ema_update_([torch.zeros(0, device=device)], [torch.zeros(0, device=device)], 0.9)


@each_backend
def test_autograd_sees_the_write(backend: str, device: str) -> None:
    """A target saved for a backward pass and then updated must not give a wrong gradient."""
    target = torch.nn.Parameter(torch.ones(4, device=device))
    shadow = torch.ones(4, device=device)
    weight = torch.ones(4, device=device, requires_grad=True)
    for written in (target, shadow):
        product = (written.detach() * weight).sum() if written is shadow else target @ weight
        ema_update_([target], [torch.zeros(4, device=device)], 0.5, [shadow], backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    assert target.requires_grad


@each_backend
def test_inference_mode(backend: str, device: str) -> None:
    with torch.inference_mode():
        target = torch.ones(4, device=device)
        ema_update_([target], [torch.zeros(4, device=device)], 0.5, backend=backend)
    assert target.tolist() == [0.5] * 4


@needs_native
def test_auto_takes_the_native_kernel(backends_run: list[tuple[str, str]]) -> None:
    ema_update_([torch.zeros(2)], [torch.ones(2)], 0.5)
    assert backends_run == [("ema_update_", "cpu")]


def test_dtypes_no_kernel_knows_go_to_the_reference(backends_run: list[tuple[str, str]]) -> None:
    target = torch.zeros(4).to(torch.float8_e4m3fn)
    ema_update_([target], [torch.ones(4)], 0.5)
    assert backends_run == [("ema_update_", "reference")]
    assert target.float().tolist() == [0.5] * 4
    with pytest.raises(BackendError, match=r"cpu: .*(float8_e4m3fn|native)"):
        ema_update_([target], [torch.ones(4)], 0.5, backend="cpu")


def test_one_tensor_on_another_device() -> None:
    targets = [torch.zeros(2), torch.zeros(2, device="meta")]
    assert contract.UPDATE.why_not("cpu", (targets, targets, [], torch.tensor(0.5)))


def test_compiled_momentum_is_not_baked_in() -> None:
    """A float that changes every step compiles twice, the second time for good."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    step = torch.compile(
        lambda target, source, momentum: ema_update_([target], [source], momentum),
        backend=graphs,
        fullgraph=True,
    )
    target, source = torch.zeros(3), torch.ones(3)
    want = 0.0
    for momentum in (0.5, 0.6, 0.7, 0.8):
        step(target, source, momentum)
        want = momentum * want + 1 - momentum
        assert target[0].item() == pytest.approx(want, rel=1e-6)
    assert graphs.frame_count <= 2


# Stochastic rounding


NARROW = (torch.bfloat16, torch.float16)


def _neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of `dtype` on both sides of float64 numbers, in float64, by bisection of bits."""
    every = torch.arange(0x7C00 if dtype == torch.float16 else 0x7F80).to(torch.int16)
    magnitudes = every.view(dtype).double()
    above = torch.searchsorted(magnitudes, x.abs())
    below = torch.searchsorted(magnitudes, x.abs(), right=True) - 1
    low, high = magnitudes[below], magnitudes[above]
    return torch.where(x < 0, -high, low), torch.where(x < 0, -low, high)


@each_backend
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounding_is_to_a_neighbour_and_right_on_average(
    dtype: torch.dtype, backend: str, device: str
) -> None:
    """Numbers of all sizes, subnormal ones of float16 too, many times each."""
    values = [1.0, 1 + 2**-10, 1.2345, -3.3333, 1e-4, 6.1e-5, 3.3e-6, -4.4e-7, 3e-8, -1e-8, 2e4]
    draws = 4000
    exact = torch.tensor(values, dtype=torch.float32).repeat_interleave(draws)
    target = torch.zeros_like(exact, dtype=dtype).to(device)
    ema_update_([target], [exact.to(device)], 0.0, rounding_seed=5, backend=backend)
    low, high = _neighbours(exact.double(), dtype)
    got = target.cpu().double()
    assert bool(((got == low) | (got == high)).all())
    gap = (high - low).clamp_min(2.0**-140)
    shares = ((got - low) / gap).view(-1, draws).mean(1)
    expected = ((exact.double() - low) / gap).view(-1, draws)[:, 0]
    sigma = (expected * (1 - expected) / draws).sqrt()
    assert bool(((shares - expected).abs() <= 5 * sigma).all()), (shares, expected)


@each_backend
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_is_exact_is_not_rounded(dtype: torch.dtype, backend: str, device: str) -> None:
    """Every number of a narrow dtype stays what it is, and NaN NaN; the huge are not small."""
    every = torch.arange(2**16).to(torch.int16).view(dtype)
    every = every[every.isfinite()].to(device)
    if backend == "triton" and device == "cpu":  # the interpreter has no subnormal bfloat16
        every = every[(every == 0) | (every.float().abs() >= 2.0**-126)]
    wide = torch.cat([every.float(), torch.tensor([float("nan"), 3.4e38, -3.4e38]).to(device)])
    for target in (torch.zeros_like(wide), torch.zeros_like(wide, dtype=dtype)):
        shadow = torch.zeros_like(wide, dtype=dtype)
        ema_update_([target], [wide], 0.0, [shadow], rounding_seed=-7, backend=backend)
        assert torch.equal(shadow[:-3], every)
        assert shadow[-3].isnan()
        largest = float("inf") if dtype == torch.float16 else torch.finfo(dtype).max
        assert shadow[-2:].abs().min() >= largest
        assert torch.equal(target.to(dtype)[:-3], every)


@each_backend
@pytest.mark.parametrize("shadow_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
def test_all_backends_draw_the_same(
    target_dtype: torch.dtype, shadow_dtype: torch.dtype | None, backend: str, device: str
) -> None:
    """Bit for bit, whatever the size; dtypes that are not narrow are rounded to the nearest."""
    for scale, source_dtype in ((1.0, torch.float32), (1e-5, torch.bfloat16)):
        sources = [scale * x for x in _randoms(source_dtype, device, 1)]
        before = [scale * x for x in _randoms(target_dtype, device, 0)]
        outcomes = []
        for each, seed in ((backend, 11), ("reference", 11), (backend, 12), (backend, None)):
            targets = [target.clone() for target in before]
            shadows = shadow_dtype and [t.new_zeros(t.shape, dtype=shadow_dtype) for t in targets]
            ema_update_(targets, sources, 0.9, shadows, rounding_seed=seed, backend=each)
            outcomes.append([*targets, *(shadows or [])])
        for one, same, other, nearest in zip(*outcomes, strict=True):
            assert torch.equal(one, same)
            if one.dtype not in NARROW and target_dtype not in NARROW:
                torch.testing.assert_close(one, nearest)
            elif one.numel() > 100:
                assert not torch.equal(one, other)


@each_backend
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
def test_what_is_drawn_goes_by_the_place_in_memory(layout: str, backend: str, device: str) -> None:
    """In all backends alike; where target and source differ, by the place in the shape."""
    values = torch.randn(6, 8, 4, 10, generator=torch.Generator().manual_seed(0)).to(device)
    for alike in (True, False):
        outcomes = []
        for each in (backend, "reference"):
            target = torch.empty_like(_layouts(device)[layout], dtype=torch.bfloat16).zero_()
            if layout == "sliced":
                target = _layouts(device)[layout].bfloat16()
            source = torch.empty_like(target, dtype=torch.float32).copy_(values)
            source = source if alike else source.contiguous()
            ema_update_([target], [source], 0.0, rounding_seed=3, backend=each)
            outcomes.append(target)
        assert torch.equal(*outcomes)


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing_that_is_drawn(threads: int) -> None:
    sizes = (1, 70_001, 0, 33_001, 12, 40_000)  # shares that begin at odd elements
    sources = [torch.linspace(-1, 1, size) for size in sizes]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        outcomes = []
        for backend in ("cpu", "reference"):
            targets = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]
            ema_update_(targets, sources, 0.3, rounding_seed=1, backend=backend)
            outcomes.append(targets)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *outcomes))


@each_backend
def test_a_bfloat16_average_only_follows_if_it_is_rounded_stochastically(
    backend: str, device: str
) -> None:
    """At momentum 0.9999 every update is far below half a step of bfloat16."""
    steps, momentum, size = 400, 0.9999, 4096
    source = [torch.full((size,), 2.0, dtype=torch.bfloat16, device=device)]
    nearest, stochastic = ([torch.ones(size, dtype=torch.bfloat16, device=device)] for _ in "ab")
    wide = [torch.ones(size, device=device)]
    for step in range(steps):
        ema_update_(nearest, source, momentum, backend=backend)
        ema_update_(stochastic, source, momentum, rounding_seed=step, backend=backend)
        ema_update_(wide, source, momentum, backend=backend)
    assert bool((nearest[0] == 1).all())  # lost, all 400 times
    expected = 2 - momentum**steps
    assert wide[0].mean().item() == pytest.approx(expected, rel=1e-5)
    # Every element is now 1 or a step of 2^-7 or some more; the mean is the float32 average.
    moved = stochastic[0].double()
    sigma = moved.std().item() / size**0.5
    assert abs(moved.mean().item() - expected) < 5 * sigma
    assert 0 < sigma < 1e-3


def test_a_seed_may_be_a_tensor_or_any_integer() -> None:
    def drawn(seed: Any) -> Tensor:
        target = torch.zeros(1000, dtype=torch.bfloat16)
        ema_update_([target], [torch.linspace(0, 1, 1000)], 0.5, rounding_seed=seed)
        return target

    expected = drawn(-3)
    assert torch.equal(drawn(torch.tensor(-3)), expected)
    numpy = pytest.importorskip("numpy")
    assert torch.equal(drawn(numpy.int64(-3)), expected)
    assert not torch.equal(drawn(2**63 - 1), expected)


def test_opcheck_with_a_seed() -> None:
    targets, sources = [torch.zeros(5).bfloat16()], [torch.ones(5)]
    momentum, seed = torch.tensor(0.5), torch.tensor(3)
    arguments = (targets, sources, [torch.zeros(5).half()], momentum, seed, "auto")
    torch.library.opcheck(contract.UPDATE.call, arguments)


def test_compiled_seeds_are_not_baked_in() -> None:
    torch._dynamo.reset()

    def update(target: Tensor, source: Tensor, seed: int) -> None:
        ema_update_([target], [source], 0.5, rounding_seed=seed)

    step = torch.compile(update, backend="eager", fullgraph=True)
    for seed in (1, 2, 3):
        source = torch.linspace(0, 1, 1000)
        one, other = (torch.zeros(1000, dtype=torch.bfloat16) for _ in range(2))
        step(one, source, seed)
        update(other, source, seed)
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (0.5, TypeError, "rounding_seed must be None, an int or a tensor, got float"),
        (True, TypeError, "must be None, an int or a tensor, got bool"),
        (2**63, ValueError, "must fit into 64 bits with sign"),
        (torch.zeros(1).long(), ValueError, r"must be int64 and 0-dim, got .* \[1\]"),
        (torch.tensor(1.0), ValueError, "must be int64 and 0-dim, got torch.float32"),
        (torch.zeros((), dtype=torch.int64, device="meta"), ValueError, "on meta"),
    ],
)
def test_bad_seeds(seed: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"ema_update_: .*{message}"):
        ema_update_([torch.zeros(2)], [torch.ones(2)], 0.5, rounding_seed=seed)


def test_dtypes_that_cannot_be_rounded_stochastically_are_refused() -> None:
    target = torch.zeros(4).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"bfloat16, float16 and wider dtypes, got .*float8"):
        ema_update_([target], [torch.ones(4)], 0.5, rounding_seed=1)


# Shards


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """A mesh of this process alone."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs torch.distributed, in a process that has no group yet")
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


class _NoDispatch(TorchDispatchMode):
    """Refuses operators on DTensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert not any("DTensor" in kind.__name__ for kind in types), func
        return func(*args, **(kwargs or {}))


@backends(("reference", "cpu"))
def test_shards_are_updated_where_they_are(mesh: Any, backend: str, device: str) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    old, source = torch.ones(4, 6), torch.zeros(4, 6)
    for placement in (Shard(0), Shard(1), Replicate()):
        target, other, shadow = (
            distribute_tensor(x.clone(), mesh, [placement]) for x in (old, source, old.bfloat16())
        )
        plain = torch.ones(3)
        version = target._version
        with _NoDispatch():
            ema_update_(
                [target, plain],
                [other, torch.zeros(3)],
                0.25,
                [shadow, torch.zeros(3)],
                backend=backend,
            )
        assert target.full_tensor().tolist() == torch.full((4, 6), 0.25).tolist()
        assert shadow.full_tensor().tolist() == torch.full((4, 6), 0.25).tolist()
        assert plain.tolist() == [0.25] * 3
        assert target._version > version  # autograd sees the write


def test_parameters_of_fsdp(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    modules = [torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7)) for _ in "ab"]
    plain = [[p.detach().clone() for p in module.parameters()] for module in modules]
    for module in modules:
        fully_shard(module, mesh=mesh)
    targets, sources = (list(module.parameters()) for module in modules)
    ema_update_(targets, sources, 0.9)
    ema_update_(*plain, 0.9)
    for target, want in zip(targets, plain[0], strict=True):
        assert torch.equal(target.full_tensor(), want)


def test_shards_that_do_not_fit_are_refused(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    rows, columns, whole = (
        distribute_tensor(torch.ones(4, 6), mesh, [placement])
        for placement in (Shard(0), Shard(1), Replicate())
    )
    sums = DTensor.from_local(torch.ones(4, 6), mesh, [Partial()])

    def refuses(message: str, *arguments: Any) -> None:
        with pytest.raises(ValueError, match=f"ema_update_: {message}"):
            ema_update_(*arguments)

    refuses(r"targets\[0\] and sources\[0\] must be placed alike", [rows], [columns], 0.5)
    refuses(r"targets\[0\] and shadows\[0\] must be", [rows], [rows.clone()], 0.5, [whole])
    refuses(r"targets\[0\] is a DTensor and sources\[0\] is none", [rows], [torch.ones(4, 6)], 0.5)
    refuses(r"sources\[0\] is a DTensor and targets\[0\] is none", [torch.ones(4, 6)], [rows], 0.5)
    refuses(r"targets\[0\] is a sum whose parts lie on several ranks", [sums], [sums.clone()], 0.5)


def test_without_dtensors_their_module_is_not_imported() -> None:
    code = (
        "import sys, torch; from jepa_fast import ops; "
        "ops.ema_update_([torch.zeros(2)], [torch.ones(2)], 0.5); "
        "print('torch.distributed.tensor' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


X = torch.zeros(4)


@pytest.mark.parametrize(
    ("targets", "sources", "momentum", "shadows", "error", "message"),
    [
        ([X], [], 0.5, None, ValueError, "as long as each other, got 1 and 0"),
        ([X], [torch.ones(4)], 0.5, [X, X], ValueError, "shadows must be as long as targets"),
        (None, [X], 0.5, None, TypeError, "targets must be a list of tensors, got NoneType"),
        ([X], 3, 0.5, None, TypeError, "sources must be a list of tensors, got int"),
        ([X], [X], 0.5, 0.5, TypeError, "shadows must be a list of tensors, got float"),
        ([X], [torch.ones(3)], 0.5, None, ValueError, r"sources\[0\] must have the shape"),
        ([X], [torch.ones(4)], 0.5, [torch.ones(2)], ValueError, r"shadows\[0\] must have the"),
        ([X, 3], [X, X], 0.5, None, TypeError, r"targets\[1\] must be a tensor, got int"),
        ([X], [torch.ones(4).int()], 0.5, None, TypeError, r"sources\[0\] must be of a floating"),
        ([X], [torch.ones(4)], "1", None, TypeError, "must be a real number or a tensor, got str"),
        ([X], [torch.ones(4)], 1.5, None, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
        ([X], [torch.ones(4)], float("nan"), None, ValueError, r"in \[0, 1\], got nan"),
        ([X], [torch.ones(4)], torch.tensor(-0.5), None, ValueError, r"in \[0, 1\], got -0.5"),
        ([X], [torch.ones(4)], torch.ones(1), None, ValueError, "floating and 0-dim"),
        ([X], [torch.ones(4)], torch.tensor(1), None, ValueError, "floating and 0-dim"),
        ([X], [torch.ones(4)], torch.tensor(1.0, device="meta"), None, ValueError, "on meta"),
    ],
)
def test_bad_arguments(
    targets: Any, sources: Any, momentum: Any, shadows: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"ema_update_: .*{message}"):
        ema_update_(targets, sources, momentum, shadows)


def test_momentum_may_be_any_real_number() -> None:
    numpy = pytest.importorskip("numpy")
    for momentum in (numpy.float32(0.75), numpy.float64(0.75), Fraction(3, 4)):
        target = torch.ones(3)
        ema_update_([target], [torch.zeros(3)], momentum)
        assert target.tolist() == [0.75] * 3
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 1.5"):
        ema_update_([target], [target.clone()], numpy.float32(1.5))


@each_backend
def test_shared_memory_is_refused(backend: str, device: str) -> None:
    memory = torch.zeros(20, device=device)
    a, b, overlapping = memory[:8], memory[8:16], memory[4:12]
    other = torch.ones(8, device=device)
    square = torch.zeros(4, 4, device=device)

    def refuses(message: str, targets: Any, sources: Any, shadows: Any = None) -> None:
        with pytest.raises(ValueError, match=f"ema_update_: {message}"):
            ema_update_(targets, sources, 0.5, shadows, backend=backend)

    refuses("(targets|sources).* share memory", [a], [a])
    refuses(r"targets\[1\] and targets\[0\] share memory", [a, a], [other, other])
    refuses("(targets|sources).* share memory", [a], [overlapping])
    refuses("(targets|shadows).* share memory", [a], [other], [overlapping])
    refuses("(sources|shadows).* share memory", [a], [b], [b])
    refuses("(targets|sources).* share memory", [square], [square.T])
    refuses(r"targets\[0\] is written", [torch.zeros(1, device=device).expand(4)], [other[:4]])
    ema_update_([a, b], [other, other], 0.5, backend=backend)  # sources may repeat
    assert memory.tolist() == [0.5] * 16 + [0.0] * 4
    refuses("(targets|sources).* share memory", [square[:, :3]], [square[:, 1:]])
    refuses("(targets|sources).* share memory", [square[:, 1]], [square[1]])
    refuses(r"targets\[0\] is written", [memory.unfold(0, 3, 1)], [memory.new_ones(18, 3)])
    # Interleaved, not overlapping.
    ema_update_([memory[0:16:2]], [memory[1:16:2]], 0.5, backend=backend)
    columns, rows = [square[:, :1], square[:, 1:3], square[:, 3]], [square[::2], square[1::2]]
    ema_update_(columns, [torch.ones_like(x) for x in columns], 0.5, backend=backend)
    ema_update_(rows, [torch.ones_like(x) for x in rows], 0.5, backend=backend)
    assert square.tolist() == [[0.75] * 4] * 4


@given(st.data())
def test_what_shares_memory_is_known_exactly(data: st.DataObject) -> None:
    """Beside the places of all elements, one by one."""

    def drawn() -> Tensor:
        sizes = data.draw(st.lists(st.integers(1, 4), max_size=3))
        strides = data.draw(st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)))
        return memory.as_strided(sizes, strides, data.draw(st.integers(0, 20)))

    def places(tensor: Tensor) -> list[int]:
        numbers = torch.arange(128).as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )
        return numbers.flatten().tolist()

    memory = torch.zeros(128)
    one, other = drawn(), drawn()
    folded = any(len(set(places(x))) < x.numel() for x in (one, other))
    shared = bool(set(places(one)) & set(places(other)))
    apart = {"targets": [one], "shadows": [other]}
    refused = pytest.raises(ValueError, match=r"ema_update_: .* (share|must have) memory")
    with refused if folded or shared else nullcontext():
        _memory.check_apart("ema_update_", apart, {})


@pytest.mark.tier3
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cuda_graph_follows_a_device_momentum(backend: str) -> None:
    momentum = torch.tensor(0.5, device="cuda")
    targets = [torch.zeros(1000, device="cuda"), torch.zeros(7, device="cuda").bfloat16()]
    sources = [torch.ones_like(target) for target in targets]
    ema_update_(targets, sources, momentum, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(targets, sources, momentum, backend=backend)
    for target in targets:
        target.zero_()
    for value in (0.5, 0.25):
        momentum.fill_(value)
        graph.replay()
    for target in targets:
        assert target.tolist() == [0.875] * target.numel()


@pytest.mark.tier3
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cuda_graph_follows_a_device_seed(backend: str) -> None:
    seed = torch.tensor(0, device="cuda")
    source = [torch.linspace(0, 1, 1000, device="cuda")]
    target = [torch.zeros(1000, dtype=torch.bfloat16, device="cuda")]
    ema_update_(target, source, 0.5, rounding_seed=seed, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(target, source, 0.5, rounding_seed=seed, backend=backend)
        seed += 1
    want = [torch.zeros(1000, dtype=torch.bfloat16)]
    target[0].zero_()
    for step in range(4):
        graph.replay()
        ema_update_(want, [source[0].cpu()], 0.5, rounding_seed=step, backend="reference")
    assert torch.equal(target[0].cpu(), want[0])


@backends(("cpu", "cuda"))
def test_more_tensors_than_a_launch_takes(backend: str, device: str) -> None:
    """Some of several thread blocks; what is drawn goes by the tensor."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(5 + i) if i % 100 else 9_000 + i for i in range(850)]
    before = [torch.randn(size, generator=generator).to(device, torch.bfloat16) for size in sizes]
    sources = [torch.randn(size, generator=generator).to(device) for size in sizes]
    outcomes = []
    for each in (backend, "reference"):
        targets = [target.clone() for target in before]
        shadows = [target.half() for target in before]
        ema_update_(targets, sources, 0.9, shadows, rounding_seed=7, backend=each)
        outcomes.append([*targets, *shadows])
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


@pytest.mark.tier3
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_hundreds_of_tensors_in_few_launches(backend: str) -> None:
    targets = [torch.randn(64 * (1 + i % 9), device="cuda") for i in range(600)]
    sources = [torch.randn_like(target) for target in targets]
    ema_update_(targets, sources, 0.5, backend=backend)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ema_update_(targets, sources, 0.5, backend=backend)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if "ema_update" in event.name]
    assert len(kernels) == 1


@pytest.mark.tier3
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_beyond_two_to_the_31_elements(backend: str) -> None:
    size = 2**31 + 4096 + 3
    target = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    source = torch.ones(size, dtype=torch.bfloat16, device="cuda")
    ema_update_([target], [source], 0.5, backend=backend)
    assert bool((target[-8192:] == 0.5).all())
    assert bool((target[:8192] == 0.5).all())
    assert bool((target == 0.5).all())


@pytest.mark.tier3
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_bit_identical_from_run_to_run(backend: str) -> None:
    results = []
    for _ in range(2):
        targets, sources = _randoms(torch.bfloat16, "cuda", 0), _randoms(torch.float32, "cuda", 1)
        ema_update_(targets, sources, 0.996, backend=backend)
        results.append(targets)
    assert all(map(torch.equal, *results))
