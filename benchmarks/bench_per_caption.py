"""The per-caption reading of TC-JEPA's conditioner: attention, MLP and LayerNorm a caption, pool.

`eager` and `compile` have all captions at once, on the plain attention; `at_once` has them so on
our operator. Ours, from some size on, takes a few at a time and computes each once more in the
backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from bench_step import assert_as_accurate, seeded
from cases import CAPTIONS, per_caption_cost
from plain import PLAIN, TOLERANCE, Compiled, compiled, drawn_words, plain_operators, values
from torch import Tensor, nn

from jepa_fast import ops
from jepa_fast.nn.text_conditioner import WordConditioner, WordConditioning
from jepa_fast.perf import Case, Race, benchmark

_SMALL = {"B": 2, "M": 2, "T": 38, "C": 3, "S": 16, "d": 96}
_JUMP = 1e-3
"""How far off gradients may be besides: of captions that are equal but for rounding the maximum
picks one, in ours not always eager's."""


@benchmark(
    [
        Case("per_caption", "small", _SMALL, quick=True),
        Case("per_caption", "4-images", {**CAPTIONS, "B": 4}, devices=("cpu",)),
        # As many as all captions at once leave memory for.
        Case("per_caption", "64-images", {**CAPTIONS, "B": 64}, "bfloat16", ("cuda",)),
    ]
)
def bench_per_caption(case: Case, device: str) -> Race:
    """Forward and backward of a layer, on keys and values that are there."""
    word_mask = drawn_words(case["B"], case["C"], case["S"], device)
    layer = _Layer(case).to(device)
    grad = values(case["M"] * case["B"], case["T"], case["d"], device=device, seed=4)

    def run(way: Callable[..., Any], layer: _Layer = layer) -> dict[str, Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=layer.halved):
            pooled, sparsity = way(layer, word_mask)
        upstream = [grad.to(pooled.dtype), torch.ones_like(sparsity)]
        names, inputs = zip(*layer.learned(), strict=True)
        grads = torch.autograd.grad([pooled, sparsity], inputs, upstream)
        return {"pooled": pooled.detach(), "sparsity": sparsity.detach()} | dict(
            zip(names, grads, strict=True)
        )

    built, why_not = compiled(_at_once, device)
    ways: dict[str, Callable[..., Any]] = {
        "eager": _plain,
        **built,
        "at_once": lambda *arguments: _at_once(*arguments, ops.text_cross_attention),
    }

    def check() -> None:
        wide = copy.deepcopy(layer).double()
        wide.halved = False
        exact, eager = run(_at_once, wide), run(_plain)
        for way in (_ours, *ways.values()):
            if not isinstance(way, Compiled) or way.built:
                tolerance = TOLERANCE[case.dtype]
                assert_as_accurate(run(way), eager, exact, tolerance, max(tolerance, _JUMP))

    return Race(
        ours=lambda: run(_ours),
        others={name: lambda way=way: run(way) for name, way in ways.items()},  # type: ignore[misc]
        check=check,
        cost=per_caption_cost(case, int(word_mask.sum())),
        why_not=why_not,
    )


class _Layer(nn.Module):
    """What comes into a layer, and its weights."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        words = (case["B"], case["C"], case["S"], case["d"])
        self.halved = case.dtype == "bfloat16"
        self.keys = nn.Parameter(values(*words, dtype=case.dtype, seed=1))
        self.values = nn.Parameter(values(*words, dtype=case.dtype, seed=2))
        self.tokens = nn.Parameter(values(case["M"] * case["B"], case["T"], case["d"], seed=3))
        with seeded():
            self.conditioner = WordConditioner(case["d"], 1, 1, per_caption=True)
        self.conditioner.keys_values.requires_grad_(False)  # it has made keys and values

    def learned(self) -> list[tuple[str, nn.Parameter]]:
        """All that takes a gradient, by name."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]


def _ours(layer: _Layer, word_mask: Tensor) -> tuple[Tensor, Tensor]:
    words = ([layer.keys], [layer.values], word_mask)
    conditioning = WordConditioning(layer.conditioner, *words, token_mask=None, share=1.0)
    pooled = conditioning(0, layer.tokens)
    return pooled, conditioning.sparsity()


def _plain(layer: _Layer, word_mask: Tensor) -> tuple[Tensor, Tensor]:
    with plain_operators():  # linear layers, too
        return _at_once(layer, word_mask)


def _at_once(
    layer: _Layer, word_mask: Tensor, attention: Callable[..., Any] = PLAIN["text_cross_attention"]
) -> tuple[Tensor, Tensor]:
    of_layer: Any = layer.conditioner.layers[0]
    words = (layer.keys, layer.values, layer.tokens, word_mask)
    y, sparsity = attention(of_layer.query(layer.tokens), *words, pool="none")
    z = of_layer.norm(of_layer.mlp(y))
    there = word_mask.any(2).repeat(y.shape[0] // len(word_mask), 1)[:, :, None, None]
    return z.masked_fill(~there, -torch.inf).amax(1), sparsity
