"""masked_linear as in a MADE, against dense layers with a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import masked_linear_cost
from plain import Other, backend_of, degree_mask, operator_race, values
from torch import Tensor

from jepa_fast.perf import Case, Race, benchmark

# Layers of an autoregressive head on 384 coordinates: hidden, and the output of 5 components.
_SMALL = {"T": 64, "I": 192, "O": 256, "repeats": 1}
_HIDDEN = {"T": 2048, "I": 512, "O": 512, "repeats": 1}
_OUTPUT = {"T": 2048, "I": 512, "O": 5760, "repeats": 15}
_HIDDEN_L = {"T": 256 * 132, "I": 2048, "O": 2048, "repeats": 1}


@benchmark(
    [
        Case("masked_linear", "small", _SMALL, quick=True),
        Case("masked_linear", "hidden-2048-tokens", _HIDDEN, devices=("cpu",)),
        Case("masked_linear", "output-2048-tokens", _OUTPUT, devices=("cpu",)),
        Case("masked_linear", "hidden-vit-l", _HIDDEN_L, "bfloat16", ("cuda",)),
    ]
)
def bench_masked_linear(case: Case, device: str) -> Race:
    """Forward and backward; degrees ascend, so that half of the weights count."""
    tokens, inputs, outputs = (case[size] for size in ("T", "I", "O"))
    x = values(tokens, inputs, dtype=case.dtype, device=device, grad=True)
    weight = values(outputs, inputs, dtype=case.dtype, device=device, seed=1)
    weight = weight.mul_(inputs**-0.5).requires_grad_()
    bias = values(outputs, dtype=case.dtype, device=device, seed=2, grad=True)
    in_degree = torch.arange(inputs, device=device)
    # An output layer has its coordinates once for each number that describes a component.
    coordinates = outputs // case["repeats"]
    out_degree = torch.arange(coordinates, device=device) * inputs // coordinates
    out_degree = out_degree.repeat(case["repeats"])
    arguments = (x, weight, bias, in_degree, out_degree)
    mask = degree_mask(in_degree, out_degree, strict=False)

    def stored_mask(x: Tensor, weight: Tensor, bias: Tensor, *degrees: Tensor) -> Tensor:
        return F.linear(x, weight * mask, bias)

    return operator_race(
        case,
        device,
        masked_linear_cost(case, backward=True),
        arguments,
        backend=backend_of("masked_linear", *arguments, False),
        grads=[values(tokens, outputs, dtype=case.dtype, device=device, seed=3)],
        others={"stored_mask": Other(stored_mask)},
    )
