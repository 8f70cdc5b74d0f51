"""What a frozen encoder makes of a data set: the input of every probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from jepa_fast._arguments import check_integers
from jepa_fast.data import counter
from jepa_fast.data.batch import UNKNOWN, Batch

Encode = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] to tokens [B, N, D]: an encoder, or a model's `encode`."""
Labelled = Batch | Sequence[Tensor]
"""A batch, or its (images, labels), as data sets of others give them; -1 where unknown."""


@dataclass(frozen=True)
class Features:
    """Frozen features of `n` images.

    pooled: [n, D] float32, the mean over an image's tokens.
    labels: [n] int64, -1 where unknown.
    patches: [m, D] float32, tokens of labelled patches, or None if no patch has a label.
    patch_labels: [m] int64, or None.
    """

    pooled: Tensor
    labels: Tensor
    patches: Tensor | None = None
    patch_labels: Tensor | None = None


@torch.no_grad()
def extract(
    encode: Encode,
    batches: Iterable[Labelled],
    *,
    device: torch.device | str = "cpu",
    patches_per_image: int = 8,
) -> Features:
    """Encodes every batch, a module in evaluation mode.

    batches: a `Loader`, or any `DataLoader` of (images, labels).
    patches_per_image: labelled patches kept an image, drawn by the image's id; 0 for none.

    Raises TypeError if a batch is neither, ValueError if there are no batches, if the tokens do not
    fit the patch labels, or if they are not finite.
    """
    pooled, labels, patches, patch_labels = [], [], [], []
    with _evaluating(encode):
        for batch in map(_as_batch, batches):
            tokens = encode(batch.images.to(device)).float()
            if tokens.ndim != 3:
                raise ValueError(f"encode must give tokens [B, N, D], got {list(tokens.shape)}")
            pooled.append(tokens.mean(1))
            labels.append(batch.labels)
            if batch.patch_labels is not None and patches_per_image > 0:
                image, patch = _chosen(batch, tokens.shape[1], patches_per_image)
                patches.append(tokens[image.to(device), patch.to(device)])
                patch_labels.append(batch.patch_labels[image, patch])
    if not pooled:
        raise ValueError("batches must hold at least one batch, got none")
    of_images = torch.cat(pooled)
    check_finite("tokens", of_images)
    return Features(
        pooled=of_images,
        labels=torch.cat(labels).to(device),
        patches=torch.cat(patches) if patches else None,
        patch_labels=torch.cat(patch_labels).to(device) if patches else None,
    )


def _as_batch(given: Labelled) -> Batch:
    if isinstance(given, Batch):
        return given
    if not isinstance(given, Sequence) or not all(isinstance(each, Tensor) for each in given[:2]):
        raise TypeError(
            "batches: expected jepa_fast.data.Batch or (images, labels), got "
            f"{type(given).__name__}"
        )
    if len(given) != 2 or given[1].shape != given[0].shape[:1]:
        raise ValueError(
            "batches: expected pairs of images [B, 3, H, W] and labels [B], got shapes "
            f"{[list(each.shape) for each in given if isinstance(each, Tensor)]}"
        )
    images, labels = given
    check_integers("batches: labels", labels)
    return Batch(images, labels, torch.arange(len(labels)), [[]] * len(labels))


def check_labelled(name: str, features: Tensor, labels: Tensor) -> None:
    """Raises TypeError or ValueError naming the set unless it is [n, D] with integers [n]."""
    if not isinstance(features, Tensor) or not isinstance(labels, Tensor):
        raise TypeError(
            f"{name}: expected tensors of features and labels, got {type(features).__name__} and "
            f"{type(labels).__name__}; use torch.as_tensor"
        )
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"{name}: expected features [n, D] and labels [n], got {list(features.shape)} and "
            f"{list(labels.shape)}"
        )
    check_integers(f"{name}: labels", labels)


def check_finite(name: str, features: Tensor) -> None:
    """Raises ValueError: NaN has neighbours, and a class, as numbers do."""
    bad = int((~features.isfinite()).any(1).sum())
    if bad:
        raise ValueError(
            f"{name} must be finite, those of {bad} of {len(features)} are not; look at the "
            "encoder's precision (float16 ends at 65504) and its input"
        )


def _chosen(batch: Batch, tokens: int, per_image: int) -> tuple[Tensor, Tensor]:
    """(image, patch) of at most `per_image` labelled patches of every image."""
    labels = batch.patch_labels
    if labels is None or labels.shape[1] != tokens:
        raise ValueError(
            f"patch_labels must have one label for each of {tokens} tokens, got "
            f"{None if labels is None else list(labels.shape)}; the data's patch size must be the "
            "encoder's"
        )
    draws = counter.uniform(batch.ids[:, None].cpu(), np.arange(tokens))
    draws = np.where(labels.cpu().numpy() == UNKNOWN, 2.0, draws)
    order = np.argsort(draws, axis=1, kind="stable")[:, :per_image]
    image, rank = np.nonzero(np.take_along_axis(draws, order, axis=1) < 1)
    return torch.from_numpy(image), torch.from_numpy(order[image, rank])


@contextmanager
def _evaluating(encode: Encode) -> Iterator[None]:
    """A module (or the module whose method `encode` is) in evaluation mode for a while."""
    owner = encode if isinstance(encode, nn.Module) else getattr(encode, "__self__", None)
    if not isinstance(owner, nn.Module):
        yield
        return
    modes = {module: module.training for module in owner.modules()}
    owner.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
