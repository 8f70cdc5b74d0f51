"""The autoregressive head."""

from __future__ import annotations

import numpy
import pytest
import torch
import torch.nn.functional as F
from backends import needs_native
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from jepa_fast.nn.heads import AutoregressiveHead
from jepa_fast.nn.heads.autoregressive import sampling_noise

ORDERINGS = ["natural", "reversed", "random", [3, 0, 4, 1, 2]]


def make_head(target_dim: int = 5, **options) -> AutoregressiveHead:
    torch.manual_seed(0)
    options = {"num_components": 2, "hidden_dim": 12, **options}
    head = AutoregressiveHead(4, target_dim, **options).double()
    with torch.no_grad():  # so that every path through the network counts
        for parameter in head.parameters():
            parameter.uniform_(-0.5, 0.5)
    return head


def jacobian(head: AutoregressiveHead) -> Tensor:
    """[D, D]: entry (j, i) is how much the parameters of coordinate j move with coordinate i."""
    dtype = head.film.weight.dtype
    distribution = head.distribution(torch.randn(1, 4, dtype=dtype))

    def parameters(z: Tensor) -> Tensor:
        stacked = torch.stack(distribution.parameters(z[None]))  # [3, 1, K, D]
        return stacked.flatten(0, 2)

    z = torch.randn(head.target_dim, dtype=dtype)
    return torch.autograd.functional.jacobian(parameters, z).abs().sum(0)


@pytest.mark.parametrize("ordering", ORDERINGS, ids=str)
@pytest.mark.parametrize("depth", [1, 3])
def test_jacobian_is_strictly_triangular_in_the_ordering(ordering, depth: int) -> None:
    head = make_head(ordering=ordering, depth=depth)
    order = head.hidden[0].in_degree.argsort()
    if ordering == "random":
        assert order.tolist() not in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0])
    assert_strictly_triangular(jacobian(head)[order][:, order])


@pytest.mark.native
@needs_native
@pytest.mark.parametrize("ordering", ["natural", "reversed", "random"])
def test_jacobian_of_the_kernels_is_strictly_triangular(
    ordering: str, backends_run: list[tuple[str, str]]
) -> None:
    head = make_head(70, ordering=ordering, hidden_dim=100, num_components=1).float()
    order = head.hidden[0].in_degree.argsort()
    assert_strictly_triangular(jacobian(head)[order][:, order])
    assert {("masked_linear", "cpu"), ("masked_linear_backward", "cpu")} <= set(backends_run)


def assert_strictly_triangular(matrix: Tensor) -> None:
    lower = torch.ones_like(matrix).tril(-1).bool()
    assert (matrix[~lower] == 0).all()
    assert (matrix[lower] > 0).all()


@pytest.mark.parametrize(("width", "hidden"), [(1, 4), (2, 1), (7, 3), (6, 64)])
def test_any_width_stays_autoregressive_and_uses_the_condition(width: int, hidden: int) -> None:
    head = make_head(width, hidden_dim=hidden)
    assert (jacobian(head).triu() == 0).all()
    condition = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    logits, loc, _ = head.distribution(condition).parameters(
        torch.zeros(1, width, dtype=torch.float64)
    )
    for j in range(width):
        total = logits[..., j].sum() + loc[..., j].sum()
        (grad,) = torch.autograd.grad(total, condition, retain_graph=True)
        assert (grad != 0).all()


