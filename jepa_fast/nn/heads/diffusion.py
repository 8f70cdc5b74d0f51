"""Diffusion head: noise prediction, DDPM and DDIM samplers, likelihood by the sampler's ODE."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from jepa_fast import ops
from jepa_fast.nn.constants import ConstantBuffers
from jepa_fast.nn.heads.adaln import AdaLNMlp
from jepa_fast.nn.heads.interface import (
    LatentDistribution,
    MaskedHead,
    check_positive,
    masked_denoising_loss,
    standard_normal_log_prob,
)
from jepa_fast.nn.heads.ode import integrate_with_divergence, recordable
from jepa_fast.nn.precision import widened
from jepa_fast.ops._checks import check_choice, check_integer, check_number


def alpha_bar(schedule: str, timesteps: int) -> Tensor:
    """[timesteps] float64: the share of the signal's variance left after step t, falling with t.

    `"linear"`: beta from 1e-4 to 0.02 over 1000 steps (arXiv 2006.11239), other numbers of steps
    scaled to the same total. `"cosine"`: arXiv 2102.09672, equation 17, beta cut at 0.999.
    """
    if schedule == "linear":
        share = torch.arange(timesteps, dtype=torch.float64) / max(timesteps - 1, 1)
        beta = (1e-4 + (0.02 - 1e-4) * share) * (1000 / timesteps)
    else:
        time = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        level = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
        beta = 1 - level[1:] / level[:-1]
    return torch.cumprod(1 - beta.clamp(max=0.999), 0)


def signal_and_noise(schedule: str, timesteps: int) -> dict[str, Tensor]:
    """What `x_t` has of target and noise, [timesteps] float32 each; their squares add up to 1."""
    # Where the linear schedule ends. With less of the signal left, as at the cosine one's end, what
    # divides by it would multiply roundings.
    remaining = alpha_bar(schedule, timesteps).clamp(min=4e-5)
    # Rounded from float64: in float32, 1 - alpha_bar would lose what matters at small t.
    return {"signal": remaining.sqrt().float(), "noise": (1 - remaining).sqrt().float()}


class NoiseNetwork(ConstantBuffers, AdaLNMlp):
    """Tells the noise in `x_t`: `noise[t] * x_t + signal[t] * v`, where the MLP is asked for v.

    With v = 0, as it begins, that is the best guess for targets of mean 0 and variance 1, such as
    LayerNorm makes them. And where next to nothing of the signal is left, an error of the MLP moves
    the target that the noise leaves of x_t by as much, not by as much over `signal[t]`.

    Args:
        target_dim, condition_dim, hidden_dim, depth: as in `AdaLNMlp`.
        schedule, timesteps: as in `DiffusionHead`.

    Source: arXiv 2202.00512, section 4 (v).
    """

    signal: Tensor
    noise: Tensor

    def __init__(
        self,
        target_dim: int,
        condition_dim: int,
        hidden_dim: int,
        depth: int,
        schedule: str,
        timesteps: int,
    ) -> None:
        super().__init__(target_dim, condition_dim, hidden_dim, depth)
        self.schedule = schedule
        self.timesteps = timesteps
        self.register_constants()
        # In the state dict, lest weights that were asked for the noise itself pass for these.
        self.register_buffer("tells_v", torch.tensor(True))

    def constants(self) -> dict[str, Tensor]:
        return signal_and_noise(self.schedule, self.timesteps)

    def forward(self, z: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """[..., T, D] from z [..., T, D], timesteps `time`, int64 and of any shape that broadcasts
        with [..., T], and `self.condition(...)`; in the dtype of z or wider."""
        return self._noise_in(z, super().forward(z, self._share(time), condition), time)

    def at(self, times: Tensor, condition: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        for t, v in zip(times, super().at(self._share(times), condition), strict=True):
            yield partial(self._noise_by, v, t)

    def _share(self, t: Tensor) -> Tensor:
        """What `AdaLNMlp` takes for a time, in [0, 1)."""
        return t.float() / len(self.signal)

    def _noise_by(self, v: Callable[[Tensor], Tensor], t: Tensor, z: Tensor) -> Tensor:
        return self._noise_in(z, v(z), t)

    def _noise_in(self, z: Tensor, v: Tensor, t: Tensor) -> Tensor:
        t = t.unsqueeze(-1)  # also since an index without dimensions would be read by the host
        signal, noise = self.signal[t], self.noise[t]
        return noise * z + signal * v


class DiffusionHead(ConstantBuffers, MaskedHead):
    """Denoising diffusion of each target embedding on its own, given the predictor's token.

    With `x_t = signal[t] * target + noise[t] * e`, a `NoiseNetwork` is trained to tell e by mean
    squared error at a uniform t. t and the seed of e are drawn from torch's global generator: under
    torchrun every rank draws its own, and the loss equals that of one process only in expectation.

    Args:
        condition_dim: d.
        target_dim: D.
        hidden_dim: width of the network.
        depth: its blocks.
        timesteps: T of the training schedule.
        schedule: `"linear"` or `"cosine"`, as `alpha_bar` says, which is kept from falling below
            4e-5 here: where the linear schedule of 1000 steps ends.
        sampler: `"ddim"`, deterministic given the starting noise, or `"ddpm"`; may be set later.
        steps: how many of the timesteps the sampler visits, 1 to `timesteps`; None: 50, or all if
            there are fewer; may be set later. Of few steps samples lie too close together: those of
            an untrained head, which describes a standard normal, have variance 0.93 by 50 steps of
            DDIM and 0.98 by 200, 0.86 and 0.96 by DDPM (linear schedule).
        clip: bound on the coordinates of the target that the sampler sees predicted; `log_prob` has
            none. None: 10, or sqrt(D) where that is more, which no LayerNorm-ed vector passes.
            `math.inf` turns it off.
        probes: random probes of the divergence in `log_prob`; None, or D and more, for the exact
            divergence at D backward passes an evaluation; may be set later.
        moment_samples: as in `Head`.
        draws: of t and noise for every target in a training step; the loss is their mean, and the
            condition is projected once for all of them. May be set later.

    Raises:
        TypeError: a size that is no integer, a bound that is no number; of what was set later,
            where it is used.
        ValueError: an unknown name, or a number out of range, likewise.

    Source: DDPM, arXiv 2006.11239; DDIM, arXiv 2010.02502.
    """

    signal: Tensor
    noise: Tensor

    def __init__(
        self,
        condition_dim: int,
        target_dim: int,
        hidden_dim: int = 512,
        depth: int = 3,
        timesteps: int = 1000,
        schedule: str = "linear",
        sampler: str = "ddim",
        steps: int | None = None,
        clip: float | None = None,
        probes: int | None = 8,
        moment_samples: int = 1024,
        draws: int = 1,
    ) -> None:
        super().__init__(condition_dim, target_dim, moment_samples)
        owner = "DiffusionHead"
        check_positive(owner, hidden_dim=hidden_dim, depth=depth, timesteps=timesteps)
        check_choice(owner, "schedule", schedule, ("linear", "cosine"))
        self.clip = max(math.sqrt(target_dim), 10.0) if clip is None else clip
        check_number(owner, "clip", self.clip)
        if not self.clip > 0:
            raise ValueError(f"{owner}: clip must be positive, got {clip}; math.inf turns it off")
        self.schedule = schedule
        self.timesteps = timesteps
        self.sampler = sampler
        self.steps = min(50, timesteps) if steps is None else steps
        self.probes = probes
        self.draws = draws
        self.check_options()
        self.register_constants()
        self.network = NoiseNetwork(
            target_dim, condition_dim, hidden_dim, depth, schedule, timesteps
        )

    def constants(self) -> dict[str, Tensor]:
        return signal_and_noise(self.schedule, self.timesteps)

    def check_options(self) -> None:
        """Raises unless what may be set later is what it may be."""
        owner = "DiffusionHead"
        check_positive(owner, draws=self.draws)
        if self.probes is not None:
            check_positive(owner, probes=self.probes)
        check_choice(owner, "sampler", self.sampler, ("ddim", "ddpm"))
        check_integer(owner, "steps", self.steps)
        if not 1 <= self.steps <= self.timesteps:
            raise ValueError(
                f"{owner}: steps must be between 1 and timesteps = {self.timesteps}, "
                f"got {self.steps}"
            )

    def forward(
        self, condition: Tensor, target: Tensor, token_mask: Tensor | None = None
    ) -> Tensor:
        condition, target = self.counted(condition, target, token_mask)
        self.check_options()
        target = widened(target)
        t = torch.randint(self.timesteps, (self.draws, len(target)), device=target.device)
        seed = ops.noise_seed(target.device)
        x = ops.q_sample(target, self.signal[t], self.noise[t], seed)
        e = self.network(x, t, self.network.condition(condition))
        loss = masked_denoising_loss(e, seed, token_mask)
        self.check_loss(loss, target)
        return loss

    def distribution(self, condition: Tensor) -> DiffusionDistribution:
        self.check(condition)
        return DiffusionDistribution(self, condition)

    def predict_noise(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """e [..., T, D] from x_t [..., T, D], t (0-dim or [T]) and the projected condition."""
        return self.network(x, t, condition).to(x.dtype)

    def visited(self) -> list[int]:
        """The timesteps that the sampler visits, from `timesteps` - 1 down to 0, evenly spread.

        Raises:
            TypeError, ValueError: as the class says.
        """
        self.check_options()
        last = self.timesteps - 1
        return [round(last - last * i / max(self.steps - 1, 1)) for i in range(self.steps)]


class DiffusionDistribution(LatentDistribution):
    """What a `DiffusionHead` says of condition [T, d]; mean and variance from samples.

    The diffusion's own likelihood has no closed form. `log_prob` is the density that its
    probability-flow ODE, the limit of DDIM with many steps, gives to the target with the noise of
    the first timestep (standard deviation about 0.01) on it. It is exact up to the solver's step,
    which follows the `steps` timesteps that the sampler visits, and, where the head's `probes` are
    fewer than D, the noise of the divergence estimate. It is for evaluation: it has no gradient.

    Source: arXiv 2011.13456, section 4.3.
    """

    def __init__(self, head: DiffusionHead, condition: Tensor) -> None:
        dtype = widened(condition).dtype
        super().__init__(
            condition.shape[0], head.target_dim, condition.device, dtype, head.moment_samples
        )
        self.head = head
        self.condition = head.network.condition(condition)

    @torch.no_grad()
    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        head = self.head
        x = self._normal(n, generator)
        visited = torch.tensor(head.visited(), device=self.device)
        one, zero = torch.ones_like(head.signal[:1]), torch.zeros_like(head.signal[:1])
        signal = torch.cat([head.signal[visited], one])
        noise = torch.cat([head.noise[visited], zero])
        predictions = head.network.at(visited, self.condition)
        for i, predict_noise in enumerate(predictions):
            target = (x - noise[i] * predict_noise(x).to(x.dtype)) / signal[i]
            target = target.clamp(-head.clip, head.clip)
            e = (x - signal[i] * target) / noise[i]
            x = signal[i + 1] * target
            if head.sampler == "ddim":
                x = x + noise[i + 1] * e
            else:
                # The posterior of the forward process: part of the noise kept, the rest new.
                ratio = signal[i] / signal[i + 1]
                scale = noise[i + 1] / noise[i]
                fresh = (1 - ratio.square()).sqrt() * self._normal(n, generator)
                x = x + scale * (ratio * noise[i + 1] * e + fresh)
        return x

    def _log_prob(self, z: Tensor) -> Tensor:
        """Follows `x = cos(angle) * target + sin(angle) * e` up the angle, where the ODE is tame:
        its velocity is `cos(angle) * e - sin(angle) * target`, of the size of x throughout."""
        head = self.head
        with recordable() as plain:
            condition = plain(self.condition)
            # A sampler of one step visits the last timestep alone.
            visited = torch.tensor(sorted({0, *head.visited()}), device=self.device)
            signal, noise = head.signal[visited].to(z.dtype), head.noise[visited].to(z.dtype)

            def velocity(x: Tensor, k: int) -> Tensor:
                # With the target that e leaves of x put in. Clipping that would make the ODE stiff.
                e = head.predict_noise(x, visited[k], condition)
                return (e - noise[k] * x) / signal[k]

            end, integral = integrate_with_divergence(
                velocity, signal[0] * plain(z), torch.atan2(noise, signal), head.probes
            )
            return standard_normal_log_prob(end) + integral + self.width * signal[0].log()
