"""latent_loss."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from backends import backends
from samples import Sample, indices, normal
from tolerance import assert_as_accurate
from torch import Tensor

from jepa_fast import ops
from jepa_fast.ops._registry import OPERATORS as REGISTERED

OPERATORS = ("latent_loss", "latent_loss_backward")
KINDS = ("smooth_l1", "l1", "l2", "l2_norm")
each_backend = backends(REGISTERED["latent_loss"].backends)


def _masked(
    prediction: Tensor, teacher: Tensor, index: Tensor, mask: Tensor, **keywords: Any
) -> Tensor:
    return ops.latent_loss(prediction, teacher, index, target_mask=mask, **keywords)


def _sample(
    name: str,
    batch: int = 2,
    blocks: int = 3,
    hidden: int = 4,
    patches: int = 5,
    mask: bool = False,
    **keywords: Any,
) -> Sample:
    def make(dtype: torch.dtype, g: torch.Generator, times: int = 1):
        b, k, n = times * batch, times * hidden, times * patches
        m = times * blocks if blocks > 1 else blocks
        arguments = (
            normal(max(m, 1) * b, k, 7 * times, dtype=dtype, generator=g),
            normal(b, n, 7 * times, dtype=dtype, generator=g, grad=False),
            indices(n, b, *[m] * (m > 0), k, generator=g),
        )
        if mask:
            return *arguments, torch.rand(arguments[2].shape, generator=g) < 0.6
        return arguments

    larger = partial(make, times=2)
    function = _masked if mask else ops.latent_loss
    return Sample(name, function, OPERATORS, make, keywords, make_larger=larger)


SAMPLES = [
    *(_sample(kind, kind=kind) for kind in KINDS),
    _sample("beta", beta=0.3),
    _sample("raw target", normalize_target=False),
    _sample("masked", mask=True),
    _sample("masked norm", mask=True, kind="l2_norm"),
    _sample("[B, Kt]", blocks=0),
    _sample("batch 0", batch=0),
    _sample("K 0", hidden=0),
    _sample("K = N", hidden=5, blocks=1),
]


def _expected(
    prediction: Tensor, teacher: Tensor, index: Tensor, kind: str, normalize: bool, beta: float
) -> float:
    """The mean over tokens, one number at a time."""
    batch, blocks, hidden = index.shape
    total = 0.0
    for m in range(blocks):
        for b in range(batch):
            for k in range(hidden):
                z = teacher[b, index[b, m, k]].tolist()
                mean = sum(z) / len(z)
                variance = sum((v - mean) ** 2 for v in z) / len(z)
                if normalize:
                    z = [(v - mean) / math.sqrt(variance + 1e-5) for v in z]
                p = prediction[m * batch + b, k].tolist()
                r = [abs(x - y) for x, y in zip(p, z, strict=True)]
                if kind == "smooth_l1":
                    r = [v * v / 2 / beta if v < beta else v - beta / 2 for v in r]
                elif kind != "l1":
                    r = [v * v for v in r]
                total += math.sqrt(sum(r)) if kind == "l2_norm" else sum(r) / len(r)
    return total / (batch * blocks * hidden)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_values(kind: str, normalize: bool) -> None:
    prediction, teacher, index = _sample("").arguments()
    beta = 0.7
    loss = ops.latent_loss(prediction, teacher, index, kind, normalize, beta=beta)
    expected = _expected(prediction, teacher, index, kind, normalize, beta)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@each_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("width", [1, 63, 384, 1025])
def test_as_accurate_as_eager(
    width: int,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    kind: str,
    backend: str,
    device: str,
    backends_run: list[tuple[str, str]],
    poisoned_memory: None,
) -> None:
    """Loss and gradient, with padding that holds NaN, and blocks that overlap."""
    g = torch.Generator().manual_seed(width)
    teacher = (3 + 2 * torch.randn(2, 9, width, generator=g)).to(teacher_dtype)
    prediction = torch.randn(6, 5, width, generator=g).to(dtype)
    index, mask = torch.randint(9, (2, 3, 5), generator=g), torch.rand(2, 3, 5, generator=g) < 0.7
    prediction[~mask.transpose(0, 1).flatten(0, 1)] = math.nan

    def run(prediction: Tensor, teacher: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        prediction = prediction.detach().clone().requires_grad_()
        loss = ops.latent_loss(
            prediction,
            teacher,
            index.to(prediction.device),
            kind,
            target_mask=mask.to(prediction.device),
            beta=0.7,
            backend=backend,
        )
        (grad,) = torch.autograd.grad(loss * 3, prediction)
        return loss.detach().cpu(), grad.cpu()

    got = run(prediction.to(device), teacher.to(device), backend)
    assert ("latent_loss", backend) in backends_run
    eager = run(prediction, teacher, "reference")
    exact = run(prediction.double(), teacher.double(), "reference")
    for mine, theirs, truth in zip(got, eager, exact, strict=True):
        if dtype == torch.float64:  # then eager is the truth, which is rounded itself
            torch.testing.assert_close(mine, truth, rtol=1e-13, atol=1e-17 * width)
        else:
            assert_as_accurate(mine, theirs, truth)


@each_backend
@pytest.mark.parametrize("empty", ["batch", "hidden", "mask"])
def test_where_there_is_nothing(empty: str, backend: str, device: str) -> None:
    sizes = {} if empty == "mask" else {empty: 0}
    prediction, teacher, index = (x.to(device) for x in _sample("", **sizes).arguments())
    prediction = prediction.detach().requires_grad_()
    mask = torch.zeros_like(index, dtype=torch.bool)
    loss = ops.latent_loss(
        prediction, teacher, index, target_mask=mask if empty == "mask" else None, backend=backend
    )
    (grad,) = torch.autograd.grad(loss, prediction)
    assert loss.item() == 0.0
    assert torch.equal(grad, torch.zeros_like(prediction))


@each_backend
def test_a_gradient_of_one_is_not_changed_behind_the_graphs_back(backend: str, device: str) -> None:
    prediction, teacher, index = (x.to(device) for x in _sample("").arguments(torch.float32))
    prediction = prediction.detach().requires_grad_()
    loss = ops.latent_loss(prediction, teacher, index, backend=backend)
    (first,) = torch.autograd.grad(loss, prediction, retain_graph=True)
    kept = first.clone()
    first.zero_()
    loss.backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad, kept)
    loss = ops.latent_loss(prediction, teacher, index, backend=backend)
    loss.backward()  # sums up in what the first pass left
    torch.testing.assert_close(prediction.grad, 2 * kept)


def test_gradients_of_many_upstream_ones_at_once() -> None:
    """Which torch maps over the backward pass, as `jacobian(vectorize=True)` does."""
    prediction, teacher, index = _sample("").arguments(torch.float32)
    loss = ops.latent_loss(prediction, teacher, index)
    (grad,) = torch.autograd.grad(loss, prediction, retain_graph=True)
    upstream = torch.tensor([1.0, 2.0, 0.0])
    (grads,) = torch.autograd.grad(loss, prediction, upstream, is_grads_batched=True)
    torch.testing.assert_close(grads, upstream[:, None, None, None] * grad)


def test_beta_0_is_l1() -> None:
    arguments = _sample("").arguments()
    l1 = ops.latent_loss(*arguments, kind="l1")
    torch.testing.assert_close(ops.latent_loss(*arguments, beta=0.0), l1)


def test_masked_tokens_do_not_count_whatever_they_hold() -> None:
    prediction, teacher, index, mask = _sample("", mask=True).arguments()
    rows = mask.transpose(0, 1).flatten(0, 1)
    flat_index = torch.arange(len(index))[None, :, None] * teacher.shape[1] + index.transpose(0, 1)
    kept_index = flat_index.flatten(0, 1)[rows]
    expected = ops.latent_loss(
        prediction[rows][None], teacher.flatten(0, 1)[None], kept_index[None]
    )
    poisoned = prediction.detach().clone()
    poisoned[~rows] = math.nan
    poisoned.requires_grad_()
    for kind in KINDS:
        ops.latent_loss(poisoned, teacher, index, kind, target_mask=mask).backward()
    loss = ops.latent_loss(poisoned, teacher, index, target_mask=mask)
    torch.testing.assert_close(loss, expected)
    assert poisoned.grad is not None
    assert poisoned.grad[rows].isfinite().all()
    assert not poisoned.grad[~rows].any()


def test_nothing_to_predict_is_0_with_zero_gradient() -> None:
    prediction, teacher, index, mask = _sample("", mask=True).arguments()
    loss = ops.latent_loss(prediction, teacher, index, target_mask=torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0.0
    assert not prediction.grad.any()


def test_perfect_prediction_has_a_finite_gradient() -> None:
    teacher = torch.randn(1, 3, 4)
    prediction = teacher[:, :2].clone().requires_grad_()
    index = torch.tensor([[0, 1]])
    for kind in KINDS:
        loss = ops.latent_loss(prediction, teacher, index, kind, normalize_target=False)
        (grad,) = torch.autograd.grad(loss, prediction)
        assert loss.item() == 0.0
        assert not grad.any()


def test_the_teacher_takes_no_gradient() -> None:
    prediction, teacher, index = _sample("").arguments()
    teacher.requires_grad_()
    ops.latent_loss(prediction, teacher, index).backward()
    assert teacher.grad is None
    with pytest.raises(RuntimeError, match="does not require grad"):
        ops.latent_loss(prediction.detach(), teacher, index).backward()


def test_low_precision_computes_in_float32() -> None:
    prediction, teacher, index = _sample("").arguments(torch.float32)
    rounded, rounded_teacher = prediction.detach().bfloat16(), teacher.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.latent_loss(rounded.requires_grad_(), rounded_teacher, index)
    assert loss.dtype == torch.float32
    expected = ops.latent_loss(rounded.double(), rounded_teacher.double(), index)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert rounded.grad is not None
    assert rounded.grad.dtype == torch.bfloat16


def test_bad_arguments() -> None:
    prediction, teacher, index, mask = _sample("", mask=True).arguments()
    with pytest.raises(ValueError, match=r"kind must be one of .*'l2_norm'.*, got 'huber'"):
        ops.latent_loss(prediction, teacher, index, kind="huber")
    with pytest.raises(ValueError, match=r"prediction must have M \* B = 3 \* 2 rows"):
        ops.latent_loss(prediction[1:], teacher, index)
    with pytest.raises(ValueError, match=r"prediction.shape\[1\] and target_index.shape\[2\]"):
        ops.latent_loss(prediction[:, 1:], teacher, index)
    with pytest.raises(ValueError, match=r"prediction.shape\[2\] and teacher.shape\[2\]"):
        ops.latent_loss(prediction, teacher[..., 1:], index)
    with pytest.raises(ValueError, match=r"target_index.shape\[0\] and teacher.shape\[0\]"):
        ops.latent_loss(prediction, teacher[1:], index)
    with pytest.raises(ValueError, match=r"target_index must be in \[0, 5\), got 5"):
        ops.latent_loss(prediction, teacher, torch.full_like(index, 5))
    with pytest.raises(
        TypeError, match=r"prediction must be of a floating dtype, got torch\.int64"
    ):
        ops.latent_loss(prediction.long(), teacher, index)
    with pytest.raises(TypeError, match=r"teacher must be of a floating dtype, got torch\.int64"):
        ops.latent_loss(prediction, teacher.long(), index)
    with pytest.raises(TypeError, match="target_mask must be bool"):
        ops.latent_loss(prediction, teacher, index, target_mask=mask.long())
    with pytest.raises(ValueError, match="target_mask must have the shape of target_index"):
        ops.latent_loss(prediction, teacher, index, target_mask=mask[:, 1:])
    with pytest.raises(ValueError, match="beta must be at least 0 and finite, got -1"):
        ops.latent_loss(prediction, teacher, index, beta=-1.0)
    with pytest.raises(ValueError, match="eps must be at least 0 and finite, got -1"):
        ops.latent_loss(prediction, teacher, index, eps=-1.0)
    learned = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(TypeError, match="beta must be a number, got Tensor; it takes no gradient"):
        ops.latent_loss(prediction, teacher, index, beta=learned)
    with pytest.raises(TypeError, match="eps must be a number, got str"):
        ops.latent_loss(prediction, teacher, index, eps="small")
    with pytest.raises(TypeError, match="normalize_target must be True or False, got None"):
        ops.latent_loss(prediction, teacher, index, normalize_target=None)
