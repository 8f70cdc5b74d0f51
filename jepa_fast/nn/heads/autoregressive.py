"""Autoregressive head: every coordinate given the ones before it, in one masked network."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast import ops
from jepa_fast.nn.heads.interface import Head, LatentDistribution, check_positive
from jepa_fast.nn.heads.mixture import init_mixture_projection
from jepa_fast.nn.precision import widened
from jepa_fast.ops.mixture_nll import check_mixture_options, split_mixture_parameters


class MaskedLinear(nn.Linear):
    """A linear layer whose outputs see the inputs of no higher degree, of lower degree if strict.

    The degrees are in the state dict: they say what the weights mean.
    """

    in_degree: Tensor
    out_degree: Tensor

    def __init__(self, in_degree: Tensor, out_degree: Tensor, strict: bool = False) -> None:
        super().__init__(len(in_degree), len(out_degree))
        self.register_buffer("in_degree", in_degree.clone())
        self.register_buffer("out_degree", out_degree.clone())
        self.strict = strict

    def forward(self, x: Tensor) -> Tensor:
        return ops.masked_linear(
            x.to(self.weight.dtype),
            self.weight,
            self.bias,
            self.in_degree,
            self.out_degree,
            self.strict,
        )


class AutoregressiveHead(Head):
    """`p(z | condition) = prod_j p(z_j | z_<j, condition)`, each factor a mixture (RNADE).

    A MADE: masked layers let the parameters of a coordinate see only the coordinates before it in
    the ordering. The condition enters every hidden layer by FiLM (a scale and a shift a unit), and
    the output by a linear layer of its own, since the first coordinate has no hidden unit to read.

    Args:
        condition_dim: d.
        target_dim: D.
        num_components: K mixture components a coordinate.
        family: `"gaussian"` or `"logistic"` components.
        hidden_dim: width of the hidden layers; best not below D, or coordinates share units.
        depth: number of hidden layers.
        ordering: `"natural"`, `"reversed"`, `"random"`, or the coordinates 0 .. D - 1 in the order
            in which they are drawn.
        seed: of the random ordering.
        scale_floor: added to every scale, positive.
        scale_map: `"exp"` or `"softplus"`.
        moment_samples: as in `Head`.

    Raises:
        ValueError: an unknown name, an ordering that is no permutation, a size below 1, a floor
            that is not positive.

    Source: RNADE, arXiv 1306.0186; MADE, arXiv 1502.03509; FiLM, arXiv 1709.07871.
    """

    def __init__(
        self,
        condition_dim: int,
        target_dim: int,
        num_components: int = 5,
        family: str = "gaussian",
        hidden_dim: int = 512,
        depth: int = 2,
        ordering: str | Sequence[int] = "natural",
        seed: int = 0,
        scale_floor: float = 1e-3,
        scale_map: str = "exp",
        moment_samples: int = 1024,
    ) -> None:
        super().__init__(condition_dim, target_dim, moment_samples)
        check_mixture_options(
            "AutoregressiveHead", family, "coordinate", scale_floor, scale_map, num_components
        )
        check_positive("AutoregressiveHead", hidden_dim=hidden_dim, depth=depth)
        self.num_components = num_components
        self.family = family
        self.depth = depth
        self.scale_floor = scale_floor
        self.scale_map = scale_map

        # degree[c]: the place of coordinate c in the ordering. A hidden unit of degree j sees the
        # first j + 1 coordinates; hidden degrees ascend, so what a coordinate may read is a prefix.
        order = _order(ordering, target_dim, seed)
        degree = torch.tensor(order).argsort()
        hidden_degree = torch.arange(hidden_dim) * (target_dim - 1) // hidden_dim
        output_degree = degree.repeat(3 * num_components)
        self.hidden = nn.ModuleList(
            MaskedLinear(hidden_degree if i else degree, hidden_degree) for i in range(depth)
        )
        self.output = MaskedLinear(hidden_degree, output_degree, strict=True)
        self.film = nn.Linear(condition_dim, depth * 2 * hidden_dim)
        self.direct = nn.Linear(condition_dim, len(output_degree), bias=False)
        nn.init.trunc_normal_(self.film.weight, std=0.02)
        nn.init.zeros_(self.film.bias)
        nn.init.trunc_normal_(self.direct.weight, std=0.02)
        init_mixture_projection(self.output, num_components, target_dim, "coordinate")

    def forward(self, condition: Tensor, target: Tensor) -> Tensor:
        self.check(condition, target)
        nll = -self.distribution(condition).log_prob(target)
        return nll.sum() / max(nll.numel() * self.target_dim, 1)

    def distribution(self, condition: Tensor) -> AutoregressiveDistribution:
        self.check(condition)
        return AutoregressiveDistribution(self, condition)


class AutoregressiveDistribution(LatentDistribution):
    """What an `AutoregressiveHead` says of condition [T, d].

    Mean and variance average those that the mixtures have in closed form given each sample's
    coordinates before: exact for the first in the ordering, closer than the samples for the rest.
    `cdf` is in closed form, too: of each coordinate given those of z before it in the ordering. Of
    targets that the distribution describes, these are uniform and independent of one another
    (Rosenblatt's transform).
    """

    def __init__(self, head: AutoregressiveHead, condition: Tensor) -> None:
        super().__init__(
            condition.shape[0],
            head.target_dim,
            condition.device,
            moment_samples=head.moment_samples,
        )
        self.head = head
        self.film = head.film(condition).unflatten(-1, (head.depth, 2, -1))
        self.direct = head.direct(condition)

    def parameters(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, loc, log_scale) of every coordinate given those before it.

        Each is [T, K, D] from z [T, D], or [n * T, K, D] from z [n, T, D].
        """
        head = self.head
        h = z
        for i, layer in enumerate(head.hidden):
            h = self._film(i, slice(None), layer(h))
        parameters = (head.output(h) + self.direct).flatten(0, -2)
        return split_mixture_parameters(parameters, head.num_components, self.width, "coordinate")

    def _film(self, layer: int, units: slice, x: Tensor) -> Tensor:
        scale, shift = self.film[:, layer, 0, units], self.film[:, layer, 1, units]
        return F.silu(x * (1 + scale) + shift)

    def _log_prob(self, z: Tensor) -> Tensor:
        head = self.head
        return -ops.mixture_nll(
            z, *self.parameters(z), head.family, "coordinate", head.scale_floor, head.scale_map
        )

    def _cdf(self, z: Tensor) -> Tensor:
        head = self.head
        return ops.mixture_cdf(
            z, *self.parameters(z), head.family, head.scale_floor, head.scale_map
        )

    def _moments_given(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        head = self.head
        logits, loc, log_scale = self.parameters(samples)
        mean = ops.mixture_mean(logits, loc)
        variance = ops.mixture_variance(
            logits, loc, log_scale, head.family, head.scale_floor, head.scale_map
        )
        return mean.view_as(samples), variance.view_as(samples)

    @torch.no_grad()
    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """[n, T, D], coordinate by coordinate, computing every hidden unit once.

        A unit is computed when the last coordinate that it sees has been drawn, so all D steps
        together cost about as much as one pass of the masked network.
        """
        check_positive("sample", n=n)
        head = self.head
        layers: list[Any] = list(head.hidden)
        degree = layers[0].in_degree
        order = degree.argsort()
        # How many hidden units are known once the coordinate at each place has been drawn.
        places = torch.arange(self.width, device=self.device)
        known = torch.searchsorted(head.output.in_degree, places, right=True).tolist()

        # From here on coordinates are in drawing order: what is known is a prefix.
        weights = [layer.weight for layer in layers]
        weights[0] = weights[0][:, order]
        output = head.output.weight.unflatten(0, (-1, self.width))[:, order]  # [3 K, D, H]
        offset = (self.direct + head.output.bias).unflatten(-1, (-1, self.width))[..., order]
        z = widened(offset).new_zeros(n, self.tokens, self.width)
        hidden = [offset.new_zeros(n, self.tokens, len(weight)) for weight in weights]
        seen = 0
        for place in range(self.width):
            parameters = hidden[-1][..., :seen] @ output[:, place, :seen].T + offset[..., place]
            z[..., place] = self._draw(parameters, generator)
            new = slice(seen, known[place])
            seen = known[place]
            h = z[..., : place + 1].to(offset.dtype)
            for i, layer in enumerate(layers):
                x = F.linear(h, weights[i][new, : h.shape[-1]], layer.bias[new])
                hidden[i][..., new] = self._film(i, new, x)
                h = hidden[i][..., :seen]
        return z[..., degree]

    def _draw(self, parameters: Tensor, generator: torch.Generator | None) -> Tensor:
        """One coordinate, [n, T], from its mixtures' parameters [n, T, 3 K]."""
        head = self.head
        logits, loc, log_scale = split_mixture_parameters(
            parameters.flatten(0, 1), head.num_components, 1, "coordinate"
        )
        draw = ops.mixture_sample(
            logits,
            loc,
            log_scale,
            head.family,
            "coordinate",
            head.scale_floor,
            head.scale_map,
            generator=generator,
        )
        return draw.view(parameters.shape[:2])


def _order(ordering: str | Sequence[int], width: int, seed: int) -> list[int]:
    """The coordinates in the order in which they are drawn."""
    natural = list(range(width))
    if ordering == "natural":
        return natural
    if ordering == "reversed":
        return natural[::-1]
    if ordering == "random":
        return random.Random(seed).sample(natural, width)
    if isinstance(ordering, str) or sorted(ordering) != natural:
        raise ValueError(
            f"AutoregressiveHead: ordering must be 'natural', 'reversed', 'random' or a "
            f"permutation of 0 .. {width - 1}, got {ordering!r}"
        )
    return list(ordering)