def naive_sample(head: AutoregressiveHead, distribution, n: int, seed: int) -> Tensor:
    """[n, T, D]: a pass of the whole network a coordinate."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.zeros(n, distribution.tokens, head.target_dim, dtype=torch.float64)
    rows = z.view(-1, head.target_dim)
    order = head.hidden[0].in_degree.argsort()
    noise = sampling_noise(head, rows.T, generator)
    for c, (choice, deviation) in zip(order, noise, strict=True):
        logits, loc, log_scale = (p[..., c] for p in distribution.parameters(z))  # [n * T, K]
        raw = log_scale.exp() if head.scale_map == "exp" else F.softplus(log_scale)
        values = loc + (head.scale_floor + raw) * deviation[:, None]
        component = (logits + choice.T).argmax(1, keepdim=True)
        rows[:, c] = values.gather(1, component)[:, 0]
    return z


@pytest.mark.parametrize("ordering", ORDERINGS, ids=str)
@pytest.mark.parametrize("family", ["gaussian", "logistic"])
def test_sampling_equals_a_full_pass_a_coordinate(ordering, family: str) -> None:
    head = make_head(ordering=ordering, family=family, depth=3)
    distribution = head.distribution(torch.randn(3, 4, dtype=torch.float64))
    got = distribution.sample(2, torch.Generator().manual_seed(5))
    torch.testing.assert_close(got, naive_sample(head, distribution, 2, seed=5))


@pytest.mark.parametrize(
    ("width", "options"),
    [
        (1, {}),
        (2, {"hidden_dim": 1}),
        (7, {"hidden_dim": 3, "depth": 1}),
        (40, {"num_components": 1, "ordering": "random"}),
        (6, {"hidden_dim": 70, "scale_map": "softplus", "scale_floor": 0.5}),
    ],
)
def test_sampling_equals_full_passes_at_other_sizes(width: int, options: dict) -> None:
    head = make_head(width, **options)
    for tokens in (0, 1, 5):
        distribution = head.distribution(torch.randn(tokens, 4, dtype=torch.float64))
        got = distribution.sample(1, torch.Generator().manual_seed(5))
        torch.testing.assert_close(got, naive_sample(head, distribution, 1, seed=5))


def test_samples_under_autocast_are_of_float32() -> None:
    head = make_head().float()
    condition = torch.randn(3, 4)
    distribution = head.distribution(condition)
    expected = distribution.sample(2, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        got = distribution.sample(2, torch.Generator().manual_seed(0))
        assert head.distribution(condition).sample(2).dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("ordering", ORDERINGS, ids=str)
@pytest.mark.parametrize("family", ["gaussian", "logistic"])
def test_slopes_of_the_conditional_cdfs_are_the_factors_of_the_density(
    ordering, family: str
) -> None:
    head = make_head(ordering=ordering, family=family)
    distribution = head.distribution(torch.randn(1, 4, dtype=torch.float64))
    z = torch.randn(1, 5, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(lambda z: distribution.cdf(z)[0], z)[:, 0]
    order = head.hidden[0].in_degree.argsort()
    assert (matrix[order][:, order].triu(1) == 0).all()
    torch.testing.assert_close(matrix.diag().log().sum(), distribution.log_prob(z)[0])


def test_sampling_costs_about_one_pass() -> None:
    head = AutoregressiveHead(4, 24, num_components=2, hidden_dim=96)
    distribution = head.distribution(torch.randn(2, 4))
    z = torch.zeros(2, 24)
    with FlopCounterMode(display=False) as one_pass:
        # The operator hides its product from the counter.
        h = z
        for layer in head.hidden:
            h = F.linear(h, layer.weight)
        F.linear(h, head.output.weight)
    with FlopCounterMode(display=False) as sampling:
        distribution.sample()
    assert 0 < sampling.get_total_flops() < one_pass.get_total_flops()


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("family", ["gaussian", "logistic"])
def test_density_integrates_to_one(width: int, family: str) -> None:
    head = make_head(width, family=family)
    condition = torch.randn(1, 4, dtype=torch.float64)
    axis = torch.linspace(-30, 30, 3001 if width == 1 else 301, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * width).view(-1, width)
    log_prob = head.distribution(condition.expand(len(points), 4)).log_prob(points)
    total = log_prob.exp().sum() * (axis[1] - axis[0]) ** width
    assert total.item() == pytest.approx(1.0, abs=1e-3)


def test_samples_follow_the_density() -> None:
    """First and second moments of samples, and of the density on a grid."""
    head = make_head(2)
    condition = torch.randn(1, 4, dtype=torch.float64)
    axis = torch.linspace(-30, 30, 401, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    density = head.distribution(condition.expand(len(points), 4)).log_prob(points).exp()
    density = density / density.sum()
    distribution = head.distribution(condition)
    samples = distribution.sample(40_000, torch.Generator().manual_seed(0))[:, 0]
    mean = density @ points
    covariance = (points - mean).T @ (density[:, None] * (points - mean))
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(samples.T.cov(), covariance, rtol=0.1, atol=0.1)
    # The object's own moments come from fewer samples, always the same ones, by closed forms given
    # the coordinates before: nothing is left to chance for the first.
    assert torch.equal(distribution.mean, head.distribution(condition).mean)
    torch.testing.assert_close(distribution.mean[0], mean, rtol=0, atol=0.03)
    torch.testing.assert_close(distribution.variance[0], covariance.diag(), rtol=0.05, atol=0)
    torch.testing.assert_close(distribution.mean[0, 0], mean[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(distribution.variance[0, 0], covariance[0, 0], rtol=1e-4, atol=0)


def test_loss_is_the_likelihood_and_has_exact_gradients() -> None:
    head = make_head(3, ordering="random")
    condition = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    log_prob = head.distribution(condition).log_prob(target)
    torch.testing.assert_close(head(condition, target), -log_prob.mean() / 3)
    assert torch.autograd.gradcheck(head, (condition, target))


def test_orderings_and_seeds_may_be_numpys() -> None:
    listed = make_head(ordering=[2, 0, 1, 4, 3])
    for as_array in (numpy.array, torch.tensor):
        array = make_head(ordering=as_array([2, 0, 1, 4, 3]))
        assert torch.equal(listed.hidden[0].in_degree, array.hidden[0].in_degree)
    plain, numpys = (make_head(ordering="random", seed=s) for s in (1, numpy.int64(1)))
    assert torch.equal(plain.hidden[0].in_degree, numpys.hidden[0].in_degree)
    with pytest.raises(ValueError, match=r"ordering must be .* permutation of 0 \.\. 4, got array"):
        make_head(ordering=numpy.array([0, 1, 1, 2, 3]))


def test_the_ordering_travels_in_the_state_dict() -> None:
    first, second = make_head(ordering="random", seed=1), make_head(ordering="random", seed=2)
    condition, z = torch.randn(2, 4).double(), torch.randn(2, 5).double()
    second.load_state_dict(first.state_dict())
    expected = first.distribution(condition)
    got = second.distribution(condition)
    torch.testing.assert_close(got.log_prob(z), expected.log_prob(z))
    samples = [d.sample(2, torch.Generator().manual_seed(0)) for d in (expected, got)]
    assert torch.equal(*samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ordering": "backwards"}, "ordering must be 'natural', 'reversed', 'random' or a perm"),
        ({"ordering": 3}, "permutation of 0 .. 2, got 3"),
        ({"ordering": None}, "permutation of 0 .. 2, got None"),
        ({"ordering": [0, 1, 1]}, r"permutation of 0 .. 2, got \[0, 1, 1\]"),
        ({"ordering": [0, "b", 1]}, r"permutation of 0 .. 2, got \[0, 'b', 1\]"),
        ({"ordering": torch.eye(3)}, r"permutation of 0 .. 2, got tensor\("),
        ({"ordering": [0.0, 1.0, 2.0]}, r"permutation of 0 .. 2, got \[0.0, 1.0, 2.0\]"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1"),
        ({"num_components": 0}, "num_components must be at least 1"),
        ({"family": "student"}, "family must be one of"),
        ({"scale_floor": -0.1}, "scale_floor must be positive"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"AutoregressiveHead: .*{message}"):
        AutoregressiveHead(4, 3, **options)


def test_bad_sample_count() -> None:
    with pytest.raises(ValueError, match="sample: n must be at least 1, got 0"):
        make_head().distribution(torch.zeros(1, 4).double()).sample(0)
