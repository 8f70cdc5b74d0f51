"""A linear classifier on frozen features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa_fast._arguments import check_number
from jepa_fast.data import counter
from jepa_fast.eval.features import check_finite, check_labelled

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
_HELD_OUT = 5  # every fifth training feature decides on the penalty
_ITERATIONS = 100


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression on standardised features: `(x - mean) / std @ weight.T + bias`.

    weight [C, D], bias [C], mean [D], std [D]; penalty: the one it was fitted with; classes [C]
    int64: the labels that the rows stand for, ascending.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    penalty: float
    classes: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """The class of every feature, [n] int64."""
        x = (features.float() - self.mean) / self.std
        return self.classes[(x @ self.weight.T + self.bias).argmax(1)]

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of features whose class is their label."""
        return float((self.predict(features) == labels).float().mean())


def fit_linear_probe(
    features: Tensor, labels: Tensor, *, penalties: Sequence[float] = PENALTIES, seed: int = 0
) -> LinearProbe:
    """Multinomial logistic regression, full-batch L-BFGS, the same result every time.

    Minimises mean cross-entropy + penalty / 2 * ||weight||^2. Of several penalties the one with the
    smallest cross-entropy on a held-out fifth of the features is taken, and fitted again on all.

    features: [n, D]; labels: [n] int64 from 0.
    seed: of the held-out fifth.

    Raises TypeError or ValueError naming the argument if there are fewer than two features, if they
    are of another type or shape or not finite, or a penalty is not positive.
    """
    check_labelled("features", features, labels)
    if len(features) < 2:
        raise ValueError(f"features must be at least 2 labelled ones, got {len(features)}")
    if not penalties:
        raise ValueError(f"penalties must be positive, at least one, got {penalties}")
    for i, penalty in enumerate(penalties):
        check_number(f"penalties[{i}]", penalty)
    check_finite("features", features)
    features = features.float()
    std, mean = torch.std_mean(features, dim=0, correction=0)
    std = torch.where(std > 1e-8, std, 1.0)  # a constant dimension becomes zero
    x = (features - mean) / std
    classes, labels = labels.unique(return_inverse=True)  # labels may have large gaps

    best, start = max(penalties), None
    if len(penalties) > 1:
        order = torch.from_numpy(counter.permutation(len(x), seed)).to(x.device)
        held_out = max(1, len(x) // _HELD_OUT)
        val, train = order[:held_out], order[held_out:]
        lowest = math.inf
        fitted = None
        for penalty in sorted(penalties, reverse=True):
            fitted = _fit(x[train], labels[train], len(classes), penalty, fitted)
            loss = float(F.cross_entropy(F.linear(x[val], *fitted), labels[val]))
            if loss >= lowest:
                break  # as a function of the penalty the loss has one valley
            best, start, lowest = penalty, fitted, loss
    weight, bias = _fit(x, labels, len(classes), best, start)
    return LinearProbe(weight, bias, mean, std, best, classes)


def _fit(
    x: Tensor, labels: Tensor, classes: int, penalty: float, start: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Weight and bias that minimise the penalised cross-entropy, from `start` or from zero."""
    weight = x.new_zeros(classes, x.shape[1]) if start is None else start[0].clone()
    bias = x.new_zeros(classes) if start is None else start[1].clone()
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        history_size=20,
        tolerance_grad=1e-5,
        tolerance_change=1e-6,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()
