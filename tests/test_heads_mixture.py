"""The mixture density head."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from jepa_fast import ops
from jepa_fast.nn.heads import MixtureHead
from jepa_fast.nn.heads.interface import LatentDistribution

OPTIONS = [
    dict(zip(("family", "event", "scale_map"), names, strict=True))
    for names in itertools.product(
        ("gaussian", "logistic"), ("joint", "coordinate"), ("exp", "softplus")
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o.values()))
def test_loss_and_distribution_agree(options: dict[str, str]) -> None:
    torch.manual_seed(0)
    head = MixtureHead(6, 5, num_components=3, **options)
    condition, target = torch.randn(4, 6), torch.randn(4, 5)
    distribution = head.distribution(condition)
    log_prob = distribution.log_prob(target)
    assert log_prob.shape == (4,)
    torch.testing.assert_close(head(condition, target), -log_prob.mean() / 5)
    samples = distribution.sample(20_000, torch.Generator().manual_seed(0))
    assert (samples.mean(0) - distribution.mean).abs().max() < 0.06
    torch.testing.assert_close(samples.var(0), distribution.variance, rtol=0.1, atol=0)
    assert distribution.log_prob(samples[:7]).shape == (7, 4)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o.values()))
def test_entropy_and_cdf(options: dict[str, str]) -> None:
    """Of one component in closed form, as samples estimate it; the CDF always."""
    torch.manual_seed(0)
    condition, z = torch.randn(4, 6), torch.randn(4, 5)
    one = MixtureHead(6, 5, num_components=1, **options).distribution(condition)
    estimate = one._sampled_entropy
    samples = one.log_prob(one.sample(2000))
    error = samples.std(0) / math.sqrt(one.moment_samples)
    assert ((one.entropy - estimate).abs() < 5 * error).all()
    assert not torch.equal(one.entropy, estimate)

    several = MixtureHead(6, 5, num_components=3, **options).distribution(condition)
    given = (several.logits, several.loc, several.log_scale, several.family)
    expected = ops.mixture_cdf(z, *given, several.scale_floor, several.scale_map)
    assert torch.equal(several.cdf(z), expected)
    by_samples = LatentDistribution._cdf(several, z)
    assert (several.cdf(z) - by_samples).abs().max() < 4 * 0.5 / math.sqrt(1024) + 1 / 1024


@pytest.mark.parametrize("family", ["gaussian", "logistic"])
@pytest.mark.parametrize("log_scale", [50.0, -60.0])
def test_the_entropy_of_one_component_needs_no_square(family: str, log_scale: float) -> None:
    """Of its scale, which may be too large or too small for a float32."""
    head = MixtureHead(2, 3, num_components=1, family=family, scale_floor=1e-30)
    with torch.no_grad():
        head.projection.weight.zero_()
        head.projection.bias[-3:] = log_scale
    unit = {"gaussian": 0.5 * math.log(2 * math.pi * math.e), "logistic": 2.0}[family]
    entropy = head.distribution(torch.ones(1, 2)).entropy
    assert entropy.dtype == torch.float32
    assert entropy.item() == pytest.approx(3 * (log_scale + unit), rel=1e-4)
    assert head.double().distribution(torch.ones(1, 2).double()).entropy.dtype == torch.float64


def test_entropy_of_modes_far_apart_is_that_of_one_and_of_the_choice() -> None:
    head = MixtureHead(2, 3, num_components=2)
    with torch.no_grad():
        head.projection.weight.zero_()
        head.projection.bias.zero_()
        head.projection.bias[2:5], head.projection.bias[5:8] = -100, 100
    entropy = head.distribution(torch.ones(1, 2)).entropy
    exact = math.log(2) + 1.5 * math.log(2 * math.pi * math.e) + 3 * math.log(1 + 1e-3)
    assert entropy.item() == pytest.approx(exact, abs=4 * math.sqrt(1.5 / 1024))


def test_the_entropy_has_as_many_samples_as_the_head_says() -> None:
    head = MixtureHead(4, 3, moment_samples=64)
    distribution = head.distribution(torch.randn(2, 4))
    assert distribution.moment_samples == 64
    few = distribution.entropy
    distribution.moment_samples = 128
    assert not torch.equal(distribution.entropy, few)
    with pytest.raises(ValueError, match="moment_samples must be at least 2, got 1"):
        MixtureHead(4, 3, moment_samples=1)


def test_components_start_apart_with_equal_weights() -> None:
    head = MixtureHead(6, 5)
    distribution = head.distribution(torch.zeros(1, 6))
    assert distribution.logits.unique().tolist() == [0.0]
    assert distribution.loc.shape == (1, 5, 5)
    assert torch.pdist(distribution.loc[0]).min() > 0.1


def test_learns_two_modes() -> None:
    """Targets at +-(1, -1, 0): the mean is between them, the density at them."""
    torch.manual_seed(0)
    head = MixtureHead(2, 3, num_components=2)
    modes = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = head(torch.ones(32, 2), modes.repeat(16, 1) + 0.1 * torch.randn(32, 3))
        loss.backward()
        optimizer.step()
    distribution = head.distribution(torch.ones(1, 2))
    density = distribution.log_prob(modes[:, None]).flatten()
    assert density.min() > distribution.log_prob(torch.zeros(1, 3)) + 10
    assert distribution.mean.abs().max() < 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_components": 0}, "MixtureHead: num_components must be at least 1"),
        ({"family": "laplace"}, "MixtureHead: family must be one of"),
        ({"event": "token"}, "MixtureHead: event must be one of"),
        ({"scale_map": "square"}, "MixtureHead: scale_map must be one of"),
        ({"scale_floor": 0.0}, "MixtureHead: scale_floor must be positive"),
        ({"target_dim": 0}, "target_dim must be at least 1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureHead(**{"condition_dim": 4, "target_dim": 3, **options})
