"""Flow heads: coupling layers with an exact likelihood (RealNVP), and flow matching."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast import ops
from jepa_fast.nn.heads.adaln import AdaLNMlp
from jepa_fast.nn.heads.interface import Head, LatentDistribution, check_positive
from jepa_fast.nn.heads.ode import integrate, integrate_with_divergence
from jepa_fast.nn.precision import widened
from jepa_fast.ops._checks import check_choice


def standard_normal_log_prob(u: Tensor) -> Tensor:
    """[T] from u [T, D]."""
    return -0.5 * (u.square() + math.log(2 * math.pi)).sum(-1)


class ActNorm(nn.Module):
    """A scale and a shift a coordinate that make the first training batch mean 0, variance 1.

    The first forward pass in training mode sets them from its data (over all processes where
    `torch.distributed` is initialised); from then on they are parameters like any other. The flag
    `initialised` is in the state dict, so a resumed run does not set them again.

    Source: Glow, arXiv 1807.03039, section 3.1.
    """

    initialised: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.zeros(width))
        self.register_buffer("initialised", torch.tensor(False))
        # The buffer's value, known to the host: asking the device every step would wait for it.
        self._known_initialised = False
        self.register_load_state_dict_post_hook(_read_flag)

    def forward(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """(y [T, D], log |det dy/dx|, the same for every row)."""
        if inverse:
            return x * torch.exp(self.log_scale) + self.loc, self.log_scale.sum()
        if self.training and not self._known_initialised and len(x) > 0:
            self._initialise(x)
        return (x - self.loc) * torch.exp(-self.log_scale), -self.log_scale.sum()

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        wide = x.double()
        sums = torch.stack([torch.ones_like(wide[0]) * len(x), wide.sum(0), wide.square().sum(0)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        mean, square = sums[1] / sums[0], sums[2] / sums[0]
        std = (square - mean.square()).clamp_min(1e-6).sqrt()
        self.loc.copy_(mean)
        self.log_scale.copy_(std.log())
        self.initialised.fill_(True)
        self._known_initialised = True


def _read_flag(module: nn.Module, _: Any) -> None:
    if isinstance(module, ActNorm) and not module.initialised.is_meta:
        module._known_initialised = bool(module.initialised)


class Coupling(nn.Module):
    """An affine coupling whose scale and shift come from what passes unchanged and the condition.

    Starts as the identity.

    Args:
        condition_dim: d.
        mask: [D] bool, True where a coordinate passes unchanged.
        hidden_dim: width of the network.
        scale_bound: largest |log-scale|.
    """

    mask: Tensor

    def __init__(
        self, condition_dim: int, mask: Tensor, hidden_dim: int, scale_bound: float
    ) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.scale_bound = scale_bound
        self.from_target = nn.Linear(len(mask), hidden_dim)
        self.from_condition = nn.Linear(condition_dim, hidden_dim, bias=False)
        self.hidden = nn.Linear(hidden_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, 2 * len(mask))
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, condition: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """(y [T, D], logdet [T]) from x [T, D] and condition [T, d]."""
        # What autocast does, where the module itself is in half precision.
        dtype = self.hidden.weight.dtype
        seen = self.from_target((x * self.mask).to(dtype))
        h = F.silu(seen + self.from_condition(condition.to(dtype)))
        raw_scale, shift = self.output(F.silu(self.hidden(h))).chunk(2, -1)
        return ops.affine_coupling(x, raw_scale, shift, self.mask, self.scale_bound, inverse)


class CouplingFlowHead(Head):
    """Conditional RealNVP: exact likelihood, exact inverse, exact samples.

    From the target to noise: ActNorm, coupling, ActNorm, coupling, and so on. Run it in float32 or
    wider where the inverse matters: in bfloat16 a coupling's network rounds what it reads.

    Args:
        condition_dim: d.
        target_dim: D.
        num_couplings: how many.
        hidden_dim: width of each coupling's network.
        scale_bound: log-scales are `scale_bound * tanh(.)`.
        masks: which coordinates pass unchanged: `"alternate"`, every other one, or `"random"`, a
            random half; each mask is followed by its complement.
        seed: of the random masks.
        moment_samples: as in `Head`.

    Raises:
        ValueError: an unknown name, a size below 1, a bound that is not positive.

    Source: RealNVP, arXiv 1605.08803; ActNorm, arXiv 1807.03039.
    """

    def __init__(
        self,
        condition_dim: int,
        target_dim: int,
        num_couplings: int = 6,
        hidden_dim: int = 512,
        scale_bound: float = 2.0,
        masks: str = "alternate",
        seed: int = 0,
        moment_samples: int = 1024,
    ) -> None:
        super().__init__(condition_dim, target_dim, moment_samples)
        owner = "CouplingFlowHead"
        check_positive(owner, num_couplings=num_couplings, hidden_dim=hidden_dim)
        check_choice(owner, "masks", masks, ("alternate", "random"))
        if not 0 < scale_bound < math.inf:
            raise ValueError(f"{owner}: scale_bound must be positive and finite, got {scale_bound}")
        rng = random.Random(seed)
        mask: list[bool] = []
        self.norms = nn.ModuleList()
        self.couplings = nn.ModuleList()
        for i in range(num_couplings):
            if i % 2 == 1:
                mask = [not passes for passes in mask]
            else:
                mask = [c % 2 == 0 for c in range(target_dim)]
                if masks == "random":
                    rng.shuffle(mask)
            self.norms.append(ActNorm(target_dim))
            self.couplings.append(
                Coupling(condition_dim, torch.tensor(mask), hidden_dim, scale_bound)
            )

    def forward(self, condition: Tensor, target: Tensor) -> Tensor:
        self.check(condition, target)
        nll = -self.distribution(condition).log_prob(target)
        return nll.sum() / max(nll.numel() * self.target_dim, 1)

    def distribution(self, condition: Tensor) -> CouplingFlowDistribution:
        self.check(condition)
        return CouplingFlowDistribution(self, condition)

    def to_noise(self, z: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(u [T, D], log |det du/dz| [T])."""
        logdet = torch.zeros_like(z[:, 0])
        for norm, coupling in zip(self.norms, self.couplings, strict=True):
            z, from_norm = norm(z)
            z, from_coupling = coupling(z, condition)
            logdet = logdet + from_norm + from_coupling
        return z, logdet

    def from_noise(self, u: Tensor, condition: Tensor) -> Tensor:
        """The inverse of `to_noise`: z [T, D]."""
        for norm, coupling in zip(reversed(self.norms), reversed(self.couplings), strict=True):
            u, _ = coupling(u, condition, inverse=True)
            u, _ = norm(u, inverse=True)
        return u


