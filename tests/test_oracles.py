"""Likelihoods beside those of zuko and nflows, where they are installed (the extra `test`)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_mixture_nll import each_event, parameters
from torch import Tensor, nn

from jepa_fast import ops
from jepa_fast.nn.heads import AutoregressiveHead, CouplingFlowHead


def zuko() -> Any:
    library = pytest.importorskip("zuko", reason="an oracle alone: pip install zuko")
    from zuko import distributions, nn  # noqa: F401, so that they are there as attributes

    return library


def nflows() -> Any:
    library = pytest.importorskip("nflows", reason="an oracle alone: pip install nflows")
    from nflows import distributions, flows, transforms  # noqa: F401, as above
    from nflows.nn.nde import made  # noqa: F401

    return library


def normal_head(head: nn.Module) -> None:
    """Weights with which every path through a network counts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)


@each_event
def test_mixture_is_zukos(event: str) -> None:
    target, logits, loc, log_scale = (x.detach() for x in parameters(4, 5, 3, event))
    scale = log_scale.exp() + 1e-3
    distributions = zuko().distributions
    if event == "joint":
        mixture = distributions.Mixture(distributions.DiagNormal(loc, scale), logits)
        expected = mixture.log_prob(target)
    else:
        normals = torch.distributions.Normal(loc.transpose(1, 2), scale.transpose(1, 2))
        mixture = distributions.Mixture(normals, logits.transpose(1, 2))
        expected = mixture.log_prob(target).sum(-1)
    got = -ops.mixture_nll(target, logits, loc, log_scale, event=event)
    torch.testing.assert_close(got, expected)


def test_mixture_is_that_of_nflows_made() -> None:
    made = (
        nflows()
        .nn.nde.made.MixtureOfGaussiansMADE(
            features=4, hidden_features=12, context_features=3, num_mixture_components=3
        )
        .double()
    )
    normal_head(made)
    z, context = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    logits, loc, raw = made(z, context).view(5, 4, 3, 3).permute(3, 0, 2, 1)
    got = -ops.mixture_nll(
        z, logits, loc, raw, event="coordinate", scale_floor=made.epsilon, scale_map="softplus"
    )
    torch.testing.assert_close(got, made.log_prob(z, context))


@pytest.mark.parametrize("ordering", ["natural", "random"])
def test_autoregressive_head_is_a_made_of_zukos(ordering: str) -> None:
    """With copied weights, where the condition says nothing."""
    library = zuko()
    width, components = 5, 3
    head = AutoregressiveHead(
        2, width, num_components=components, hidden_dim=16, depth=2, ordering=ordering
    ).double()
    normal_head(head)
    with torch.no_grad():
        for layer in (head.film, head.direct):
            for parameter in layer.parameters():
                parameter.zero_()
    layers: list[nn.Module] = []
    for ours in (*head.hidden, head.output):
        rows = ours.out_degree.unsqueeze(1)
        visible = rows > ours.in_degree if ours.strict else rows >= ours.in_degree
        theirs = library.nn.MaskedLinear(visible).double()
        theirs.load_state_dict({"weight": ours.weight, "bias": ours.bias, "mask": visible})
        layers += [theirs, nn.SiLU()]
    network = nn.Sequential(*layers[:-1])
    z = torch.randn(6, width, dtype=torch.float64)
    logits, loc, log_scale = network(z).view(6, 3, components, width).transpose(2, 3).unbind(1)
    normals = torch.distributions.Normal(loc, log_scale.exp() + head.scale_floor)
    expected = library.distributions.Mixture(normals, logits).log_prob(z).sum(-1)
    got = head.distribution(torch.zeros(6, 2, dtype=torch.float64)).log_prob(z)
    torch.testing.assert_close(got, expected)


class _HalfNetwork(nn.Module):
    """A coupling's network with copied weights, on the coordinates that pass and for the others."""

    def __init__(self, state: dict[str, Tensor], passes: Tensor) -> None:
        super().__init__()
        self.state, self.passes = state, passes

    def forward(self, passing: Tensor, condition: Tensor) -> Tensor:
        state = self.state
        seen = F.linear(passing, state["from_target.weight"][:, self.passes])
        seen = seen + state["from_target.bias"] + condition @ state["from_condition.weight"].T
        hidden = F.silu(F.linear(F.silu(seen), state["hidden.weight"], state["hidden.bias"]))
        raw, shift = F.linear(hidden, state["output.weight"], state["output.bias"]).chunk(2, -1)
        return torch.cat([shift[:, ~self.passes], raw[:, ~self.passes]], -1)


@pytest.mark.parametrize("masks", ["alternate", "random"])
def test_flow_head_is_a_realnvp_of_nflows(masks: str) -> None:
    """With copied weights: the likelihood, and the inverse."""
    library = nflows()
    head = CouplingFlowHead(3, 7, num_couplings=4, hidden_dim=16, masks=masks).double().eval()
    normal_head(head)

    class Bounded(library.transforms.AffineCouplingTransform):
        def _scale_and_shift(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
            shift, raw = parameters.chunk(2, -1)
            return torch.exp(head.couplings[0].scale_bound * torch.tanh(raw)), shift

    layers = []
    for norm, coupling in zip(head.norms, head.couplings, strict=True):
        same = library.transforms.ActNorm(7).double()
        same.load_state_dict(
            {
                "initialized": torch.tensor(True),
                "log_scale": -norm.log_scale,
                "shift": -norm.loc * torch.exp(-norm.log_scale),
            }
        )
        network = _HalfNetwork(coupling.state_dict(), coupling.mask)
        layers += [same, Bounded(~coupling.mask, lambda *_, network=network: network)]
    transform = library.transforms.CompositeTransform(layers).double()
    flow = library.flows.Flow(transform, library.distributions.StandardNormal([7])).double()
    z, condition = torch.randn(5, 7).double(), torch.randn(5, 3).double()
    torch.testing.assert_close(
        head.distribution(condition).log_prob(z), flow.log_prob(z, context=condition)
    )
    noise = torch.randn(5, 7, dtype=torch.float64)
    back, logdet = transform.inverse(noise, context=condition)
    torch.testing.assert_close(head.from_noise(noise, condition), back)
    assert logdet.abs().max() > math.log(2)  # the scales are not all near 1
