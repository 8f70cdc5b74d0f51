"""The flow head: coupling layers with an exact likelihood (RealNVP)."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import torch
from torch import Tensor, nn

from jepa_fast._arguments import integer
from jepa_fast.nn.constants import ConstantBuffers
from jepa_fast.nn.heads.couplings import ActNorm, Coupling, ThroughInverse, run_couplings
from jepa_fast.nn.heads.interface import (
    LatentDistribution,
    MaskedHead,
    check_positive,
    mean_nll,
    standard_normal_log_prob,
)
from jepa_fast.nn.precision import widened
from jepa_fast.ops._autograd import is_transformed
from jepa_fast.ops._checks import check_choice, check_flag, may_be_read
from jepa_fast.ops._checks import check_positive as check_positive_number


class CouplingFlowHead(ConstantBuffers, MaskedHead):
    """Conditional RealNVP: exact likelihood, exact inverse, exact samples.

    From the target to noise: ActNorm, coupling, ActNorm, coupling, and so on. Run it in float32 or
    wider where the inverse matters: in bfloat16 a coupling's network rounds what it reads.

    The first batch in training mode sets the ActNorms: that of `forward`, or of `log_prob` where
    gradients are recorded. Questions that take no gradient, such as `entropy`, set nothing. Of a
    model that FSDP has sharded it cannot: run that batch first.

    A target so far out that its density is no float32 (or one that is not finite itself) gives a
    loss that is not finite, which stops a training run with the step's number; `overflows` counts
    such targets (under DDP those of rank 0, whose buffers it hands to all). Evaluated without
    gradients, `log_prob` raises and names the first.

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
            head's device, and not in the state dict. Not counted inside torch.func's transforms.

    Raises:
        TypeError: a size or a seed that is no integer, a bound that is no number.
        ValueError: an unknown name, a size below 1, a bound that is not positive.
        RuntimeError: in `forward`, the first batch is one of a sharded model.

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
        check_positive_number(owner, "scale_bound", scale_bound)
        check_flag(owner, "memory_free", memory_free)
        self.memory_free = memory_free
        self.register_constants()
        rng = random.Random(integer(f"{owner}: seed", seed))
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

    def constants(self) -> dict[str, Tensor]:
        return {"overflows": torch.tensor(0)}  # where it begins

    def forward(
        self, condition: Tensor, target: Tensor, token_mask: Tensor | None = None
    ) -> Tensor:
        condition, target = self.counted(condition, target, token_mask)
        distribution = CouplingFlowDistribution(self, condition, token_mask)
        if self.training:  # without gradients, too: so does checkpointing run it first
            self._initialise(widened(target), distribution.condition, token_mask)
        nll = -distribution.log_prob(target)
        if self.training and not is_transformed():  # which refuse to see it written
            overflowed = ~nll.detach().isfinite()
            if token_mask is not None:
                overflowed = overflowed & token_mask
            self.overflows.add_(overflowed.sum())
        return mean_nll(nll, self.target_dim, token_mask)

    def distribution(self, condition: Tensor) -> CouplingFlowDistribution:
        self.check(condition)
        return CouplingFlowDistribution(self, condition)

    def to_noise(self, z: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(u [T, D], log |det du/dz| [T])."""
        kept, free, logdet = self._to_noise(z, condition, None)
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

    def _to_noise(
        self, z: Tensor, condition: Tensor, token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`to_noise` with u split as for the last coupling."""
        layers = self._layers
        if self.training and torch.is_grad_enabled():
            self._initialise(z, condition, token_mask)
        couplings = [coupling for _, coupling in layers]
        steps = [coupling.step(norm) for norm, coupling in layers]
        kept, free = couplings[0].split(z)
        of_norms = -widened(torch.cat([norm.log_scale for norm, _ in layers])).sum()
        plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if self.memory_free and torch.is_grad_enabled() and not plain:
            flat = itertools.chain(*steps)
            kept, free, logdet = ThroughInverse.apply(couplings, kept, free, condition, *flat)
        else:
            kept, free, logdet = run_couplings(couplings, steps, kept, free, condition)
        return kept, free, logdet + of_norms

    @torch.no_grad()
    def _initialise(self, z: Tensor, condition: Tensor, token_mask: Tensor | None) -> None:
        """Has each ActNorm that is not set yet set itself from what the layers before it give of
        the tokens that count."""
        layers = self._layers
        if all(norm.is_set for norm, _ in layers):
            return
        for norm, coupling in layers:
            norm.initialise(z, token_mask)
            if not norm.is_set:  # by too few tokens
                return
            z, _ = norm(z)
            kept, free = coupling.split(z)
            free, _ = coupling(free, *coupling.step(norm).scale_and_shift(kept, condition))
            z = coupling.merge(kept, free)


class CouplingFlowDistribution(LatentDistribution):
    """What a `CouplingFlowHead` says of condition [T, d]; mean and variance from samples.

    `token_mask` [T] says which tokens may set the head's ActNorms, where they are not set yet.
    """

    def __init__(
        self, head: CouplingFlowHead, condition: Tensor, token_mask: Tensor | None = None
    ) -> None:
        condition = widened(condition)
        dtype = condition.dtype
        super().__init__(
            condition.shape[0], head.target_dim, condition.device, dtype, head.moment_samples
        )
        self.head = head
        self.condition = condition
        self.token_mask = token_mask

    def _log_prob(self, z: Tensor) -> Tensor:
        kept, free, logdet = self.head._to_noise(z, self.condition, self.token_mask)
        log_prob = standard_normal_log_prob(kept) + standard_normal_log_prob(free) + logdet
        # In training a question to the device would be one a step, which then waits for it.
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _check_density(z, log_prob)
        return log_prob

    @torch.no_grad()
    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        noise = self._normal(n, generator)
        z = self.head.from_noise(noise.flatten(0, 1), self.condition.repeat(n, 1))
        if may_be_read(z) and not bool(z.isfinite().all()):
            bad = int((~z.isfinite()).any(-1).sum())
            raise ValueError(
                f"sample: every coordinate must be finite, {bad} of {len(z)} samples have one that "
                f"is not in {z.dtype}: the head's scales, its other weights or its condition are "
                f"too large or not finite themselves; check the weights"
            )
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
