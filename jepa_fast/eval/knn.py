"""Nearest neighbours on frozen features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa_fast._arguments import check_number, integer
from jepa_fast.eval.features import check_finite, check_labelled

_ROWS = 1024  # validation images compared with all training images at a time


@torch.no_grad()
def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    *,
    k: int = 20,
    temperature: float | None = 0.07,
) -> float:
    """Share of `val` whose class its `k` nearest training images vote for, by cosine similarity.

    train, val: [n, D], [m, D]; train_labels, val_labels: [n], [m] int64 from 0.
    k: neighbours; all there are where they are fewer.
    temperature: a vote weighs exp(similarity / temperature) (Wu et al., arXiv 1805.01978); None
        gives every vote the same weight. Of equal sums the smallest label wins.

    Raises TypeError or ValueError naming the argument if k is no integer from 1, temperature no
    positive and finite number, or if a set is of other types or shapes, empty or not finite.
    """
    k = integer("k", k)
    if k < 1:
        raise ValueError(f"k must be positive, got {k}")
    if temperature is not None:
        check_number("temperature", temperature)
    if len(train) == 0 or len(val) == 0:
        raise ValueError(f"train and val must hold labelled features, got {len(train)}, {len(val)}")
    check_labelled("train", train, train_labels)
    check_labelled("val", val, val_labels)
    if train.shape[1] != val.shape[1]:
        raise ValueError(
            f"val: expected features of the width of train, {train.shape[1]}, got {val.shape[1]}"
        )
    check_finite("train", train)
    check_finite("val", val)
    classes, train_labels = train_labels.unique(return_inverse=True)  # labels may have large gaps
    train = F.normalize(train.float(), dim=1)
    val = F.normalize(val.float(), dim=1)
    correct = 0
    for rows, labels in zip(val.split(_ROWS), val_labels.split(_ROWS), strict=True):
        similarity, nearest = (rows @ train.T).topk(min(k, len(train)), dim=1)  # [rows, k]
        if temperature is None:
            weight = torch.ones_like(similarity)
        else:
            # Less the largest similarity, which changes no vote and avoids overflow.
            weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = F.one_hot(train_labels[nearest], len(classes)) * weight[..., None]
        correct += int((classes[votes.sum(1).argmax(1)] == labels).sum())
    return correct / len(val)
