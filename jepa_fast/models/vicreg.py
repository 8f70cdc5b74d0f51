"""Loss in latent space, with VICReg's terms as insurance against collapse (arXiv 2105.04906)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from jepa_fast.nn.precision import without_autocast
from jepa_fast.nn.ranks import share_of_batch, sum_over_ranks

VICREG_WEIGHTS = (25.0, 25.0, 1.0)
"""The paper's weights of invariance (here the prediction loss), variance and covariance."""


def insured_loss(
    prediction: Tensor,
    teacher: Tensor,
    index: Tensor,
    mask: Tensor | None,
    kind: str,
    normalize_target: bool,
    weights: Sequence[float] | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Prediction loss, plus variance and covariance of the predictions where ``weights`` are given.

    Args:
        prediction: ``[B, K, D]``.
        teacher: ``[B, N, D]``.
        index: ``[B, K]`` tokens of the teacher that are predicted.
        mask: ``[B, K]`` bool, False where a token does not count.
        kind: see :func:`~jepa_fast.ops.latent_loss`, like ``normalize_target``.
        weights: of prediction loss, variance and covariance.

    Returns:
        Scalar float32, and its parts by name, detached.
    """
    from jepa_fast import ops

    loss = ops.latent_loss(
        prediction,
        teacher,
        index,
        kind=kind,
        normalize_target=normalize_target,
        target_mask=mask,
    )
    if mask is not None:
        loss = loss * share_of_batch(mask.sum)
    parts = {"prediction_loss": loss.detach()}
    if weights is not None:
        variance, covariance = variance_covariance(prediction, mask)
        parts |= {"variance": variance.detach(), "covariance": covariance.detach()}
        loss = weights[0] * loss + weights[1] * variance + weights[2] * covariance
    return loss, parts


def variance_covariance(tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How far dimensions are from unit spread, and how much they say the same.

    Args:
        tokens: ``[..., D]``.
        mask: ``[...]`` bool, False where a token does not count.

    Returns:
        Scalars float32: mean over dimensions of ``relu(1 - sqrt(variance + 1e-4))`` (equation 1),
        and the sum of squared covariances of different dimensions over D (equations 3 and 4). Both
        are over the real tokens of all processes, with ``n - 1`` in the denominator.
    """
    # Squares of half-precision covariances would keep two digits.
    with without_autocast(tokens):
        x = tokens.float().flatten(0, -2)
        real = x.new_ones(len(x), 1) if mask is None else mask.flatten()[:, None].float()
        count = sum_over_ranks(real.sum())
        x = x.where(real > 0, 0.0)
        centred = (x - sum_over_ranks(x.sum(0)) / count.clamp(min=1)) * real
        covariance = sum_over_ranks(centred.T @ centred) / (count - 1).clamp(min=1)
        variance = covariance.diagonal()
        apart = covariance.square().sum() - variance.square().sum()
        return F.relu(1 - (variance + 1e-4).sqrt()).mean(), apart / x.shape[1]
