"""A linear classifier on single patches: does a token know what its patch shows?"""

from __future__ import annotations

from jepa_fast.eval.features import Features
from jepa_fast.eval.linear import fit_linear_probe


def patch_accuracy(train: Features, val: Features) -> float:
    """Share of labelled patches of `val` that a linear probe on those of `train` gets right.

    Raises ValueError if the features hold no labelled patches.
    """
    if train.patches is None or train.patch_labels is None:
        raise ValueError("train must hold labelled patches, got none; see extract()")
    if val.patches is None or val.patch_labels is None or not len(val.patches):
        raise ValueError("val must hold labelled patches, got none; see extract()")
    probe = fit_linear_probe(train.patches, train.patch_labels)
    return probe.accuracy(val.patches, val.patch_labels)
