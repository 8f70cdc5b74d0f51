"""affine_coupling."""

from __future__ import annotations

import pytest
import torch
from samples import Sample, normal

from jepa_fast import ops

OPERATORS = ("affine_coupling", "affine_coupling_backward")


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


def test_scale_is_bounded() -> None:
    x, raw_scale = torch.ones(2, 3), torch.tensor([[1e30, -1e30, 0.0]]).expand(2, 3)
    mask = torch.zeros(3, dtype=torch.bool)
    y, logdet = ops.affine_coupling(x, raw_scale, torch.zeros(2, 3), mask, scale_bound=2.0)
    torch.testing.assert_close(y[0].log(), torch.tensor([2.0, -2.0, 0.0]))
    torch.testing.assert_close(logdet, torch.zeros(2))


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
        ({"mask": torch.zeros(4) > 0}, ValueError, r"mask.shape\[0\] and x.shape\[1\]"),
        ({"shift": torch.zeros(2, 4)}, ValueError, r"shift.shape\[1\] and x.shape\[1\]"),
        ({"raw_scale": torch.zeros(3, 5)}, ValueError, r"raw_scale.shape\[0\] and x.shape\[0\]"),
        ({"x": torch.zeros(5)}, ValueError, r"x must be \[T, D\]"),
        ({"scale_bound": 0.0}, ValueError, "scale_bound must be positive"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    x = torch.zeros(2, 5)
    arguments = {"x": x, "raw_scale": x, "shift": x, "mask": torch.zeros(5) > 0}
    with pytest.raises(error, match=message):
        ops.affine_coupling(**{**arguments, **change})
