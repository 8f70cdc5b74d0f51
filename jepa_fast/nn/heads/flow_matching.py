"""The flow-matching head: a velocity from noise to the target, and its ODE."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_fast import ops
from jepa_fast.nn.heads.adaln import AdaLNMlp
from jepa_fast.nn.heads.interface import (
    LatentDistribution,
    MaskedHead,
    check_positive,
    masked_denoising_loss,
    standard_normal_log_prob,
)
from jepa_fast.nn.heads.ode import integrate, integrate_with_divergence, recordable
from jepa_fast.nn.precision import widened


class FlowMatchingHead(MaskedHead):
    """Flow matching: a network learns the velocity that carries noise to the target.

    On the straight path `x_t = (1 - t) noise + t target` the velocity is `target - noise`; the loss
    is its mean squared error at a uniform t. Samples solve `dx/dt = v(x, t)` from noise at t = 0.
    In training, t and the seed of the noise are drawn from torch's global generator: under torchrun
    every rank draws its own, and the loss equals that of one process only in expectation.

    Args:
        condition_dim: d.
        target_dim: D.
        hidden_dim: width of the network.
        depth: its blocks.
        steps: Heun steps of the ODE solver, for samples and for `log_prob`; may be set later.
        probes: random probes of the divergence in `log_prob`; None, or D and more, for the exact
            divergence at D backward passes an evaluation; may be set later.
        moment_samples: as in `Head`.
        draws: of t and noise for every target in a training step; the loss is their mean, and the
            condition is projected once for all of them. May be set later.

    Raises:
        TypeError: a size that is no integer; of what was set later, where it is used.
        ValueError: a size below 1, likewise.

    Source: arXiv 2210.02747 (its optimal-transport path with sigma_min = 0).
    """

    def __init__(
        self,
        condition_dim: int,
        target_dim: int,
        hidden_dim: int = 512,
        depth: int = 3,
        steps: int = 50,
        probes: int | None = 8,
        moment_samples: int = 1024,
        draws: int = 1,
    ) -> None:
        super().__init__(condition_dim, target_dim, moment_samples)
        check_positive("FlowMatchingHead", hidden_dim=hidden_dim, depth=depth)
        self.steps = steps
        self.probes = probes
        self.draws = draws
        self.check_options()
        self.network = AdaLNMlp(target_dim, condition_dim, hidden_dim, depth)

    def check_options(self) -> None:
        """Raises unless what may be set later is what it may be."""
        check_positive("FlowMatchingHead", steps=self.steps, draws=self.draws)
        if self.probes is not None:
            check_positive("FlowMatchingHead", probes=self.probes)

    def forward(
        self, condition: Tensor, target: Tensor, token_mask: Tensor | None = None
    ) -> Tensor:
        condition, target = self.counted(condition, target, token_mask)
        self.check_options()
        target = widened(target)
        time = torch.rand((self.draws, len(target)), dtype=target.dtype, device=target.device)
        seed = ops.noise_seed(target.device)
        x = ops.q_sample(target, time, 1 - time, seed)
        velocity = self.network(x, time, self.network.condition(condition))
        loss = masked_denoising_loss(velocity, seed, token_mask, target)
        self.check_loss(loss, target)
        return loss

    def distribution(self, condition: Tensor) -> FlowMatchingDistribution:
        self.check(condition)
        return FlowMatchingDistribution(self, condition)


class FlowMatchingDistribution(LatentDistribution):
    """What a `FlowMatchingHead` says of condition [T, d]; mean and variance from samples.

    `log_prob` integrates the divergence of the velocity back to the noise. It is exact up to the
    solver's step and, where the head's `probes` are fewer than D, the noise of the divergence
    estimate. It is for evaluation: it has no gradient.
    """

    def __init__(self, head: FlowMatchingHead, condition: Tensor) -> None:
        dtype = widened(condition).dtype
        super().__init__(
            condition.shape[0], head.target_dim, condition.device, dtype, head.moment_samples
        )
        self.head = head
        self.condition = head.network.condition(condition)

    def _log_prob(self, z: Tensor) -> Tensor:
        self.head.check_options()
        with recordable() as plain:
            condition = plain(self.condition)
            grid = torch.linspace(1, 0, self.head.steps + 1, dtype=z.dtype, device=self.device)
            noise, integral = integrate_with_divergence(
                lambda x, k: self.head.network(x, grid[k], condition).to(x.dtype),
                plain(z),
                grid,
                self.head.probes,
            )
            return standard_normal_log_prob(noise) + integral

    @torch.no_grad()
    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        self.head.check_options()
        noise = self._normal(n, generator)
        grid = torch.linspace(0, 1, self.head.steps + 1, dtype=noise.dtype, device=self.device)
        return integrate(self.head.network.at(grid, self.condition), noise, grid)
