"""What a probabilistic head says of held-out targets, and how far it can be believed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jepa_fast.masks import BlockMasks, PackedMasks
from jepa_fast.models.probijepa import counted_tokens
from jepa_fast.nn.heads import LatentDistribution
from jepa_fast.nn.heads.interface import check_positive
from jepa_fast.ops._checks import check_integer

SAMPLES = 39
"""A token. Of a calibrated head the 40 ranks of a target among them are equally likely, so that the
intervals below hold a whole number of ranks."""
COVERAGES = (50, 80, 95)  # percent
_DIVERSE = 8  # samples a token whose distances are taken
_TOGETHER = 512  # tokens whose samples are in memory at a time
_PAIRED = 2048  # targets whose distances from each other are taken


@dataclass(frozen=True)
class HeadScores:
    """How well the distributions of a head describe targets.

    tokens: how many targets were asked about.
    nll: nats a coordinate; None where that is not finite.
    normal_nll: that of a normal fitted to every coordinate of the targets, which knows nothing
        else: how hard these targets are. None where that is not finite.
    coverage: by percent, the share of coordinates in the central interval of `SAMPLES` samples;
        None where samples are not finite.
    pit: shares of the ranks that the targets' coordinates have among as many samples; None where
        samples are not finite.
    diversity: mean distance of samples of one token, over that of targets of different tokens; None
        where that is not finite.
    """

    tokens: int
    nll: float | None
    normal_nll: float | None
    coverage: dict[str, float] | None
    pit: tuple[float, ...] | None
    diversity: float | None

    def __str__(self) -> str:
        nll, normal = (
            "not finite" if value is None else f"{value:.3f}"
            for value in (self.nll, self.normal_nll)
        )
        told = f"{self.tokens} held-out targets: NLL {nll} nats a coordinate"
        told += f" (a fitted normal: {normal}), "
        if self.coverage is None:
            return told + "samples that are not finite"
        held = " / ".join(f"{100 * share:.0f}" for share in self.coverage.values())
        return told + f"{held} % within the central {' / '.join(self.coverage)} %"


@torch.no_grad()
def score_head(
    model: Any,
    batches: Iterable[tuple[Tensor, BlockMasks | PackedMasks]],
    tokens: int = 512,
    seed: int = 0,
) -> HeadScores:
    """Asks the head of a `ProbIJepa` about targets of images that it did not see.

    Args:
        model: in eval mode. Its head's distributions have `log_prob(z)` and `sample(n, generator)`.
        batches: images [B, 3, H, W] and their masks, on the model's device; of packed ones the
            targets that count are asked about, each of them once.
        tokens: how many of all their targets, at most; chosen by `seed`.
        seed: also of the samples.

    Raises:
        TypeError: a model without a head, `tokens` or `seed` that is no integer.
        ValueError: `tokens` below 1, or fewer than 2 targets.
    """
    if not hasattr(model, "head"):
        raise TypeError(f"score_head: model must be a ProbIJepa, got {type(model).__name__}")
    check_positive("score_head", tokens=tokens)
    check_integer("score_head", "seed", seed)
    conditions, targets = [], []
    for images, masks in batches:
        output = model(images, masks)
        condition, target = counted_tokens(masks, output.prediction, output.target)
        conditions.append(condition)
        targets.append(target)
    if sum(map(len, targets)) < 2:
        raise ValueError("score_head: batches must have at least 2 target tokens")
    condition, target = torch.cat(conditions), torch.cat(targets)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(int(seed)))
    chosen = order[:tokens].to(target.device)
    asked = _Asked(target[chosen], seed)
    for some in chosen.split(_TOGETHER):
        asked.add(model.head.distribution(condition[some]), target[some])
    return asked.scores(target)


@torch.no_grad()
def score_distribution(
    distribution: LatentDistribution, target: Tensor, population: Tensor, seed: int = 0
) -> HeadScores:
    """How well distributions of T tokens describe their targets.

    Args:
        target: [T, D].
        population: [P, D], the targets that the normal is fitted to.
        seed: of the samples.

    Raises:
        TypeError: `seed` is no integer.
        ValueError: no target, or a population of another width.
    """
    check_integer("score_distribution", "seed", seed)
    if not len(target):
        raise ValueError("score_distribution: target must be of at least 1 token, got none")
    if population.ndim != 2 or population.shape[1] != target.shape[-1]:
        raise ValueError(
            f"score_distribution: population must be [P, D] with the D = {target.shape[-1]} of "
            f"target, got {list(population.shape)}"
        )
    asked = _Asked(target, seed)
    asked.add(distribution, target)
    return asked.scores(population)


class _Asked:
    """Sums over the tokens that distributions have been asked about, of all `targets`."""

    def __init__(self, targets: Tensor, seed: int) -> None:
        self.targets = targets
        self.generator = torch.Generator(targets.device).manual_seed(int(seed))
        self.nll = torch.zeros((), dtype=torch.float64, device=targets.device)
        self.ranks = torch.zeros(SAMPLES + 1, dtype=torch.int64, device=targets.device)
        self.within = torch.zeros_like(self.nll)
        self.all_finite = True

    def add(self, distribution: LatentDistribution, target: Tensor) -> None:
        self.nll -= distribution.log_prob(target).sum(dtype=torch.float64)
        samples = distribution.sample(SAMPLES, self.generator)
        self.all_finite &= bool(samples.isfinite().all())
        rank = (samples < target).sum(0)
        self.ranks += torch.bincount(rank.flatten(), minlength=SAMPLES + 1)
        few = samples[:_DIVERSE].transpose(0, 1)  # [T, n, D]
        self.within += torch.cdist(few, few).sum(dtype=torch.float64)

    def scores(self, population: Tensor) -> HeadScores:
        tokens, width = self.targets.shape
        normal = 0.5 * (2 * math.pi * math.e * population.var(0).clamp_min(1e-12)).log().mean()
        pit = self.ranks.double() / (tokens * width)
        coverage = {}
        for percent in COVERAGES:
            outside = (SAMPLES + 1) * (100 - percent) // 200  # ranks at either end
            coverage[str(percent)] = pit[outside : SAMPLES + 1 - outside].sum().item()
        within = self.within / (tokens * _DIVERSE * (_DIVERSE - 1))
        return HeadScores(
            tokens=tokens,
            nll=_finite(self.nll / (tokens * width)),
            normal_nll=_finite(normal),
            coverage=coverage if self.all_finite else None,
            pit=tuple(pit.tolist()) if self.all_finite else None,
            diversity=_finite(within / torch.pdist(self.targets[:_PAIRED]).mean()),
        )


def _finite(value: Tensor) -> float | None:
    number = value.item()
    return number if math.isfinite(number) else None
