"""mixture_nll, mixture_sample, mixture_mean, mixture_variance."""

from __future__ import annotations

import math

import pytest
import torch
from backends import backends
from samples import Sample, normal
from tolerance import assert_as_accurate
from torch import Tensor
from torch import distributions as D

from jepa_fast import ops
from jepa_fast.ops._registry import OPERATORS as REGISTERED

OPERATORS = ("mixture_nll", "mixture_nll_backward")
FAMILIES = ("gaussian", "logistic")
EVENTS = ("joint", "coordinate")
each_family = pytest.mark.parametrize("family", FAMILIES)
each_event = pytest.mark.parametrize("event", EVENTS)
each_backend = backends(REGISTERED["mixture_nll"].backends)


def parameters(
    tokens: int, components: int, width: int, event: str, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(target, logits, loc, log_scale)."""
    generator = torch.Generator().manual_seed(0)
    shape = (tokens, components, width)
    return (
        normal(tokens, width, dtype=dtype, generator=generator),
        normal(*(shape if event == "coordinate" else shape[:2]), dtype=dtype, generator=generator),
        normal(*shape, dtype=dtype, generator=generator),
        normal(*shape, dtype=dtype, generator=generator),
    )


def _sample(
    name: str, tokens: int, components: int, width: int, target_grad: bool = True, **keywords: str
) -> Sample:
    def make(dtype: torch.dtype, generator: torch.Generator):
        event = keywords.get("event", "joint")
        target, *rest = parameters(tokens, components, width, event, dtype)
        return (target.detach().requires_grad_(target_grad), *rest)

    return Sample(name, ops.mixture_nll, OPERATORS, make, keywords)


SAMPLES = [
    _sample("gaussian joint", 3, 2, 5),
    _sample("gaussian coordinate", 3, 2, 5, event="coordinate"),
    _sample("logistic joint softplus", 3, 4, 1, family="logistic", scale_map="softplus"),
    _sample("logistic coordinate", 2, 3, 3, family="logistic", event="coordinate"),
    _sample("one component, fixed target", 2, 1, 3, target_grad=False),
    _sample("batch 0", 0, 2, 3, event="coordinate"),
]


def oracle(logits: Tensor, loc: Tensor, scale: Tensor, family: str, event: str) -> D.Distribution:
    """The same mixture from torch.distributions."""
    if event == "coordinate":
        logits, loc, scale = (x.transpose(1, 2) for x in (logits, loc, scale))
    if family == "gaussian":
        component = D.Normal(loc, scale)
    else:
        base = D.Uniform(torch.zeros_like(loc), torch.ones_like(loc))
        transforms = [D.SigmoidTransform().inv, D.AffineTransform(loc, scale)]
        component = D.TransformedDistribution(base, transforms)
    if event == "joint":
        component = D.Independent(component, 1)
    mixture = D.MixtureSameFamily(D.Categorical(logits=logits), component)
    return mixture if event == "joint" else D.Independent(mixture, 1)


@each_family
@each_event
@pytest.mark.parametrize("scale_map", ["exp", "softplus"])
def test_equals_mixture_same_family(family: str, event: str, scale_map: str) -> None:
    target, logits, loc, log_scale = parameters(4, 5, 7, event)
    raw = log_scale.exp() if scale_map == "exp" else torch.nn.functional.softplus(log_scale)
    expected = -oracle(logits, loc, raw + 0.01, family, event).log_prob(target)
    got = ops.mixture_nll(
        target, logits, loc, log_scale, family, event, scale_floor=0.01, scale_map=scale_map
    )
    torch.testing.assert_close(got, expected)


def test_moments_equal_mixture_same_family() -> None:
    for event in EVENTS:
        _, logits, loc, log_scale = parameters(4, 5, 7, event)
        mixture = oracle(logits, loc, log_scale.exp() + 1e-3, "gaussian", event)
        torch.testing.assert_close(ops.mixture_mean(logits, loc), mixture.mean)
        torch.testing.assert_close(ops.mixture_variance(logits, loc, log_scale), mixture.variance)


@each_family
@each_event
@pytest.mark.parametrize("width", [1, 2])
def test_density_integrates_to_one(family: str, event: str, width: int) -> None:
    """Rectangle rule on a grid that holds all but a negligible part of the mass."""
    _, logits, loc, log_scale = (x.detach() for x in parameters(1, 3, width, event))
    axis = torch.linspace(-40, 40, 2001 if width == 1 else 801, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * width).view(-1, width)
    many = [x.expand(len(points), *x.shape[1:]) for x in (logits, loc, 0.3 * log_scale)]
    density = torch.exp(-ops.mixture_nll(points, *many, family, event))
    total = density.sum() * (axis[1] - axis[0]) ** width
    assert total == pytest.approx(1.0, abs=1e-6)


@each_backend
@each_family
@each_event
def test_tails_in_float32(family: str, event: str, backend: str, device: str) -> None:
    """|z| up to 100 sigma, log-scales -10..10, logits +-100: as float64, gradients too."""
    generator = torch.Generator().manual_seed(1)
    tokens, components, width = 64, 5, 3
    shape = (tokens, components, width)
    log_scale = torch.empty(shape).uniform_(-10, 10, generator=generator)
    loc = torch.randn(shape, generator=generator)
    z = torch.empty(tokens, width).uniform_(-100, 100, generator=generator)
    target = loc[:, 0] + z * (log_scale[:, 0].exp() + 1e-3)
    logits = torch.where(
        torch.rand(shape if event == "coordinate" else shape[:2], generator=generator) < 0.5,
        -100.0,
        100.0,
    )
    results = []
    for dtype, choice in ((torch.float32, backend), (torch.float64, "reference")):
        place = device if dtype == torch.float32 else "cpu"
        leaves = [x.to(place, dtype).requires_grad_() for x in (target, logits, loc, log_scale)]
        nll = ops.mixture_nll(*leaves, family, event, backend=choice)
        grads = torch.autograd.grad(nll.sum(), leaves)
        results.append([x.detach().cpu() for x in (nll, *grads)])
    (nll, *grads), (wanted_nll, *wanted_grads) = results
    torch.testing.assert_close(nll.double(), wanted_nll, rtol=1e-6, atol=0)
    for grad, wanted in zip(grads, wanted_grads, strict=True):
        # Responsibilities come from differences of log-densities of up to 1e4, which float32 holds
        # to 1e-3 at worst; per row, against the row's largest value.
        error = (grad.double() - wanted).flatten(1).abs().amax(1)
        assert (error <= 1e-3 * wanted.flatten(1).abs().amax(1)).all()
        assert error.median() <= 1e-6 * wanted.abs().amax()


@each_backend
@each_family
def test_identical_components_far_off_share_by_their_logits(
    family: str, backend: str, device: str
) -> None:
    """100 sigma in all of 384 coordinates are a log-density of -2e6, which leaves float32 an eighth
    to tell components apart by.
    """
    generator = torch.Generator().manual_seed(2)
    tokens, components, width = 8, 5, 384
    loc, log_scale = torch.randn(2, tokens, 1, width, generator=generator).unbind()
    target = loc[:, 0] + 100 * (log_scale[:, 0].exp() + 1e-3)
    logits = torch.randn(tokens, components, generator=generator)
    leaves = [target, logits, *(x.expand(-1, components, -1) for x in (loc, log_scale))]
    leaves = [x.to(device).clone().requires_grad_() for x in leaves]
    nll = ops.mixture_nll(*leaves, family, "joint", backend=backend)
    _, by_logits, by_loc, _ = torch.autograd.grad(nll.sum(), leaves)
    share = logits.softmax(1)
    torch.testing.assert_close(by_logits.cpu(), torch.zeros_like(logits), rtol=0, atol=1e-6)
    found = by_loc.cpu() / by_loc.cpu().sum(1, keepdim=True)
    torch.testing.assert_close(found, share[..., None].expand_as(found), rtol=1e-5, atol=0)


@each_backend
@each_family
@each_event
@pytest.mark.parametrize(
    ("components", "width", "dtype", "scale_map", "level"),
    [
        (1, 1, torch.float32, "exp", 0.0),
        (5, 384, torch.float32, "exp", 0.0),
        (5, 384, torch.float32, "softplus", 0.0),
        (3, 77, torch.bfloat16, "exp", 0.0),
        (32, 65, torch.float16, "softplus", 0.0),
        (4, 1, torch.float32, "exp", 1e5),
        (5, 77, torch.float32, "exp", 100.0),
        (5, 77, torch.float32, "exp", -1000.0),
    ],
    ids=str,
)
def test_as_accurate_as_eager(
    components: int,
    width: int,
    dtype: torch.dtype,
    scale_map: str,
    level: float,
    family: str,
    event: str,
    backend: str,
    device: str,
    backends_run: list[tuple[str, str]],
    poisoned_memory: None,
) -> None:
    """Values and gradients; every component has a share of its tokens, and all logits a level in
    common, which changes nothing."""
    target, *rest = (x.detach().float() for x in parameters(24, components, width, event))
    near = 1.0 if event == "coordinate" else width**-0.5
    rest = [(x + level if x is rest[0] else near * x).to(dtype) for x in rest]
    upstream = torch.linspace(-1, 2, 24)

    def run(inputs: list[Tensor], backend: str) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        nll = ops.mixture_nll(*leaves, family, event, 0.01, scale_map, backend=backend)
        grads = torch.autograd.grad(nll, leaves, upstream.to(nll))
        return [x.detach().cpu() for x in (nll, *grads)]

    inputs = [target, *rest]
    got = run([x.to(device) for x in inputs], backend)
    assert ("mixture_nll", backend) in backends_run
    assert ("mixture_nll_backward", backend) in backends_run
    eager = run(inputs, "reference")
    exact = run([x.double() for x in inputs], "reference")
    for mine, theirs, truth in zip(got, eager, exact, strict=True):
        # In one row: what rounding makes of a token's shares is luck, in float32 as in theirs.
        assert_as_accurate(mine.flatten(), theirs.flatten(), truth.flatten())


@each_backend
@each_event
def test_gradients_that_nobody_asks_for_are_not_there(
    event: str, backend: str, device: str
) -> None:
    inputs = [x.detach().float().to(device) for x in parameters(3, 2, 5, event)]
    every = [x.clone().requires_grad_() for x in inputs]
    ops.mixture_nll(*every, event=event, backend=backend).sum().backward()
    for i in range(4):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        ops.mixture_nll(*leaves, event=event, backend=backend).sum().backward()
        assert [x.grad is not None for x in leaves] == [i == j for j in range(4)]
        torch.testing.assert_close(leaves[i].grad, every[i].grad, rtol=0, atol=0)


@each_backend
@each_event
def test_components_apart_far_off_and_impossible(event: str, backend: str, device: str) -> None:
    """One that nobody draws, one of no weight, and targets whose squares overflow float32."""
    loc = torch.tensor([0.0, 1e30, 0.0], device=device).view(1, 3, 1).expand(2, 3, 4)
    target = torch.tensor([[0.5], [1e30]], device=device).expand(2, 4)
    logits = torch.tensor([0.0, 0.0, -math.inf], device=device)
    logits = logits.expand(2, 3) if event == "joint" else logits.view(1, 3, 1).expand(2, 3, 4)
    leaves = [x.clone().requires_grad_() for x in (target, logits, loc, torch.zeros_like(loc))]
    nll = ops.mixture_nll(*leaves, event=event, backend=backend)
    one = 4 * (0.5 * math.log(2 * math.pi) + math.log(1.001))
    half = math.log(2) * (1 if event == "joint" else 4)
    wanted = [one + half + 2 * (0.5 / 1.001) ** 2, one + half]
    torch.testing.assert_close(nll.tolist(), wanted, rtol=1e-6, atol=0)
    nll.sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert leaves[2].grad is not None
    assert not leaves[2].grad[0, 1:].any()


@each_backend
def test_nothing_at_all(backend: str, device: str) -> None:
    for tokens, width in ((0, 3), (2, 0)):
        for event in EVENTS:
            inputs = [x.detach().float().to(device) for x in parameters(tokens, 2, width, event)]
            leaves = [x.requires_grad_() for x in inputs]
            nll = ops.mixture_nll(*leaves, event=event, backend=backend)
            torch.testing.assert_close(nll, nll.new_zeros(tokens), rtol=0, atol=1e-6)
            for leaf, grad in zip(leaves, torch.autograd.grad(nll.sum(), leaves), strict=True):
                assert grad.shape == leaf.shape
                assert grad.abs().sum() < 1e-6


@pytest.mark.parametrize("backend", ["auto", "reference"])
@each_event
def test_targets_that_are_no_numbers(event: str, backend: str) -> None:
    target, *rest = (x.detach().float() for x in parameters(4, 2, 5, event))
    for value in (math.nan, math.inf, -math.inf):
        bad = target.clone()
        bad[2, 1] = value
        with pytest.raises(
            ValueError, match=r"target must be finite, got .* 1 of 4 tokens.* token 2"
        ):
            ops.mixture_nll(bad, *rest, event=event, backend=backend)
    # NaN that a network makes is its own affair: a loss of NaN, which scalers skip.
    rest[1][1] = math.nan
    assert ops.mixture_nll(target, *rest, event=event, backend=backend).isnan().tolist() == [
        False, True, False, False,
    ]  # fmt: skip


def test_one_and_identical_components() -> None:
    target, _, loc, log_scale = parameters(3, 1, 4, "joint")
    one = ops.mixture_nll(target, torch.full((3, 1), -50.0, dtype=torch.float64), loc, log_scale)
    normals = D.Normal(loc[:, 0], log_scale[:, 0].exp() + 1e-3)
    torch.testing.assert_close(one, -normals.log_prob(target).sum(1))
    logits = torch.randn(3, 6, dtype=torch.float64)
    six = ops.mixture_nll(target, logits, loc.expand(3, 6, 4), log_scale.expand(3, 6, 4))
    torch.testing.assert_close(six, one)


def test_low_precision_parameters_are_computed_in_float32() -> None:
    target, *rest = (x.detach().bfloat16() for x in parameters(4, 3, 5, "joint"))
    got = ops.mixture_nll(target.float(), *rest)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got, ops.mixture_nll(target.float(), *(x.float() for x in rest)), rtol=0, atol=0
    )
    loc = rest[1].requires_grad_()
    ops.mixture_nll(target, rest[0], loc, rest[2]).sum().backward()
    assert loc.grad is not None
    assert loc.grad.dtype == torch.bfloat16


def test_floor_bounds_the_density_and_keeps_a_gradient() -> None:
    """A component that sits on its target and has shrunk to nothing still feels its scale."""
    zero = torch.zeros(1, 1, 1)
    log_scale = torch.full((1, 1, 1), -10.0, requires_grad=True)
    nll = ops.mixture_nll(zero[0], zero[0], zero, log_scale)
    assert nll.item() >= math.log(1e-3) + 0.5 * math.log(2 * math.pi)
    nll.sum().backward()
    assert log_scale.grad is not None
    assert log_scale.grad.item() > 0


@each_family
@each_event
def test_samples_have_the_mixtures_moments(family: str, event: str) -> None:
    _, logits, loc, log_scale = (x.detach() for x in parameters(2, 3, 2, event))
    options = {"family": family, "scale_map": "softplus"}
    draws = ops.mixture_sample(
        logits, loc, log_scale, event=event, n=100_000,
        generator=torch.Generator().manual_seed(0), **options,
    )  # fmt: skip
    assert draws.shape == (100_000, 2, 2)
    mean = ops.mixture_mean(logits, loc)
    variance = ops.mixture_variance(logits, loc, log_scale, **options)
    assert (draws.mean(0) - mean).abs().max() < 5 * (variance / 100_000).sqrt().max()
    torch.testing.assert_close(draws.var(0), variance, rtol=0.05, atol=0)


def test_joint_draws_share_a_component_and_coordinate_draws_do_not() -> None:
    loc = torch.tensor([[[-9.0, -9.0], [9.0, 9.0]]])
    log_scale = torch.zeros_like(loc)
    joint = ops.mixture_sample(torch.zeros(1, 2), loc, log_scale, n=2000)[:, 0]
    assert (joint[:, 0].sign() == joint[:, 1].sign()).all()
    alone = ops.mixture_sample(torch.zeros(1, 2, 2), loc, log_scale, event="coordinate", n=2000)
    same = (alone[:, 0, 0].sign() == alone[:, 0, 1].sign()).double().mean()
    assert 0.4 < same < 0.6


def test_sampling_is_reproducible() -> None:
    _, *mixture = parameters(2, 3, 2, "joint")
    first, second = (
        ops.mixture_sample(*mixture, n=4, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    nobody = [x[:0] for x in mixture]
    assert ops.mixture_sample(*nobody, n=4).shape == (4, 0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "cauchy"}, "family must be one of"),
        ({"event": "row"}, "event must be one of"),
        ({"scale_map": "relu"}, "scale_map must be one of"),
        ({"scale_floor": 0.0}, "scale_floor must be positive"),
        ({"scale_floor": float("nan")}, "scale_floor must be positive"),
        ({"scale_floor": 1e-50}, "scale_floor .*got 1e-50, less than float32's 1.2e-38"),
        ({"event": "coordinate"}, r"logits must be \[T, K, D\] for event='coordinate'"),
        ({"logits": torch.zeros(2, 4)}, r"logits must be .* of loc \[2, 3, 5\], got \[2, 4\]"),
        ({"loc": torch.zeros(2, 3)}, r"loc must be \[T, K, D\]"),
        ({"loc": torch.zeros(2, 0, 5)}, "at least one component"),
        ({"log_scale": torch.zeros(2, 3, 4)}, "log_scale must have the shape of loc"),
        ({"target": torch.zeros(2, 6)}, r"target.shape\[1\] and loc.shape\[2\]"),
        ({"target": torch.zeros(3, 5)}, r"target.shape\[0\] and loc.shape\[0\]"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {
        "target": torch.zeros(2, 5),
        "logits": torch.zeros(2, 3),
        "loc": torch.zeros(2, 3, 5),
        "log_scale": torch.zeros(2, 3, 5),
    }
    with pytest.raises(ValueError, match=message):
        ops.mixture_nll(**{**arguments, **change})


@pytest.mark.parametrize("name", ["target", "logits", "loc", "log_scale"])
def test_arguments_of_another_type(name: str) -> None:
    arguments = {
        "target": torch.zeros(2, 5),
        "logits": torch.zeros(2, 3),
        "loc": torch.zeros(2, 3, 5),
        "log_scale": torch.zeros(2, 3, 5),
    }
    with pytest.raises(TypeError, match=f"mixture_nll: {name} must be a tensor, got NoneType"):
        ops.mixture_nll(**{**arguments, name: None})
    with pytest.raises(TypeError, match=f"{name} must be of a floating dtype, got torch.int64"):
        ops.mixture_nll(**{**arguments, name: arguments[name].long()})


@pytest.mark.parametrize("floor", [torch.tensor(1e-3, requires_grad=True), "1e-3", None])
def test_a_floor_that_is_no_number(floor: object) -> None:
    """A tensor would lose its gradient without a word."""
    mixture = (torch.zeros(2, 3), torch.zeros(2, 3, 5), torch.zeros(2, 3, 5))
    for function, tensors in (
        (ops.mixture_nll, (torch.zeros(2, 5), *mixture)),
        (ops.mixture_cdf, (torch.zeros(2, 5), *mixture)),
        (ops.mixture_variance, mixture),
    ):
        expected = f"{function.__name__}: scale_floor must be a number, got {type(floor).__name__}"
        with pytest.raises(TypeError, match=expected):
            function(*tensors, scale_floor=floor)


def test_bad_sampling_arguments() -> None:
    mixture = (torch.zeros(2, 3), torch.zeros(2, 3, 5), torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        ops.mixture_sample(*mixture, n=0)
    with pytest.raises(TypeError, match=r"n must be an integer, got 1\.5"):
        ops.mixture_sample(*mixture, n=1.5)
    with pytest.raises(TypeError, match="logits must be a tensor, got list"):
        ops.mixture_mean([1.0], mixture[1])
    with pytest.raises(TypeError, match="mixture_variance: logits must be a tensor, got NoneType"):
        ops.mixture_variance(None, *mixture[1:])
