"""The flow-matching head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from jepa_fast import ops
from jepa_fast.nn.heads import DiffusionHead, FlowMatchingHead


class ExactVelocity(nn.Module):
    """The velocity of flow matching where the targets are normal with the given mean and std."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def condition(self, condition: Tensor) -> Tensor:
        return condition

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        variance = (1 - time) ** 2 + (time * self.std) ** 2
        covariance = time * self.std**2 - (1 - time)
        return self.mean + covariance / variance * (x - time * self.mean)

    def at(self, times: Tensor, condition: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        return (functools.partial(self, time=time, condition=condition) for time in times)


def exact_head(steps: int, probes: int | None) -> tuple[FlowMatchingHead, Normal]:
    mean, std = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 1.0, 0.2])
    head = FlowMatchingHead(4, 3, hidden_dim=8, steps=steps, probes=probes)
    head.network = ExactVelocity(mean, std)
    return head, Normal(mean, std)


@pytest.mark.parametrize("probes", [None, 2])
def test_flow_matching_likelihood(probes: int | None) -> None:
    """The Jacobian is diagonal here, so random signs give its trace exactly."""
    head, truth = exact_head(100, probes)
    z = truth.sample((6,))
    log_prob = head.distribution(torch.zeros(6, 4)).log_prob(z)
    torch.testing.assert_close(log_prob, truth.log_prob(z).sum(1), rtol=0, atol=0.01)


def test_flow_matching_samples() -> None:
    head, truth = exact_head(50, None)
    distribution = head.distribution(torch.zeros(2, 4))
    samples = distribution.sample(5000, torch.Generator().manual_seed(0))
    assert samples.shape == (5000, 2, 3)
    assert ((samples.mean((0, 1)) - truth.mean) / truth.stddev).abs().max() < 0.05
    torch.testing.assert_close(samples.std((0, 1)), truth.stddev, rtol=0.05, atol=0)


@pytest.mark.parametrize("width", [1, 2])
def test_flow_matching_density_integrates_to_one(width: int) -> None:
    torch.manual_seed(0)
    head = FlowMatchingHead(4, width, hidden_dim=8, depth=1)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    axis = torch.linspace(-8, 8, 401 if width == 1 else 81)
    points = torch.cartesian_prod(*[axis] * width).view(-1, width)
    log_prob = head.distribution(torch.ones(len(points), 4)).log_prob(points)
    total = log_prob.double().exp().sum() * (axis[1] - axis[0]) ** width
    assert total.item() == pytest.approx(1.0, abs=2e-3)


def test_random_probes_estimate_the_exact_divergence() -> None:
    torch.manual_seed(0)
    head = FlowMatchingHead(4, 80, hidden_dim=8, steps=5, probes=None)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    condition, z = torch.randn(16, 4), torch.randn(16, 80)
    exact = head.distribution(condition).log_prob(z)
    errors = []
    for head.probes in (1, 64, 80, 81):
        estimate = head.distribution(condition).log_prob(z)
        assert torch.equal(estimate, head.distribution(condition).log_prob(z))
        errors.append((estimate - exact).square().mean().sqrt())
    assert 0 < errors[1] < 0.25 * errors[0]
    # As many probes as coordinates cost what the exact divergence does, so it is taken.
    assert errors[2] == errors[3] == 0


def test_flow_matching_loss_is_that_of_the_velocity() -> None:
    """An untrained head says 0, so its loss is the mean of (target - noise)^2: 1 + target^2."""
    torch.manual_seed(0)
    head = FlowMatchingHead(4, 3, hidden_dim=8)
    loss = head(torch.randn(5000, 4), torch.full((5000, 3), 2.0))
    assert loss.item() == pytest.approx(5.0, abs=0.15)
    loss.backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize(
    ("name", "value", "error", "use"),
    [
        ("draws", 0, ValueError, "forward"),
        ("draws", 1.5, TypeError, "forward"),
        ("steps", 0, ValueError, "sample"),
        ("steps", 10.0, TypeError, "sample"),
        ("steps", -1, ValueError, "log_prob"),
        ("probes", 0, ValueError, "log_prob"),
        ("probes", 2.5, TypeError, "log_prob"),
    ],
)
@pytest.mark.parametrize("kind", [FlowMatchingHead, DiffusionHead])
def test_what_is_set_later_is_checked_where_it_is_used(
    kind: type[Any], name: str, value: Any, error: type[Exception], use: str
) -> None:
    head = kind(4, 3, hidden_dim=8)
    condition, target = torch.randn(5, 4), torch.randn(5, 3)
    distribution = head.distribution(condition)
    setattr(head, name, value)
    with pytest.raises(error, match=rf"{kind.__name__}: {name} must be .*{value}"):
        {
            "forward": lambda: head(condition, target),
            "sample": lambda: distribution.sample(2),
            "log_prob": lambda: distribution.log_prob(target),
        }[use]()


def test_several_draws_of_flow_matching_are_a_mean_over_them() -> None:
    torch.manual_seed(0)
    head = FlowMatchingHead(4, 3, hidden_dim=8, draws=3)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    condition, target = torch.randn(6, 4), torch.randn(6, 3)
    torch.manual_seed(1)
    loss = head(condition, target)
    # By hand, with the same t and the same numbers, one draw at a time.
    torch.manual_seed(1)
    time, seed = torch.rand(3, 6), ops.noise_seed("cpu")
    losses = []
    for at, e in zip(
        time, ops.q_sample(target, torch.zeros(3, 6), torch.ones(3, 6), seed), strict=True
    ):
        velocity = head.network(
            torch.lerp(e, target, at[:, None]), at, head.network.condition(condition)
        )
        losses.append((velocity - (target - e)).square().mean())
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("name", ["hidden_dim", "depth", "steps", "probes", "draws"])
def test_bad_flow_matching_options(name: str) -> None:
    with pytest.raises(ValueError, match=f"FlowMatchingHead: {name} must be at least 1, got 0"):
        FlowMatchingHead(4, 3, **{name: 0})
