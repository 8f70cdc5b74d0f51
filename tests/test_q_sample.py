"""q_sample and denoising_loss, and the numbers that they draw."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from backends import backends
from samples import Sample, normal
from tolerance import assert_as_accurate
from torch import Tensor

from jepa_fast import ops
from jepa_fast.ops import _normal
from jepa_fast.ops._registry import OPERATORS as REGISTERED

OPERATORS = ("q_sample", "q_sample_backward")
LOSS_OPERATORS = ("denoising_loss", "denoising_loss_backward")
each_backend = backends(REGISTERED["q_sample"].backends)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)


def _seed(number: int, device: str = "cpu") -> Tensor:
    return torch.tensor([number], device=device)


def _q_sample(name: str, tokens: int = 3, width: int = 5, draws: int = 0, **keywords) -> Sample:
    def make(dtype: torch.dtype, g: torch.Generator, times: int = 1):
        t, d, n = times * tokens, times * width, [times * draws] * (draws > 0)
        level = partial(normal, dtype=dtype, generator=g, grad=False)
        target = normal(t, d, dtype=dtype, generator=g)
        return target, level(*n, t), level(*n, t), _seed(7)

    larger = partial(make, times=2)
    return Sample(name, ops.q_sample, OPERATORS, make, keywords, make_larger=larger)


def _loss(name: str, tokens: int = 3, draws: int = 0, target: bool = False, **keywords) -> Sample:
    def make(dtype: torch.dtype, g: torch.Generator, times: int = 1):
        t, d, n = times * tokens, times * 5, [times * draws] * (draws > 0)
        prediction = normal(*n, t, d, dtype=dtype, generator=g)
        seed = _seed(7)
        return (prediction, seed, normal(t, d, dtype=dtype, generator=g))[: 3 if target else 2]

    larger = partial(make, times=2)
    return Sample(name, ops.denoising_loss, LOSS_OPERATORS, make, keywords, make_larger=larger)


SAMPLES = [
    _q_sample("[T]"),
    _q_sample("[n, T]", draws=2),
    _q_sample("first row", first_row=2**40),
    _q_sample("batch 0", tokens=0),
    _loss("noise"),
    _loss("noise [n, T, D]", draws=2),
    _loss("velocity", target=True),
    _loss("velocity [n, T, D]", draws=2, target=True, first_row=5),
    _loss("noise batch 0", tokens=0),
]


def _numbers(
    rows: int, width: int, seed: int, backend: str = "auto", device: str = "cpu", first_row: int = 0
) -> Tensor:
    """The noise by itself, [rows, width] float32."""
    target, level = torch.zeros(rows, width, device=device), torch.ones(rows, device=device)
    return ops.q_sample(target, level, level, _seed(seed, device), first_row, backend=backend)


# The generator: known words, and the same in every backend.


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_has_its_authors_test_vectors(
    key: int, counter: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = _normal.philox(torch.tensor(key), tuple(map(torch.tensor, counter)))
    assert tuple(map(int, words)) == expected


@each_backend
@pytest.mark.parametrize("width", [1, 63, 64, 65, 384, 1025])
def test_numbers_are_those_of_the_reference(
    width: int, backend: str, device: str, backends_run: list[tuple[str, str]]
) -> None:
    """Each of a row, a seed and a first row above 32 bits."""
    for seed, first_row in ((0, 0), (-(2**62) + 12345, 2**33 - 2)):
        got = _numbers(4, width, seed, backend, device, first_row).cpu()
        exact = _normal.standard_normal(_seed(seed), first_row, 4, width)
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-7)
    assert ("q_sample", backend) in backends_run


def test_a_number_is_a_function_of_seed_row_and_column_alone() -> None:
    """Whatever is drawn beside it, and by however many threads."""
    whole = _numbers(500, 200, 3)
    assert torch.equal(_numbers(100, 200, 3, first_row=400), whole[400:])
    assert torch.equal(_numbers(500, 70, 3), whole[:, :70])
    level = torch.ones(5, 100)
    draws = ops.q_sample(torch.zeros(100, 200), level, level, _seed(3))
    assert torch.equal(draws.flatten(0, 1), whole)
    threads = torch.get_num_threads()
    prediction = torch.zeros(500, 200)
    losses = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(_numbers(500, 200, 3), whole)
            losses.append(ops.denoising_loss(prediction, _seed(3)))
    finally:
        torch.set_num_threads(threads)
    assert losses[0] == losses[1] == losses[2]


def test_no_number_comes_twice() -> None:
    """Of rows 2^k and seeds 2^k, for every k that 64 bits have, no two begin alike."""
    starts = [_numbers(1, 64, 0, first_row=first) for first in [0, *(2**k for k in range(63))]]
    starts += [_numbers(1, 64, 2**k) for k in range(63)] + [_numbers(1, 64, -(2**63))]
    numbers = torch.cat(starts)  # [128, 64]
    assert len(numbers.unique(dim=0)) == 128
    correlation = torch.corrcoef(numbers).fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / 8  # of 8128 pairs, none by 5.5 deviations of 1 / 8


# The distribution: bounds at five standard deviations of what is measured, or at 1e-6.

ROWS, WIDTH = 2048, 512


@pytest.fixture(scope="module")
def numbers() -> Tensor:
    """A million of them, float64."""
    return _numbers(ROWS, WIDTH, 20).double()


def test_moments(numbers: Tensor) -> None:
    spread = math.sqrt(numbers.numel())
    # The variance of z^k is (2k - 1)!! - ((k - 1)!!)^2 for even k.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        found = numbers.pow(power).mean().item()
        assert abs(found - mean) < 5 * math.sqrt(variance) / spread, power
    # And of each word of a counter, each lane, each group: by columns.
    assert numbers.mean(0).abs().max() < 5.5 / math.sqrt(ROWS)
    assert (numbers.square().mean(0) - 1).abs().max() < 5.5 * math.sqrt(2 / ROWS)


def test_kolmogorov_smirnov(numbers: Tensor) -> None:
    ordered = torch.special.ndtr(numbers.flatten().sort().values)
    count = len(ordered)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((ordered - steps[:-1]).max(), (steps[1:] - ordered).max())
    assert distance * math.sqrt(count) < 2.7  # of probability 2 exp(-2 * 2.7^2) = 1e-6


def test_tails() -> None:
    """As many beyond 3, 4 and 5 as there should be, on either side, and none impossible."""
    numbers = torch.cat([_numbers(4096, 1024, seed) for seed in range(4)])
    for beyond in (3.0, 4.0, 5.0):
        expected = numbers.numel() * 0.5 * math.erfc(beyond / math.sqrt(2))  # 4.8 beyond 5
        for side in (numbers, -numbers):
            count = int((side > beyond).sum())
            assert abs(count - expected) < 5 * math.sqrt(expected), (beyond, count, expected)
    # The smallest uniform number is 2^-32.
    assert 5 < numbers.abs().max() < math.sqrt(64 * math.log(2)) + 1e-3


def test_what_lies_side_by_side_is_independent(numbers: Tensor) -> None:
    """Columns, rows and seeds next to each other, in values and in squares."""
    other = _numbers(ROWS, WIDTH, 21).double()
    pairs = [(numbers[:, :-lag], numbers[:, lag:]) for lag in (1, 2, 16, 32, 48, 64)]
    pairs += [(numbers[:-1], numbers[1:]), (numbers, other), (numbers[:-1], other[1:])]
    for first, second in pairs:
        for left, right in ((first, second), (first.square() - 1, second.square() - 1)):
            scale = (left.square().mean() * right.square().mean()).sqrt()
            correlation = (left * right).mean() / scale
            assert correlation.abs() < 5 / math.sqrt(left.numel())
    # Two columns of a counter's words together are spread as two independent ones: chi-squared of
    # 8 by 8 equally probable cells.
    for lag in (16, 32):
        first, second = numbers[:, ::64].flatten(), numbers[:, lag::64].flatten()
        cell = (torch.special.ndtr(torch.stack([first, second])) * 8).long().clamp(0, 7)
        counts = torch.bincount(cell[0] * 8 + cell[1], minlength=64).double()
        expected = len(first) / 64
        assert ((counts - expected).square() / expected).sum() < 63 + 5 * math.sqrt(126)


def test_a_seed_comes_from_torchs_generator() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = ops.noise_seed("cpu"), ops.noise_seed("cpu")
    assert first.shape == (1,)
    assert first.dtype == torch.int64
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(ops.noise_seed("cpu"), first)


# The operators.


@each_backend
@each_dtype
@pytest.mark.parametrize(("draws", "width"), [(1, 63), (3, 384)])
def test_noising_is_as_accurate_as_eager(
    draws: int,
    width: int,
    dtype: torch.dtype,
    backend: str,
    device: str,
    backends_run: list[tuple[str, str]],
    poisoned_memory: None,
    nearest_bfloat16: None,
) -> None:
    g = torch.Generator().manual_seed(width)
    target = torch.randn(5, width, generator=g).to(dtype)
    signal, noise = torch.rand(2, draws, 5, generator=g)

    def run(dtype: torch.dtype, backend: str, device: str = "cpu") -> Tensor:
        arguments = (target.to(dtype), signal, noise, _seed(9))
        return ops.q_sample(*(x.to(device) for x in arguments), backend=backend).cpu()

    got = run(dtype, backend, device)
    assert ("q_sample", backend) in backends_run
    exact = run(torch.float64, "reference")
    if dtype == torch.float64:
        # The noise is in float32, whatever it is added to.
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-7)
    else:
        assert_as_accurate(got, run(dtype, "reference"), exact)


@each_backend
@each_dtype
@pytest.mark.parametrize("velocity", [False, True])
@pytest.mark.parametrize(("draws", "width"), [(1, 63), (3, 384)])
def test_loss_is_as_accurate_as_eager(
    draws: int,
    width: int,
    velocity: bool,
    dtype: torch.dtype,
    backend: str,
    device: str,
    backends_run: list[tuple[str, str]],
    poisoned_memory: None,
    nearest_bfloat16: None,
) -> None:
    """Loss and gradient; the target in float32, as the heads have it."""
    g = torch.Generator().manual_seed(width)
    prediction = torch.randn(draws, 5, width, generator=g).to(dtype)
    target = torch.randn(5, width, generator=g)

    def run(dtype: torch.dtype, backend: str, device: str = "cpu") -> list[Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        predicted = prediction.to(device, dtype).requires_grad_()
        goal = target.to(device, wide).requires_grad_() if velocity else None
        loss = ops.denoising_loss(predicted, _seed(9, device), goal, backend=backend)
        taking = [predicted, *([] if goal is None else [goal])]
        grads = torch.autograd.grad(loss * 3, taking)
        return [loss.detach().cpu(), *(grad.cpu() for grad in grads)]

    got = run(dtype, backend, device)
    assert ("denoising_loss", backend) in backends_run
    exact = run(torch.float64, "reference")
    eager = run(dtype, "reference")
    for mine, theirs, truth in zip(got, eager, exact, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-9)
        else:
            assert_as_accurate(mine, theirs, truth)


@each_backend
def test_loss_finds_the_noise_of_q_sample(backend: str, device: str) -> None:
    """What q_sample added is predicted without error, and so is the velocity."""
    torch.manual_seed(0)
    target = torch.randn(6, 100, device=device)
    level, seed = torch.full((2, 6), 0.5, device=device), ops.noise_seed(device)
    arguments = (target, torch.zeros_like(level), torch.ones_like(level), seed)
    e = ops.q_sample(*arguments, backend=backend)
    assert ops.denoising_loss(e, seed, backend=backend).item() == 0.0
    assert ops.denoising_loss(target - e, seed, target, backend=backend).item() < 1e-12
    assert ops.denoising_loss(e, seed, first_row=1, backend=backend).item() > 1.5
    x = ops.q_sample(target, level, level, seed, backend=backend)
    torch.testing.assert_close(x, 0.5 * target + 0.5 * e)


@each_backend
def test_a_gradient_of_one_is_not_changed_behind_the_graphs_back(backend: str, device: str) -> None:
    prediction = torch.randn(3, 70, device=device, requires_grad=True)
    seed = _seed(1, device)
    loss = ops.denoising_loss(prediction, seed, backend=backend)
    (first,) = torch.autograd.grad(loss, prediction, retain_graph=True)
    kept = first.clone()
    first.zero_()
    loss.backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad, kept)
    ops.denoising_loss(prediction, seed, backend=backend).backward()  # sums up in what is there
    torch.testing.assert_close(prediction.grad, 2 * kept)


@each_backend
def test_where_there_is_nothing(backend: str, device: str) -> None:
    seed, level = _seed(0, device), torch.ones(2, 0, device=device)
    target = torch.zeros(0, 4, device=device)
    assert ops.q_sample(target, level, level, seed, backend=backend).shape == (2, 0, 4)
    prediction = torch.zeros(2, 0, 4, device=device, requires_grad=True)
    loss = ops.denoising_loss(prediction, seed, target, backend=backend)
    loss.backward()
    assert loss.item() == 0.0
    assert prediction.grad is not None
    assert prediction.grad.shape == (2, 0, 4)


def test_gradients_of_many_upstream_ones_at_once() -> None:
    """Which torch maps over the backward pass, as `jacobian(vectorize=True)` does."""
    leaves = [torch.randn(5, 3, requires_grad=True) for _ in range(2)]
    loss = ops.denoising_loss(leaves[0], _seed(3), leaves[1])
    wanted = torch.autograd.grad(loss, leaves, retain_graph=True)
    upstream = torch.tensor([1.0, 2.0, 0.0])
    found = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True)
    for grads, grad in zip(found, wanted, strict=True):
        torch.testing.assert_close(grads, upstream[:, None, None] * grad)


def test_compiles_where_nothing_takes_a_gradient() -> None:
    torch._dynamo.reset()

    def both(target: Tensor, level: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        x = ops.q_sample(target, level, level, seed)
        return x, ops.denoising_loss(x, seed, target)

    arguments = (torch.randn(3, 5), torch.rand(2, 3), _seed(4))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*arguments), both(*arguments), strict=True):
        torch.testing.assert_close(got, want)


def test_low_precision_computes_in_float32() -> None:
    torch.manual_seed(0)
    prediction = torch.randn(3, 70).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.denoising_loss(prediction, _seed(1))
    assert loss.dtype == torch.float32
    exact = ops.denoising_loss(prediction.double(), _seed(1))
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    loss.backward()
    assert prediction.grad is not None
    assert prediction.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.zeros(3)}, ValueError, r"target must be \[T, D\]"),
        ({"target": torch.zeros(3, 4).long()}, TypeError, "target must be of a floating dtype"),
        ({"signal": torch.ones(2)}, ValueError, r"signal.shape\[0\] and target.shape\[0\]"),
        ({"noise": torch.ones(2, 3)}, ValueError, r"noise must have the shape of signal, \[3\]"),
        ({"noise": torch.ones(3).long()}, TypeError, "noise must be of a floating dtype"),
        ({"signal": torch.ones(3).requires_grad_()}, ValueError, "signal takes no gradient"),
        ({"seed": 3}, TypeError, "seed must be a tensor, got int"),
        ({"seed": torch.zeros(1)}, TypeError, r"seed must be int64, got torch\.float32"),
        ({"seed": torch.tensor(0)}, ValueError, r"seed must be of shape \[1\], got \[\]"),
        ({"seed": _seed(0, "meta")}, ValueError, "seed must be on the device of target, cpu"),
        ({"first_row": -1}, ValueError, "first_row must be at least 0, got -1"),
        ({"first_row": 1.5}, TypeError, r"first_row must be an integer, got 1\.5"),
    ],
)
def test_bad_arguments_of_q_sample(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    level = torch.ones(3)
    arguments = {"target": torch.zeros(3, 4), "signal": level, "noise": level, "seed": _seed(0)}
    with pytest.raises(error, match=f"q_sample: {message}"):
        ops.q_sample(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prediction": torch.zeros(3)}, ValueError, r"prediction must be \[T, D\] or \[n, T, D\]"),
        ({"prediction": torch.zeros(3, 4).long()}, TypeError, "prediction must be of a floating"),
        ({"target": torch.zeros(3, 5)}, ValueError, r"target must be \[T, D\] = \[3, 4\]"),
        ({"target": torch.zeros(3, 4).long()}, TypeError, "target must be of a floating dtype"),
        ({"seed": torch.zeros(2).long()}, ValueError, r"seed must be of shape \[1\], got \[2\]"),
        ({"first_row": -1}, ValueError, "first_row must be at least 0, got -1"),
        ({"first_row": 1.5}, TypeError, r"first_row must be an integer, got 1\.5"),
    ],
)
def test_bad_arguments_of_the_loss(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"prediction": torch.zeros(2, 3, 4), "seed": _seed(0)}
    with pytest.raises(error, match=f"denoising_loss: {message}"):
        ops.denoising_loss(**{**arguments, **change})
