"""Autoregressive head: every coordinate given the ones before it, in one masked network."""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast import ops
from jepa_fast._arguments import holds_integers, integer
from jepa_fast.nn.heads.interface import (
    LatentDistribution,
    MaskedHead,
    check_positive,
)
from jepa_fast.nn.heads.mixture import init_mixture_projection
from jepa_fast.nn.linear import Linear, check_is_what_its_weights_say
from jepa_fast.nn.precision import widened, without_autocast
from jepa_fast.ops.mixture_nll import (
    check_mixture_options,
    component_scale,
    split_mixture_parameters,
)

_NOISE_PLACES = 32  # that are drawn at once


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


class AutoregressiveHead(MaskedHead):
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
        TypeError: a size or a seed that is no integer, a floor that is no number; in `forward` and
            `distribution`, a masked layer has got an adapter (LoRA), which knows no mask.
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
        order = _order(ordering, target_dim, integer("AutoregressiveHead: seed", seed))
        degree = torch.tensor(order).argsort()
        hidden_degree = torch.arange(hidden_dim) * (target_dim - 1) // hidden_dim
        output_degree = degree.repeat(3 * num_components)
        self.hidden = nn.ModuleList(
            MaskedLinear(hidden_degree if i else degree, hidden_degree) for i in range(depth)
        )
        self.output = MaskedLinear(hidden_degree, output_degree, strict=True)
        self.film = Linear(condition_dim, depth * 2 * hidden_dim)
        self.direct = Linear(condition_dim, len(output_degree), bias=False)
        nn.init.trunc_normal_(self.film.weight, std=0.02)
        nn.init.zeros_(self.film.bias)
        nn.init.trunc_normal_(self.direct.weight, std=0.02)
        init_mixture_projection(self.output, num_components, target_dim, "coordinate")

    def forward(
        self, condition: Tensor, target: Tensor, token_mask: Tensor | None = None
    ) -> Tensor:
        return self.loss_of_distribution(condition, target, token_mask)

    def distribution(self, condition: Tensor) -> AutoregressiveDistribution:
        self.check(condition)
        for name, layer in (*self.hidden.named_children(), ("output", self.output)):
            # An adapter's product has no mask, and sampling reads weights.
            check_is_what_its_weights_say("AutoregressiveHead", name, layer, MaskedLinear)
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
            h = self._film(i, layer(h))
        parameters = (head.output(h) + self.direct).flatten(0, -2)
        return split_mixture_parameters(parameters, head.num_components, self.width, "coordinate")

    def _film(self, layer: int, x: Tensor) -> Tensor:
        scale, shift = self.film[:, layer].unbind(1)
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
        together cost about as much as one pass of the masked network. In float32 at least.
        """
        check_positive("sample", n=n)
        with without_autocast(self.direct):
            return self._scan(int(n), generator)

    def _scan(self, n: int, generator: torch.Generator | None) -> Tensor:
        head = self.head
        layers: list[Any] = list(head.hidden)
        degree = layers[0].in_degree
        order = degree.argsort()
        # How many hidden units are known once the coordinate at each place has been drawn.
        places = torch.arange(self.width, device=self.device)
        known = [0, *torch.searchsorted(head.output.in_degree, places, right=True).tolist()]
        new = [end - begin for begin, end in itertools.pairwise(known)]

        # A row has one coordinate or one unit of all tokens, coordinates in the order in which they
        # are drawn: what is known lies in one piece.
        weights = [widened(layer.weight) for layer in layers]
        weights[0] = weights[0][:, order]
        by_place = [weight.split(new) for weight in weights]
        output = widened(head.output.weight).unflatten(0, (-1, self.width)).unbind(1)  # [3 K, H]
        offset = widened(self.direct + head.output.bias).unflatten(-1, (-1, self.width))
        offset = offset.permute(2, 1, 0).unsqueeze(2).contiguous()  # [D, 3 K, 1, T]
        film = widened(self.film).permute(1, 2, 3, 0).unsqueeze(3).contiguous()
        scale = 1 + film[:, 0]  # [depth, H, 1, T]
        bias = torch.stack([widened(layer.bias) for layer in layers])[..., None, None]
        shift = torch.addcmul(film[:, 1], bias, scale)
        scales, shifts = ([x.split(new) for x in each] for each in (scale, shift))

        tokens = (n, self.tokens)
        rows = n * self.tokens
        z = offset.new_empty(self.width, rows)
        hidden = [offset.new_empty(len(weight), rows) for weight in weights]
        fresh = [h.split(new) for h in hidden]
        draw = _Draw(head, offset.new_empty(3 * head.num_components, rows))
        noise = sampling_noise(head, z, generator)
        for place, (coordinate, of_place) in enumerate(zip(order.tolist(), noise, strict=True)):
            seen = known[place]
            torch.mm(output[coordinate][:, :seen], hidden[-1][:seen], out=draw.parameters)
            draw.parameters.view(offset.shape[1], *tokens).add_(offset[coordinate])
            draw(*of_place, out=z[place])
            if new[place] == 0:
                continue
            h = z[: place + 1]
            for i in range(head.depth):
                units = fresh[i][place]
                torch.mm(by_place[i][place][:, : len(h)], h, out=units)
                x = units.view(new[place], *tokens)
                torch.addcmul(shifts[i][place], x, scales[i][place], out=x)
                F.silu(x, inplace=True)
                h = hidden[i][: known[place + 1]]
        return z[degree].view(self.width, *tokens).permute(1, 2, 0).contiguous()


class _Draw:
    """Draws one coordinate of all tokens from the parameters of its mixtures, [3 K, rows]."""

    def __init__(self, head: AutoregressiveHead, parameters: Tensor) -> None:
        self.head = head
        self.parameters = parameters
        by_kind = parameters.view(3, head.num_components, parameters.shape[1])
        self._logits, self._others = by_kind[0], by_kind[1:]
        self._score = torch.empty_like(self._logits)
        self._component = self._score.new_empty((1, parameters.shape[1]), dtype=torch.int64)
        self._chosen = parameters.new_empty(2, 1, parameters.shape[1])

    def __call__(self, choice: Tensor, deviation: Tensor, out: Tensor) -> None:
        torch.add(self._logits, choice, out=self._score)
        torch.argmax(self._score, 0, keepdim=True, out=self._component)
        index = self._component.expand_as(self._chosen)
        (loc,), (log_scale,) = torch.gather(self._others, 1, index, out=self._chosen)
        scale = component_scale(log_scale, self.head.scale_floor, self.head.scale_map)
        torch.addcmul(loc, scale, deviation, out=out)


def sampling_noise(
    head: AutoregressiveHead, like: Tensor, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """For one place after the other, the random numbers of `like.shape[1]` tokens.

    A token's component is that of the largest sum of logit and noise, which is Gumbel's: [K, rows].
    Its coordinate is the component's mean plus scale times standard noise of the family: [rows].
    """
    width, rows = like.shape
    for first in range(0, width, _NOISE_PLACES):
        places = min(_NOISE_PLACES, width - first)
        choice = like.new_empty(places, head.num_components, rows)
        choice.uniform_(generator=generator).log_().neg_().log_().neg_()
        deviation = like.new_empty(places, rows)
        if head.family == "gaussian":
            deviation.normal_(generator=generator)
        else:
            deviation.uniform_(generator=generator)
            torch.logit(deviation, eps=torch.finfo(like.dtype).eps / 2, out=deviation)
        yield from zip(choice, deviation, strict=True)


def _order(ordering: str | Sequence[int], width: int, seed: int) -> list[int]:
    """The coordinates in the order in which they are drawn."""
    natural = list(range(width))
    if isinstance(ordering, str):
        if ordering == "natural":
            return natural
        if ordering == "reversed":
            return natural[::-1]
        if ordering == "random":
            return random.Random(seed).sample(natural, width)
    elif isinstance(ordering, Iterable):
        listed = list(ordering)
        # What has no index, such as a row of a matrix, could not be sorted either.
        if all(map(_is_integer, listed)) and sorted(map(operator.index, listed)) == natural:
            return list(map(operator.index, listed))
    raise ValueError(
        f"AutoregressiveHead: ordering must be 'natural', 'reversed', 'random' or a "
        f"permutation of 0 .. {width - 1}, got {ordering!r}"
    )


def _is_integer(value: object) -> bool:
    """Whether it is one, also NumPy's or a tensor's."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and holds_integers(value)
    return isinstance(value, Integral)
