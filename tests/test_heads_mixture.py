"""The mixture density head."""

from __future__ import annotations

import itertools

import pytest
import torch

from jepa_fast.nn.heads import MixtureHead

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
