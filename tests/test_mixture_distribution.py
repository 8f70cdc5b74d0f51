"""mixture_responsibilities, mixture_cdf, mixture_quantile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats
from test_mixture_nll import each_event, each_family, oracle, parameters
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from jepa_fast import ops


def mixture(
    tokens: int, components: int, width: int, event: str, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(target, logits, loc, log_scale), without gradients."""
    target, logits, loc, log_scale = parameters(tokens, components, width, event, dtype)
    return target.detach(), logits.detach(), loc.detach(), log_scale.detach()


def hard(event: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, loc, log_scale): far apart and narrow, next to impossible, wide beside narrow."""
    loc = torch.tensor([[-1e4, 1e4, 0.0], [0.0, 0.0, 1e-3], [-3.0, 3.0, 1e6], [5.0, 5.0, 5.0]])
    log_scale = torch.tensor([[-10.0, -10, 0], [-10, 10, 0], [-2, -2, -10], [0, 0, 0]])
    logits = torch.tensor([[0.0, 0, -20], [0, 0, 100], [-30, 30, -100], [1, 2, 3]])
    found = [x.to(dtype).unsqueeze(-1) for x in (logits, loc, log_scale)]
    if event == "joint":
        found[0] = found[0].squeeze(-1)
    return found[0], found[1], found[2]


@each_family
@each_event
def test_responsibilities_are_bayes_rule(family: str, event: str) -> None:
    target, logits, loc, log_scale = mixture(4, 5, 3, event)
    alone = [
        -ops.mixture_nll(
            target[:, j, None], torch.zeros(4, 1).double(), loc[:, k, None, j, None],
            log_scale[:, k, None, j, None], family,
        )
        for k in range(5) for j in range(3)
    ]  # fmt: skip
    likelihood = torch.stack(alone, 1).view(4, 5, 3)
    if event == "joint":
        likelihood = likelihood.sum(-1)
    joint = logits.softmax(1) * likelihood.exp()
    got = ops.mixture_responsibilities(target, logits, loc, log_scale, family)
    assert got.shape == logits.shape
    torch.testing.assert_close(got, joint / joint.sum(1, keepdim=True))


@each_family
@each_event
def test_responsibilities_are_the_likelihoods_gradient(family: str, event: str) -> None:
    """d nll / d logits = prior - posterior."""
    target, logits, loc, log_scale = mixture(3, 4, 5, event)
    logits.requires_grad_()
    nll = ops.mixture_nll(target, logits, loc, log_scale, family, event, 0.1, "softplus")
    (grad,) = torch.autograd.grad(nll.sum(), logits)
    posterior = ops.mixture_responsibilities(
        target, logits, loc, log_scale, family, 0.1, "softplus"
    )
    torch.testing.assert_close(logits.softmax(1) - posterior, grad)
    assert posterior.requires_grad


@each_family
@each_event
def test_cdf_equals_that_of_torch_distributions(family: str, event: str) -> None:
    target, logits, loc, log_scale = mixture(4, 5, 3, event)
    if event == "joint":
        logits_of_each = logits.unsqueeze(-1).expand_as(loc)
    else:
        logits_of_each = logits
    marginals: Any = oracle(
        logits_of_each, loc, log_scale.exp() + 1e-3, family, "coordinate"
    ).base_dist
    got = ops.mixture_cdf(target, logits, loc, log_scale, family)
    torch.testing.assert_close(got, marginals.cdf(target))
    above = ops.mixture_cdf(target, logits, loc, log_scale, family, complement=True)
    torch.testing.assert_close(got + above, torch.ones_like(got))


@each_family
def test_cdf_is_the_integral_of_the_density(family: str) -> None:
    target, logits, loc, log_scale = mixture(1, 3, 1, "joint")
    grid = torch.linspace(-60, target.item(), 40_001, dtype=torch.float64)[:, None]
    many = [x.expand(len(grid), *x.shape[1:]) for x in (logits, loc, 0.3 * log_scale)]
    mass = torch.trapezoid(torch.exp(-ops.mixture_nll(grid, *many, family)), grid[:, 0])
    got = ops.mixture_cdf(target, logits, loc, 0.3 * log_scale, family)
    torch.testing.assert_close(got.squeeze(), mass, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cdf_keeps_its_digits_in_both_tails(dtype: torch.dtype) -> None:
    """Down to the smallest normal numbers, where 1 + erf and 1 - sigmoid have none left."""
    far = 12.5 if dtype == torch.float32 else 36.0
    z = torch.linspace(-far, -1, 200, dtype=dtype)[:, None]
    zero = torch.zeros(200, 1, 1, dtype=dtype)
    logits = torch.zeros(200, 1, dtype=dtype)
    scale_one = torch.log(torch.tensor(1 - 1e-3, dtype=torch.float64)).to(dtype).expand_as(zero)
    for family, factor in (("gaussian", 1.0), ("logistic", 6.0)):
        x = factor * z
        of = special.ndtr if family == "gaussian" else special.expit
        exact = of(x.double().numpy())
        # Of a relative error of the argument, z^2 as much is in the normal's tail; it is computed
        # in float64.
        rtol = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float64).eps * (1 + far**2))
        below = ops.mixture_cdf(x, logits, zero, scale_one, family)
        above = ops.mixture_cdf(-x, logits, zero, scale_one, family, complement=True)
        assert below.dtype == dtype
        assert torch.equal(below, above)
        np.testing.assert_allclose(below.double().numpy(), exact, rtol=rtol)


LEVELS = (1e-300, 1e-30, 1e-12, 1e-6, 0.025, 0.25, 0.5, 0.7, 0.99, 1 - 1e-9)


@each_family
@each_event
def test_quantiles_invert_the_cdf(family: str, event: str) -> None:
    easy, difficult = mixture(4, 5, 3, event)[1:], hard(event, torch.float64)
    for logits, loc, log_scale in (easy, difficult):
        for level in LEVELS[1:]:
            x = ops.mixture_quantile(level, logits, loc, log_scale, family)
            assert x.dtype == torch.float64
            upper = level > 0.5
            got = ops.mixture_cdf(x, logits, loc, log_scale, family, complement=upper)
            wanted = 1 - level if upper else level
            # What one rounding of x makes of the CDF there.
            shape = x.shape
            slope = torch.autograd.functional.jvp(
                lambda t, m=(logits, loc, log_scale): ops.mixture_cdf(t, *m, family),
                x, torch.ones(shape, dtype=x.dtype),
            )[1]  # fmt: skip
            largest = torch.maximum(x.abs(), loc.abs().amax(1) * (slope > 0))
            allowed = 8e-16 * (slope * largest) + 1e-12 * wanted
            assert ((got - wanted).abs() <= allowed).all(), (level, got, allowed)


@each_family
def test_float32_quantiles_are_the_exact_ones_rounded(family: str) -> None:
    for event in ("joint", "coordinate"):
        easy, difficult = mixture(64, 5, 3, event, torch.float32)[1:], hard(event, torch.float32)
        for parts in (easy, difficult):
            for level in LEVELS:
                got = ops.mixture_quantile(level, *parts, family)
                exact = ops.mixture_quantile(level, *(x.double() for x in parts), family)
                assert got.dtype == torch.float32
                smallest = parts[2].exp().amin(1) + 1e-3
                error = (got.double() - exact).abs()
                assert (error <= 2**-23 * (exact.abs() + smallest)).all(), (level, error.max())


def test_responsibilities_of_a_target_far_from_all_components() -> None:
    """Whose squared distance in scales is no float32."""
    target, logits = torch.tensor([[1e22]]), torch.zeros(1, 2)
    loc, log_scale = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.0], [1.0]]])
    got = ops.mixture_responsibilities(target, logits, loc, log_scale)
    assert got.dtype == torch.float32
    assert got.tolist() == [[0.0, 1.0]]


def test_the_variance_leaves_out_what_has_no_weight() -> None:
    """However large its scale is: its square is no float32."""
    logits = torch.tensor([[0.0, -200.0], [0.0, -torch.inf]], requires_grad=True)
    loc = torch.tensor([[[0.5], [1e21]]]).expand(2, -1, -1)
    log_scale = torch.tensor([[[0.0], [50.0]]]).expand(2, -1, -1)
    variance = ops.mixture_variance(logits, loc, log_scale)
    torch.testing.assert_close(variance, torch.full((2, 1), 1.001**2))
    (grad,) = torch.autograd.grad(variance.sum(), logits)
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("wrong", [[0.0, torch.nan], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
def test_samples_of_no_weights_are_refused(wrong: list[float]) -> None:
    logits, loc = torch.tensor([[0.0, 0.0], wrong]), torch.zeros(2, 2, 1)
    for event, of_event in (("joint", logits), ("coordinate", logits[..., None])):
        with pytest.raises(ValueError, match="mixture_sample: logits must not be NaN"):
            ops.mixture_sample(of_event, loc, loc, event=event)


def test_components_without_weight_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0]])
    loc = torch.tensor([[[100.0], [0.0]]])
    assert ops.mixture_sample(logits, loc, torch.zeros_like(loc), n=1000).max() < 50


def test_one_component_has_the_quantiles_of_its_family() -> None:
    _, logits, loc, log_scale = mixture(3, 1, 4, "joint")
    scale = (log_scale.exp() + 1e-3)[:, 0]
    for level in LEVELS:
        for family, of in (("gaussian", stats.norm), ("logistic", stats.logistic)):
            got = ops.mixture_quantile(level, logits, loc, log_scale, family)
            standard = -of.isf(level) if level < 0.5 else of.isf(1 - level)
            torch.testing.assert_close(got, loc[:, 0] + scale * standard)


def test_levels_broadcast() -> None:
    _, *parts = mixture(2, 3, 4, "joint", torch.float32)
    levels = torch.tensor([0.1, 0.5, 0.9])
    many = ops.mixture_quantile(levels[:, None, None], *parts)
    assert many.shape == (3, 2, 4)
    assert many.dtype == torch.float32
    assert (many.diff(dim=0) > 0).all()
    for level, one in zip(levels.tolist(), many, strict=True):
        torch.testing.assert_close(ops.mixture_quantile(level, *parts), one)
    of_coordinates = ops.mixture_quantile(torch.tensor([0.1, 0.5, 0.5, 0.9]), *parts)
    torch.testing.assert_close(of_coordinates[:, 0], many[0, :, 0])
    torch.testing.assert_close(of_coordinates[:, 3], many[2, :, 3])
    of_tokens = ops.mixture_quantile(torch.tensor([[0.1], [0.9]]), *parts)
    torch.testing.assert_close(of_tokens[1], many[2, 1])
    assert ops.mixture_quantile(levels.double()[:, None, None], *parts).dtype == torch.float64


@each_family
@each_event
def test_the_cdf_of_samples_is_uniform(family: str, event: str) -> None:
    _, *parts = mixture(3, 4, 2, event, torch.float32)
    generator = torch.Generator().manual_seed(0)
    samples = ops.mixture_sample(*parts, family, event, n=4000, generator=generator)
    many = [x.expand(4000, *x.shape) for x in parts]
    flat = [x.flatten(0, 1) for x in (samples, *many)]
    pit = ops.mixture_cdf(*flat, family).view_as(samples).flatten(1)
    for of_coordinate in pit.T:
        assert stats.kstest(of_coordinate.numpy(), "uniform").pvalue > 1e-4


def test_low_precision_and_empty_inputs() -> None:
    target, *parts = (x.bfloat16() for x in mixture(3, 2, 4, "coordinate"))
    wide = [x.float() for x in (target, *parts)]
    for function in (ops.mixture_cdf, ops.mixture_responsibilities):
        got = function(target, *parts)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, function(*wide), rtol=0, atol=0)
    none = [x[:0] for x in (target, *parts)]
    assert ops.mixture_cdf(*none).shape == (0, 4)
    assert ops.mixture_responsibilities(*none).shape == (0, 2, 4)
    assert ops.mixture_quantile(0.5, *none[1:]).shape == (0, 4)


@pytest.mark.parametrize("function", [ops.mixture_cdf, ops.mixture_responsibilities])
def test_compiles_without_a_break(function: Any) -> None:
    torch._dynamo.reset()
    arguments = mixture(3, 2, 4, "joint")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), function(*arguments))


def test_sampling_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    _, *parameters = mixture(3, 2, 4, "joint")
    compiled = torch.compile(ops.mixture_sample, fullgraph=True, backend="aot_eager")
    assert compiled(*parameters, n=5).shape == (5, 3, 4)


@pytest.mark.parametrize("function", [ops.mixture_cdf, ops.mixture_responsibilities])
def test_targets_mapped_by_vmap(function: Any) -> None:
    target, *parameters = mixture(3, 2, 4, "joint")
    targets = torch.stack([target, 2 * target])
    mapped = torch.func.vmap(lambda each: function(each, *parameters))(targets)
    torch.testing.assert_close(mapped[1], function(targets[1], *parameters))


def test_fake_tensors_have_no_values_to_check() -> None:
    with FakeTensorMode() as mode:
        target, *parameters = (mode.from_tensor(x) for x in mixture(3, 2, 4, "joint"))
        assert ops.mixture_cdf(target, *parameters).shape == (3, 4)
        assert ops.mixture_responsibilities(target, *parameters).shape == (3, 2)
        assert ops.mixture_sample(*parameters, n=5).shape == (5, 3, 4)


ARGUMENTS = {
    "target": torch.zeros(2, 5),
    "logits": torch.zeros(2, 3),
    "loc": torch.zeros(2, 3, 5),
    "log_scale": torch.zeros(2, 3, 5),
}


@pytest.mark.parametrize("name", ["mixture_cdf", "mixture_responsibilities"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"family": "cauchy"}, ValueError, "family must be one of"),
        ({"scale_map": "relu"}, ValueError, "scale_map must be one of"),
        ({"scale_floor": 0.0}, ValueError, "scale_floor must be positive and at most 1e.38, got 0"),
        ({"scale_floor": 1e39}, ValueError, "scale_floor must be positive and at most 1e.38"),
        ({"scale_floor": -1.0}, ValueError, "scale_floor must be positive"),
        ({"logits": torch.zeros(2, 4)}, ValueError, r"logits must be .* got \[2, 4\]"),
        ({"logits": torch.zeros(2)}, ValueError, r"logits must be \[T, K\]"),
        ({"log_scale": torch.zeros(2, 3, 4)}, ValueError, "log_scale must have the shape of loc"),
        ({"target": torch.zeros(2, 6)}, ValueError, r"target.shape\[1\] and loc.shape\[2\]"),
        ({"target": torch.zeros(3, 5)}, ValueError, r"target.shape\[0\] and loc.shape\[0\]"),
        ({"target": torch.zeros(2)}, ValueError, r"target must be \[T, D\]"),
        ({"target": torch.zeros(2, 5).long()}, TypeError, "target must be of a floating dtype"),
        ({"target": None}, TypeError, "target must be a tensor, got NoneType"),
        ({"logits": None}, TypeError, "logits must be a tensor, got NoneType"),
    ],
)
def test_bad_arguments(name: str, change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{name}: {message}"):
        getattr(ops, name)(**{**ARGUMENTS, **change})


@pytest.mark.parametrize("name", ["mixture_cdf", "mixture_responsibilities"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_target_that_is_not_finite(name: str, value: float) -> None:
    target = torch.zeros(2, 5)
    target[1, 3] = value
    message = rf"{name}: target must be finite, got {value} at \[1, 3\]"
    with pytest.raises(ValueError, match=message):
        getattr(ops, name)(**{**ARGUMENTS, "target": target})
    meta = {key: x.to("meta") for key, x in {**ARGUMENTS, "target": target}.items()}
    assert getattr(ops, name)(**meta).is_meta


@pytest.mark.parametrize(
    ("level", "error", "message"),
    [
        (0, ValueError, "level must be between 0 and 1, both excluded, got 0.0"),
        (1.0, ValueError, "got 1.0"),
        (float("nan"), ValueError, "got nan"),
        (torch.tensor([0.5, 0.5, 0.5, 0.5, 1.5]), ValueError, "got 1.5"),
        (torch.full((3,), 0.5), ValueError, r"broadcast with \[T, D\] = \[2, 5\].*got \[3\]"),
        (torch.full((3, 5), 0.5), ValueError, r"broadcast with \[T, D\]"),
        (torch.tensor([1]), TypeError, "level must be of a floating dtype"),
        ("half", TypeError, "level must be a number or a tensor, got str"),
        (torch.full((5,), 0.5, device="meta"), ValueError, "on the device of loc, cpu, got meta"),
    ],
)
def test_bad_levels(level: Any, error: type[Exception], message: str) -> None:
    parts = [ARGUMENTS[name] for name in ("logits", "loc", "log_scale")]
    with pytest.raises(error, match=f"mixture_quantile: .*{message}"):
        ops.mixture_quantile(level, *parts)
    with pytest.raises(TypeError, match="mixture_quantile: loc must be a tensor"):
        ops.mixture_quantile(0.5, parts[0], None, parts[2])
