"""Flow heads: coupling layers with an exact likelihood (RealNVP), and flow matching."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast import ops
from jepa_fast.nn.heads.adaln import AdaLNMlp
from jepa_fast.nn.heads.interface import Head, LatentDistribution, check_positive
from jepa_fast.nn.heads.ode import integrate, integrate_with_divergence
from jepa_fast.nn.precision import widened
from jepa_fast.ops._autograd import OperatorFunction, differentiable_once, spread
from jepa_fast.ops._checks import check_choice


def standard_normal_log_prob(u: Tensor) -> Tensor:
    """[T] from u [T, D]."""
    return -0.5 * (u.square().sum(-1) + u.shape[-1] * math.log(2 * math.pi))


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
        self.is_set = False
        self.register_load_state_dict_post_hook(_read_flag)

    def forward(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """(y [T, D], log |det dy/dx|, the same for every row)."""
        if inverse:
            return x * torch.exp(self.log_scale) + self.loc, self.log_scale.sum()
        if self.training and not self.is_set and len(x) > 0:
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
        self.is_set = True


def _read_flag(module: nn.Module, _: Any) -> None:
    if isinstance(module, ActNorm) and not module.initialised.is_meta:
        module.is_set = bool(module.initialised)


class _Selected(OperatorFunction):
    """`x.index_select(dim, index)` of an index without repetitions: its gradient need not add."""

    @staticmethod
    def forward(x: Tensor, dim: int, index: Tensor) -> Tensor:
        return x.index_select(dim, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, Tensor], output: Tensor) -> None:
        x, ctx.dim, index = inputs
        ctx.shape = x.shape
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(ctx.dim, index, grad), None, None


def _selected(x: Tensor, dim: int, index: Tensor) -> Tensor:
    selected: Tensor = _Selected.apply(x, dim, index)
    return selected


class _Step(NamedTuple):
    """What an ActNorm and its coupling do to the P coordinates that pass and the F that change.

    Of the coupling's network only what counts: the weights of the coordinates that pass, and those
    that scale and shift of the others come from.
    """

    kept_loc: Tensor  # [P]
    kept_log_scale: Tensor  # [P]
    free_loc: Tensor  # [F]
    free_log_scale: Tensor  # [F]
    from_target: Tensor  # [H, P]
    from_target_bias: Tensor  # [H]
    from_condition: Tensor  # [H, d]
    hidden: Tensor  # [H, H]
    hidden_bias: Tensor  # [H]
    output: Tensor  # [2 F, H]
    output_bias: Tensor  # [2 F]

    def normalised(self, kept: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        return (
            (kept - self.kept_loc) * torch.exp(-self.kept_log_scale),
            (free - self.free_loc) * torch.exp(-self.free_log_scale),
        )

    def denormalised(self, kept: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        return (
            kept * torch.exp(self.kept_log_scale) + self.kept_loc,
            free * torch.exp(self.free_log_scale) + self.free_loc,
        )

    def scale_and_shift(self, kept: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """[T, F] each, from what passes, normalised, and the condition [T, d]."""
        # What autocast does, where the module itself is in half precision.
        dtype = self.hidden.dtype
        seen = F.linear(kept.to(dtype), self.from_target, self.from_target_bias)
        h = F.silu(torch.addmm(seen, condition.to(dtype), self.from_condition.t()))
        h = F.silu(F.linear(h, self.hidden, self.hidden_bias))
        raw_scale, shift = F.linear(h, self.output, self.output_bias).chunk(2, -1)
        return raw_scale, shift


class Coupling(nn.Module):
    """An affine coupling whose scale and shift come from what passes unchanged and the condition.

    Starts as the identity.

    Args:
        condition_dim: d.
        mask: D of them, True where a coordinate passes unchanged.
        hidden_dim: width of the network.
        scale_bound: largest |log-scale|.
    """

    mask: Tensor
    kept: Tensor
    free: Tensor
    none_passes: Tensor

    def __init__(
        self, condition_dim: int, mask: list[bool], hidden_dim: int, scale_bound: float
    ) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor(mask))
        self._note(mask)
        self.scale_bound = scale_bound
        self.from_target = nn.Linear(len(mask), hidden_dim)
        self.from_condition = nn.Linear(condition_dim, hidden_dim, bias=False)
        self.hidden = nn.Linear(hidden_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, 2 * len(mask))
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.register_load_state_dict_post_hook(_read_mask)

    def _note(self, mask: list[bool]) -> None:
        """Keeps what the mask says where asking for it does not wait for the device."""
        device = self.mask.device
        self.passes = bytes(mask)
        self.changes = bytes(not passes for passes in mask)
        for name, which in (("kept", self.passes), ("free", self.changes)):
            index = [i for i, belongs in enumerate(which) if belongs]
            self.register_buffer(
                name, torch.tensor(index, dtype=torch.int64, device=device), persistent=False
            )
        none = torch.zeros(sum(self.changes), dtype=torch.bool, device=device)
        self.register_buffer("none_passes", none, persistent=False)

    def step(self, norm: ActNorm) -> _Step:
        """This coupling after `norm`."""
        return _Step(
            _selected(norm.loc, 0, self.kept),
            _selected(norm.log_scale, 0, self.kept),
            _selected(norm.loc, 0, self.free),
            _selected(norm.log_scale, 0, self.free),
            _selected(self.from_target.weight, 1, self.kept),
            self.from_target.bias,
            self.from_condition.weight,
            self.hidden.weight,
            self.hidden.bias,
            _selected(self.output.weight, 0, self._both),
            _selected(self.output.bias, 0, self._both),
        )

    @property
    def _both(self) -> Tensor:
        """The network's outputs that are about coordinates which change: scales, then shifts."""
        return torch.cat([self.free, self.free + len(self.passes)])

    def forward(
        self, free: Tensor, raw_scale: Tensor, shift: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The coordinates that change, [T, F], changed, and logdet [T]."""
        return ops.affine_coupling(
            free, raw_scale, shift, self.none_passes, self.scale_bound, inverse
        )

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The coordinates of z [T, D] that pass, [T, P], and those that change, [T, F]."""
        return _selected(z, 1, self.kept), _selected(z, 1, self.free)

    def merge(self, kept: Tensor, free: Tensor) -> Tensor:
        """The inverse of `split`."""
        both = torch.cat([kept, free], 1)
        return torch.empty_like(both).index_copy_(1, torch.cat([self.kept, self.free]), both)

    def take_over(self, kept: Tensor, free: Tensor, other: Coupling) -> tuple[Tensor, Tensor]:
        """Split as for this coupling what is split as for the other."""
        if self.passes == other.passes:
            return kept, free
        if self.passes == other.changes:
            return free, kept
        return self.split(other.merge(kept, free))


def _read_mask(module: nn.Module, _: Any) -> None:
    if isinstance(module, Coupling) and not module.mask.is_meta:
        module._note(module.mask.tolist())


def _before_norm(
    y: Tensor, grad: Tensor, loc: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of `y = (x - loc) * exp(-log_scale)`: x, and the gradients of x, loc and log_scale."""
    grad_x = grad * torch.exp(-log_scale)
    x = y * torch.exp(log_scale) + loc
    return x, grad_x, -grad_x.sum(0), -(grad * y).sum(0)


_OF_NORM = 4  # the first fields of a `_Step`


def _steps_of(flat: Sequence[Any]) -> list[_Step]:
    size = len(_Step._fields)
    return [_Step(*flat[i : i + size]) for i in range(0, len(flat), size)]


def _run(
    couplings: Sequence[Coupling],
    steps: Sequence[_Step],
    kept: Tensor,
    free: Tensor,
    condition: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """From coordinates split as for the first coupling to those split as for the last one, and the
    couplings' logdet.
    """
    logdet = free.new_zeros(free.shape[0])
    for i, (coupling, step) in enumerate(zip(couplings, steps, strict=True)):
        if i > 0:
            kept, free = coupling.take_over(kept, free, couplings[i - 1])
        kept, free = step.normalised(kept, free)
        free, change = coupling(free, *step.scale_and_shift(kept, condition))
        logdet = logdet + change
    return kept, free, logdet


class _ThroughInverse(OperatorFunction):
    """A stack of couplings that keeps its output alone: each layer's input is found from that.

    From the coordinates as the first coupling splits them to those as the last one does, and the
    couplings' logdet.
    """

    @staticmethod
    def forward(
        couplings: list[Coupling], kept: Tensor, free: Tensor, condition: Tensor, *flat: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _run(couplings, _steps_of(flat), kept, free, condition)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.couplings, _, _, condition, *flat = inputs
        kept, free, _ = output
        device = condition.device.type
        ctx.autocast = nullcontext
        if torch.amp.is_autocast_available(device):
            dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
            ctx.autocast = partial(torch.autocast, device, dtype, enabled)
        ctx.save_for_backward(kept, free, condition, *flat)

    @staticmethod
    @differentiable_once("CouplingFlowHead", "set its memory_free to False")
    def backward(
        ctx: Any, grad_kept: Tensor, grad_free: Tensor, grad_logdet: Tensor
    ) -> tuple[Tensor | None, ...]:
        kept, free, condition, *flat = ctx.saved_tensors
        needs_condition, *needs = ctx.needs_input_grad[3:]
        size = len(_Step._fields)
        grad_condition: Tensor | None = None
        grad_steps: list[Tensor | None] = []
        for i, step in reversed(list(enumerate(_steps_of(flat)))):
            coupling = ctx.couplings[i]
            if grad_steps:
                after = ctx.couplings[i + 1]
                kept, free = coupling.take_over(kept, free, after)
                grad_kept, grad_free = coupling.take_over(grad_kept, grad_free, after)
            with torch.enable_grad(), ctx.autocast():
                # A graph of this layer alone.
                seen = [kept.detach().requires_grad_(), condition.detach()]
                seen[1].requires_grad_(needs_condition)
                needed = needs[i * size : (i + 1) * size]
                leaves = _Step(
                    *(x.detach().requires_grad_(n) for x, n in zip(step, needed, strict=True))
                )
                raw_scale, shift = leaves.scale_and_shift(*seen)
            free, _ = coupling(free, raw_scale.detach(), shift.detach(), inverse=True)
            with torch.enable_grad():
                free.requires_grad_()
                outputs = coupling(free, raw_scale, shift)
            inputs = [free, *seen, *leaves[_OF_NORM:]]
            grad_free, through_network, *grads = torch.autograd.grad(
                outputs, [x for x in inputs if x.requires_grad], (grad_free, grad_logdet)
            )
            of_condition, *of_network = spread(grads, [x.requires_grad for x in inputs[2:]])
            if of_condition is not None:
                grad_condition = (
                    of_condition if grad_condition is None else grad_condition + of_condition
                )
            grad_kept = grad_kept + through_network
            kept, grad_kept, *of_kept = _before_norm(
                kept, grad_kept, step.kept_loc, step.kept_log_scale
            )
            free, grad_free, *of_free = _before_norm(
                free, grad_free, step.free_loc, step.free_log_scale
            )
            grad_steps = [*of_kept, *of_free, *of_network, *grad_steps]
        return None, grad_kept, grad_free, grad_condition, *grad_steps


class CouplingFlowHead(Head):
    """Conditional RealNVP: exact likelihood, exact inverse, exact samples.

    From the target to noise: ActNorm, coupling, ActNorm, coupling, and so on. Run it in float32 or
    wider where the inverse matters: in bfloat16 a coupling's network rounds what it reads.

    A target so far out that its density is no float32 (or one that is not finite itself) gives a
    loss that is not finite, which stops a training run with the step's number; `overflows` counts
    such targets. Evaluated without gradients, `log_prob` raises and names the first.

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
        memory_free: whether the backward pass finds each layer's input from its output, so that
            what is kept between the passes does not grow with the number of couplings, at the price
            of one more forward pass, about 0.3 times the time; may be set later. Gradients are
            those of plain autograd up to the rounding of the inverse. It has no effect under
            torch.compile, nor inside torch.func's transforms.

    Attributes:
        overflows: int64, 0-dim, how many targets had no finite density in training so far; on the
            head's device, and not in the state dict.

    Raises:
        ValueError: an unknown name, a size below 1, a bound that is not positive.

    Source: RealNVP, arXiv 1605.08803; ActNorm, arXiv 1807.03039.
    """

    overflows: Tensor

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
        memory_free: bool = False,
    ) -> None:
        super().__init__(condition_dim, target_dim, moment_samples)
        owner = "CouplingFlowHead"
        check_positive(owner, num_couplings=num_couplings, hidden_dim=hidden_dim)
        check_choice(owner, "masks", masks, ("alternate", "random"))
        if not 0 < scale_bound < math.inf:
            raise ValueError(f"{owner}: scale_bound must be positive and finite, got {scale_bound}")
        self.memory_free = memory_free
        self.register_buffer("overflows", torch.tensor(0), persistent=False)
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
            self.couplings.append(Coupling(condition_dim, mask, hidden_dim, scale_bound))

    def forward(self, condition: Tensor, target: Tensor) -> Tensor:
        self.check(condition, target)
        nll = -self.distribution(condition).log_prob(target)
        if self.training:
            self.overflows.add_((~nll.detach().isfinite()).sum())
        return nll.sum() / max(nll.numel() * self.target_dim, 1)

    def distribution(self, condition: Tensor) -> CouplingFlowDistribution:
        self.check(condition)
        return CouplingFlowDistribution(self, condition)

    def to_noise(self, z: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(u [T, D], log |det du/dz| [T])."""
        kept, free, logdet = self._to_noise(z, condition)
        return self._layers[-1][1].merge(kept, free), logdet

    def from_noise(self, u: Tensor, condition: Tensor) -> Tensor:
        """The inverse of `to_noise`: z [T, D]."""
        after = self._layers[-1][1]
        kept, free = after.split(u)
        for norm, coupling in reversed(self._layers):
            kept, free = coupling.take_over(kept, free, after)
            step = coupling.step(norm)
            free, _ = coupling(free, *step.scale_and_shift(kept, condition), inverse=True)
            kept, free = step.denormalised(kept, free)
            after = coupling
        return after.merge(kept, free)

    @property
    def _layers(self) -> list[tuple[ActNorm, Coupling]]:
        layers: Any = zip(self.norms, self.couplings, strict=True)
        return list(layers)

    def _to_noise(self, z: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`to_noise` with u split as for the last coupling."""
        layers = self._layers
        if self.training and not all(norm.is_set for norm, _ in layers):
            self._initialise(z, condition)
        couplings = [coupling for _, coupling in layers]
        steps = [coupling.step(norm) for norm, coupling in layers]
        kept, free = couplings[0].split(z)
        of_norms = -torch.cat([norm.log_scale for norm, _ in layers]).sum()
        plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if self.memory_free and torch.is_grad_enabled() and not plain:
            flat = itertools.chain(*steps)
            kept, free, logdet = _ThroughInverse.apply(couplings, kept, free, condition, *flat)
        else:
            kept, free, logdet = _run(couplings, steps, kept, free, condition)
        return kept, free, logdet + of_norms

    @torch.no_grad()
    def _initialise(self, z: Tensor, condition: Tensor) -> None:
        """Has each ActNorm that is not set yet set itself from what the layers before it give."""
        for norm, coupling in self._layers:
            z, _ = norm(z)
            kept, free = coupling.split(z)
            free, _ = coupling(free, *coupling.step(norm).scale_and_shift(kept, condition))
            z = coupling.merge(kept, free)


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
        kept, free, logdet = self.head._to_noise(z, self.condition)
        log_prob = standard_normal_log_prob(kept) + standard_normal_log_prob(free) + logdet
        # In training a question to the device would be one a step, which then waits for it.
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _check_density(z, log_prob)
        return log_prob

    @torch.no_grad()
    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        noise = self._normal(n, generator)
        z = self.head.from_noise(noise.flatten(0, 1), self.condition.repeat(n, 1))
        return z.view(noise.shape)


def _check_density(z: Tensor, log_prob: Tensor) -> None:
    """Raises ValueError where a log-density [T] of z [T, D] is not finite."""
    bad = ~log_prob.isfinite()
    if bad.is_meta or not bool(bad.any()):
        return
    token = int(bad.nonzero()[0])
    row = z[token]
    largest = float(row.abs().max())
    if math.isfinite(largest):
        why = (
            f"z[{token}] lies too far out for {log_prob.dtype}, its largest |coordinate| is "
            f"{largest:.3g}, or the head's weights or its condition are not finite; give "
            f"LayerNorm-ed targets, as in training, and check the weights"
        )
    else:
        why = f"z[{token}] is not finite itself; give finite targets"
    raise ValueError(
        f"log_prob: every token must have a finite density, {int(bad.sum())} of {len(bad)} have "
        f"none: {why}"
    )


class FlowMatchingHead(Head):
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
        draws: int = 1,
    ) -> None:
        super().__init__(condition_dim, target_dim, moment_samples)
        check_positive(
            "FlowMatchingHead", hidden_dim=hidden_dim, depth=depth, steps=steps, draws=draws
        )
        if probes is not None:
            check_positive("FlowMatchingHead", probes=probes)
        self.steps = steps
        self.probes = probes
        self.draws = draws
        self.network = AdaLNMlp(target_dim, condition_dim, hidden_dim, depth)

    def forward(self, condition: Tensor, target: Tensor) -> Tensor:
        self.check(condition, target)
        target = widened(target)
        time = torch.rand((self.draws, len(target)), dtype=target.dtype, device=target.device)
        seed = ops.noise_seed(target.device)
        x = ops.q_sample(target, time, 1 - time, seed)
        velocity = self.network(x, time, self.network.condition(condition))
        return ops.denoising_loss(velocity, seed, target)

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