class CouplingFlowDistribution(LatentDistribution):
    """What a `CouplingFlowHead` says of condition [T, d]; mean and variance from samples."""

    def __init__(self, head: CouplingFlowHead, condition: Tensor) -> None:
        condition = widened(condition)
        dtype = condition.dtype
        super().__init__(
            condition.shape[0], head.target_dim, condition.device, dtype, head.moment_samples
        )
        self.head = head
        self.condition = condition

    def _log_prob(self, z: Tensor) -> Tensor:
        u, logdet = self.head.to_noise(z, self.condition)
        return standard_normal_log_prob(u) + logdet

    @torch.no_grad()
    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        noise = self._normal(n, generator)
        z = self.head.from_noise(noise.flatten(0, 1), self.condition.repeat(n, 1))
        return z.view(noise.shape)


class FlowMatchingHead(Head):
    """Flow matching: a network learns the velocity that carries noise to the target.

    On the straight path `x_t = (1 - t) noise + t target` the velocity is `target - noise`; the loss
    is its mean squared error at a uniform t. Samples solve `dx/dt = v(x, t)` from noise at t = 0.
    In training, noise and t are drawn from torch's global generator: under torchrun every rank
    draws its own, and the loss equals that of one process only in expectation.

    Args:
        condition_dim: d.
        target_dim: D.
        hidden_dim: width of the network.
        depth: its blocks.
        steps: Heun steps of the ODE solver, for samples and for `log_prob`; may be set later.
        probes: random probes of the divergence in `log_prob`; None, or D and more, for the exact
            divergence at D backward passes an evaluation; may be set later.
        moment_samples: as in `Head`.

    Raises:
        ValueError: a size below 1.

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
    ) -> None:
        super().__init__(condition_dim, target_dim, moment_samples)
        check_positive("FlowMatchingHead", hidden_dim=hidden_dim, depth=depth, steps=steps)
        if probes is not None:
            check_positive("FlowMatchingHead", probes=probes)
        self.steps = steps
        self.probes = probes
        self.network = AdaLNMlp(target_dim, condition_dim, hidden_dim, depth)

    def forward(self, condition: Tensor, target: Tensor) -> Tensor:
        self.check(condition, target)
        target = widened(target)
        noise = torch.randn_like(target)
        time = torch.rand_like(target[:, :1])
        x = torch.lerp(noise, target, time)
        velocity = self.network(x, time[:, 0], self.network.condition(condition))
        error = (velocity.to(target.dtype) - (target - noise)).square()
        return error.sum() / max(error.numel(), 1)

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

    @torch.no_grad()
    def _log_prob(self, z: Tensor) -> Tensor:
        grid = torch.linspace(1, 0, self.head.steps + 1, dtype=z.dtype, device=self.device)
        noise, integral = integrate_with_divergence(
            lambda x, k: self.head.network(x, grid[k], self.condition).to(x.dtype),
            z,
            grid,
            self.head.probes,
        )
        return standard_normal_log_prob(noise) + integral

    @torch.no_grad()
    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        noise = self._normal(n, generator)
        grid = torch.linspace(0, 1, self.head.steps + 1, dtype=noise.dtype, device=self.device)
        return integrate(
            lambda x, k: self.head.network(x, grid[k], self.condition).to(x.dtype), noise, grid
        )
