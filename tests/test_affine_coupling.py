"""affine_coupling."""

from __future__ import annotations

import math

import pytest
import torch
from backends import backends
from samples import Sample, normal
from tolerance import assert_as_accurate
from torch import Tensor

from jepa_fast import BackendError, ops
from jepa_fast.ops._registry import OPERATORS as REGISTERED

OPERATORS = ("affine_coupling", "affine_coupling_backward")
each_backend = backends(REGISTERED["affine_coupling"].backends)
HALF, SINGLE = torch.bfloat16, torch.float32


def _sample(name: str, tokens: int, width: int, **keywords) -> Sample:
    def make(dtype: torch.dtype, generator: torch.Generator):
        x, raw_scale, shift = (
            normal(tokens, width, dtype=dtype, generator=generator) for _ in range(3)
        )
        return x, raw_scale, shift, torch.arange(width) % 2 == 0

    return Sample(name, ops.affine_coupling, OPERATORS, make, keywords)


SAMPLES = [
    _sample("forward", 3, 5),
    _sample("inverse", 3, 4, inverse=True, scale_bound=0.5),
    _sample("batch 0", 0, 4),
]

MASKS = {
    "alternate": torch.tensor([True, False, True, False, True]),
    "all pass": torch.ones(5, dtype=torch.bool),
    "none passes": torch.zeros(5, dtype=torch.bool),
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


@each_mask
def test_inverse_undoes_forward(mask: torch.Tensor) -> None:
    torch.manual_seed(0)
    x, raw_scale, shift = 3 * torch.randn(3, 4, 5)
    y, logdet = ops.affine_coupling(x, raw_scale, shift, mask)
    back, back_logdet = ops.affine_coupling(y, raw_scale, shift, mask, inverse=True)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(back_logdet, -logdet)
    assert torch.equal(y[:, mask], x[:, mask])


@each_mask
@pytest.mark.parametrize("inverse", [False, True])
def test_logdet_is_that_of_the_jacobian(mask: torch.Tensor, inverse: bool) -> None:
    """With scale and shift computed from the coordinates that pass."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 5, dtype=torch.float64)
    x = torch.randn(5, dtype=torch.float64)

    def couple(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = (x * mask)[None]
        y, logdet = ops.affine_coupling(x[None], seen @ a, seen @ b, mask, 1.5, inverse)
        return y[0], logdet[0]

    jacobian = torch.autograd.functional.jacobian(lambda x: couple(x)[0], x)
    torch.testing.assert_close(couple(x)[1], torch.linalg.slogdet(jacobian).logabsdet)


def _results(
    x: Tensor, raw_scale: Tensor, shift: Tensor, mask: Tensor, inverse: bool, backend: str
) -> list[Tensor]:
    """y, logdet and the three gradients, on the CPU."""
    leaves = [t.detach().requires_grad_() for t in (x, raw_scale, shift)]
    y, logdet = ops.affine_coupling(*leaves, mask, 1.5, inverse, backend=backend)
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=g).to(t) for t in (y, logdet)]
    return [
        t.detach().cpu() for t in (y, logdet, *torch.autograd.grad([y, logdet], leaves, upstream))
    ]


@each_backend
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    ("dtype", "raw_dtype"),
    [(SINGLE, SINGLE), (SINGLE, HALF), (HALF, HALF), (torch.float16, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("width", [1, 63, 384, 1025])
@pytest.mark.usefixtures("poisoned_memory", "nearest_bfloat16")
def test_as_accurate_as_eager(
    width: int,
    dtype: torch.dtype,
    raw_dtype: torch.dtype,
    inverse: bool,
    backend: str,
    device: str,
    backends_run: list[tuple[str, str]],
) -> None:
    """Scale and shift as halves of one tensor, with NaN where nobody may look."""
    g = torch.Generator().manual_seed(width)
    x = torch.randn(5, width, generator=g).to(dtype)
    # From the near-linear part of the hyperbolic tangent to its ends.
    spread = torch.logspace(-3, 1, 5)[:, None]
    both = (spread * torch.randn(5, 2 * width, generator=g)).to(raw_dtype)
    mask = torch.rand(width, generator=g) < 0.4
    both[:, torch.cat([mask, mask])] = math.nan

    def run(backend: str, device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> list[Tensor]:
        wide = both.to(device, dtypes[1])
        halves = wide.chunk(2, -1)
        return _results(x.to(device, dtypes[0]), *halves, mask.to(device), inverse, backend)

    got = run(backend, device, (dtype, raw_dtype))
    assert {("affine_coupling", backend), ("affine_coupling_backward", backend)} <= {*backends_run}
    eager = run("reference", "cpu", (dtype, raw_dtype))
    exact = run("reference", "cpu", (torch.float64, torch.float64))
    for mine, theirs, truth in zip(got, eager, exact, strict=True):
        assert_as_accurate(mine, theirs, truth)
    for gradient in got[3:]:
        assert not gradient[:, mask].any()


@each_backend
def test_float64_or_a_reason(backend: str, device: str) -> None:
    x, raw_scale, shift, mask = (t.to(device) for t in SAMPLES[0].arguments())
    if backend == "triton":
        with pytest.raises(BackendError, match="takes x in float32, bfloat16 and float16"):
            ops.affine_coupling(x, raw_scale, shift, mask, backend=backend)
        return
    got = _results(x, raw_scale, shift, mask, False, backend)
    for mine, truth in zip(
        got, _results(x, raw_scale, shift, mask, False, "reference"), strict=True
    ):
        torch.testing.assert_close(mine, truth, rtol=1e-14, atol=1e-14)


@each_backend
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_the_gradients_that_are_needed(
    needed: tuple[int, ...], backend: str, device: str
) -> None:
    tensors = [t.detach().to(device) for t in SAMPLES[0].arguments(SINGLE)]
    all_of_them = _results(*tensors, True, backend)[2:]
    g = torch.Generator().manual_seed(1)
    for i in needed:
        tensors[i].requires_grad_()
    y, logdet = ops.affine_coupling(*tensors, 1.5, True, backend=backend)
    upstream = [torch.randn(t.shape, generator=g).to(t) for t in (y, logdet)]
    outputs = [pair for pair in zip((y, logdet), upstream, strict=True) if pair[0].requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in outputs], [tensors[i] for i in needed], [u for _, u in outputs]
    )
    for i, grad in zip(needed, grads, strict=True):
        assert torch.equal(grad.cpu(), all_of_them[i])


@each_backend
def test_rows_may_be_many_and_are_the_same_at_every_run(backend: str, device: str) -> None:
    """Several threads' worth of rows, each as if it were alone."""
    g = torch.Generator().manual_seed(0)
    x, raw_scale, shift = (torch.randn(131, 257, generator=g).to(device) for _ in range(3))
    mask = torch.arange(257, device=device) % 3 == 0
    first, second = (_results(x, raw_scale, shift, mask, False, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    y, logdet = ops.affine_coupling(
        x[99:100], raw_scale[99:100], shift[99:100], mask, 1.5, backend=backend
    )
    assert torch.equal(y.cpu(), first[0][99:100])
    assert torch.equal(logdet.cpu(), first[1][99:100])


@each_backend
@pytest.mark.parametrize("bound", [2.0, 87.2])  # whose exponentials the CPU has two ways for
def test_scale_is_bounded(bound: float, backend: str, device: str) -> None:
    x = torch.ones(2, 3, device=device)
    raw_scale = torch.tensor([[1e30, -1e30, 0.0]], device=device).expand(2, 3)
    mask = torch.zeros(3, dtype=torch.bool, device=device)
    y, logdet = ops.affine_coupling(
        x, raw_scale, torch.zeros_like(x), mask, scale_bound=bound, backend=backend
    )
    torch.testing.assert_close(y[0].log().cpu(), torch.tensor([bound, -bound, 0.0]))
    torch.testing.assert_close(logdet.cpu(), torch.zeros(2))


def test_compiles_where_nothing_takes_a_gradient() -> None:
    x, raw_scale, shift, mask = (t.detach() for t in SAMPLES[0].arguments())
    compiled = torch.compile(ops.affine_coupling, fullgraph=True, backend="aot_eager")
    want = ops.affine_coupling(x, raw_scale, shift, mask)
    for got, expected in zip(compiled(x, raw_scale, shift, mask), want, strict=True):
        assert torch.equal(got, expected)


def test_low_precision_keeps_its_dtype_and_a_float32_logdet() -> None:
    torch.manual_seed(0)
    x, raw_scale, shift = torch.randn(3, 4, 6).bfloat16()
    mask = torch.arange(6) < 3
    y, logdet = ops.affine_coupling(x, raw_scale, shift, mask)
    wide, wide_logdet = ops.affine_coupling(x.float(), raw_scale, shift, mask)
    assert torch.equal(y, wide.bfloat16())
    assert logdet.dtype == torch.float32
    assert torch.equal(logdet, wide_logdet)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": torch.zeros(5)}, TypeError, "mask must be bool"),
        ({"x": torch.ones(3, 5).long()}, TypeError, "x must be of a floating dtype"),
        ({"shift": torch.ones(3, 5).cfloat()}, TypeError, "shift must be of a floating dtype"),
        ({"mask": torch.zeros(4) > 0}, ValueError, r"mask.shape\[0\] and x.shape\[1\]"),
        ({"shift": torch.zeros(2, 4)}, ValueError, r"shift.shape\[1\] and x.shape\[1\]"),
        ({"raw_scale": torch.zeros(3, 5)}, ValueError, r"raw_scale.shape\[0\] and x.shape\[0\]"),
        ({"x": torch.zeros(5)}, ValueError, r"x must be \[T, D\]"),
        ({"scale_bound": 0.0}, ValueError, "scale_bound must be positive"),
        ({"scale_bound": torch.tensor(2.0)}, TypeError, "scale_bound must be a number, got Tensor"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    x = torch.zeros(2, 5)
    arguments = {"x": x, "raw_scale": x, "shift": x, "mask": torch.zeros(5) > 0}
    with pytest.raises(error, match=message):
        ops.affine_coupling(**{**arguments, **change})
