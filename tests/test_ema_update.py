"""ema_update_: every backend against float64, and the rules that hold for all of them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from backends import backends, needs_native
from samples import Sample
from tolerance import assert_as_accurate
from torch import Tensor

from jepa_fast import BackendError
from jepa_fast.ops import ema_update_
from jepa_fast.ops._registry import OPERATORS
from jepa_fast.ops.ema_update import contract, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Tail only, whole vectors, several blocks with a tail, a multiple of everything, nothing, a number.
SHAPES = ((3,), (8, 16), (3, 1001), (2, 4096), (0, 5), ())
MOMENTA = (0.0, 0.3, 0.5, 0.996, 1.0)

each_backend = backends(OPERATORS["ema_update_"].backends)


def _updated(
    *tensors: Tensor, momentum: float, shadow: bool, backend: str = "auto"
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
    graphs = []

    def keep(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    step = torch.compile(
        lambda target, source, momentum: ema_update_([target], [source], momentum),
        backend=keep,
        fullgraph=True,
    )
    target, source = torch.zeros(3), torch.ones(3)
    want = 0.0
    for momentum in (0.5, 0.6, 0.7, 0.8):
        step(target, source, momentum)
        want = momentum * want + 1 - momentum
        assert target[0].item() == pytest.approx(want, rel=1e-6)
    assert len(graphs) <= 2


X = torch.zeros(4)


@pytest.mark.parametrize(
    ("targets", "sources", "momentum", "shadows", "error", "message"),
    [
        ([X], [], 0.5, None, ValueError, "as long as each other, got 1 and 0"),
        ([X], [torch.ones(4)], 0.5, [X, X], ValueError, "shadows must be as long as targets"),
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
    # Interleaved, not overlapping.
    ema_update_([memory[0:16:2]], [memory[1:16:2]], 0.5, backend=backend)


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
