"""Mixture density head: one linear layer predicts a mixture a token, or one a coordinate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from jepa_fast import ops
from jepa_fast.nn.heads.interface import LatentDistribution, MaskedHead
from jepa_fast.nn.linear import Linear, has_hooks, is_what_its_weights_say
from jepa_fast.nn.precision import widened
from jepa_fast.ops.mixture_nll import (
    check_mixture_options,
    component_scale,
    mixture_parameter_count,
    split_mixture_parameters,
)


class MixtureHead(MaskedHead):
    """Mixture density network on the predictor's tokens.

    Its one layer's outputs are laid out as `jepa_fast.ops.linear_mixture_nll` documents, which
    reads the layer's weights. A layer with an adapter (LoRA) or hooks is called, and what it gives
    is kept.

    Args:
        condition_dim: d.
        target_dim: D.
        num_components: K.
        family: `"gaussian"` or `"logistic"` components.
        event: `"joint"`, one mixture over whole vectors, or `"coordinate"`, one a coordinate.
        scale_floor: added to every scale, positive.
        scale_map: `"exp"` or `"softplus"`.
        moment_samples: as in `Head`; for the entropy of more than one component.

    Raises:
        ValueError: an unknown name, no component, a floor that is not positive, or fewer than 2
            samples.

    Source: mixture density networks, Bishop 1994.
    """

    def __init__(
        self,
        condition_dim: int,
        target_dim: int,
        num_components: int = 5,
        family: str = "gaussian",
        event: str = "joint",
        scale_floor: float = 1e-3,
        scale_map: str = "exp",
        moment_samples: int = 1024,
    ) -> None:
        super().__init__(condition_dim, target_dim, moment_samples)
        check_mixture_options("MixtureHead", family, event, scale_floor, scale_map, num_components)
        self.num_components = num_components
        self.family = family
        self.event = event
        self.scale_floor = scale_floor
        self.scale_map = scale_map
        outputs = mixture_parameter_count(num_components, target_dim, event)
        self.projection = Linear(condition_dim, outputs)
        init_mixture_projection(self.projection, num_components, target_dim, event)

    def forward(
        self, condition: Tensor, target: Tensor, token_mask: Tensor | None = None
    ) -> Tensor:
        if has_hooks(self.projection) or not is_what_its_weights_say(self.projection):
            return self.loss_of_distribution(condition, target, token_mask)
        self.check(condition, target)
        nll = ops.linear_mixture_nll(
            condition,
            self.projection.weight,
            self.projection.bias,
            target,
            self.num_components,
            self.family,
            self.event,
            self.scale_floor,
            self.scale_map,
            token_mask=token_mask,
        )
        return nll / self.target_dim

    def distribution(self, condition: Tensor) -> MixtureDistribution:
        self.check(condition)
        parameters = split_mixture_parameters(
            self.projection(condition), self.num_components, self.target_dim, self.event
        )
        return MixtureDistribution(
            *parameters,
            self.family,
            self.event,
            self.scale_floor,
            self.scale_map,
            self.moment_samples,
        )


class MixtureDistribution(LatentDistribution):
    """Mixtures with the parameters of `jepa_fast.ops.mixture_nll`.

    Everything is in closed form, but for the entropy of more than one component.
    """

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        log_scale: Tensor,
        family: str,
        event: str,
        scale_floor: float,
        scale_map: str,
        moment_samples: int = 1024,
    ) -> None:
        super().__init__(loc.shape[0], loc.shape[2], loc.device, moment_samples=moment_samples)
        self.logits, self.loc, self.log_scale = logits, loc, log_scale
        self.family, self.event = family, event
        self.scale_floor, self.scale_map = scale_floor, scale_map

    def _log_prob(self, z: Tensor) -> Tensor:
        return -ops.mixture_nll(
            z,
            self.logits,
            self.loc,
            self.log_scale,
            self.family,
            self.event,
            self.scale_floor,
            self.scale_map,
        )

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        return ops.mixture_sample(
            self.logits,
            self.loc,
            self.log_scale,
            self.family,
            self.event,
            self.scale_floor,
            self.scale_map,
            n=n,
            generator=generator,
        )

    @property
    def mean(self) -> Tensor:
        return ops.mixture_mean(self.logits, self.loc)

    @property
    def variance(self) -> Tensor:
        return ops.mixture_variance(
            self.logits, self.loc, self.log_scale, self.family, self.scale_floor, self.scale_map
        )

    @property
    @torch.no_grad()
    def entropy(self) -> Tensor:
        if self.loc.shape[1] > 1:
            return super().entropy
        of_unit_scale = {"gaussian": 0.5 * math.log(2 * math.pi * math.e), "logistic": 2.0}
        log_scale = self.log_scale[:, 0]
        scale = component_scale(log_scale.double(), self.scale_floor, self.scale_map)
        return (scale.log() + of_unit_scale[self.family]).sum(-1).to(widened(log_scale).dtype)

    def _cdf(self, z: Tensor) -> Tensor:
        return ops.mixture_cdf(
            z,
            self.logits,
            self.loc,
            self.log_scale,
            self.family,
            self.scale_floor,
            self.scale_map,
        )


@torch.no_grad()
def init_mixture_projection(
    projection: nn.Linear, num_components: int, width: int, event: str
) -> None:
    """Starts with equal weights, log-scales at 0 and components apart, lest they learn the same."""
    nn.init.trunc_normal_(projection.weight, std=0.02)
    nn.init.zeros_(projection.bias)
    _, loc, _ = split_mixture_parameters(projection.bias[None], num_components, width, event)
    loc.normal_(std=0.5)
