"""Classification of text-image pairs by a TI-JEPA, the paper's downstream task (MVSA)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast._arguments import integer
from jepa_fast.data.batch import Batch
from jepa_fast.models.tijepa import TIJepa, Words


@dataclass(frozen=True)
class Scores:
    """Of `n` classified pairs.

    accuracy: share of right ones.
    weighted_f1: F1 of every class, averaged with the share of the class among the labels.
    """

    accuracy: float
    weighted_f1: float


class TextImageClassifier(nn.Module):
    """Mean over the tokens of a TI-JEPA's target crosser, then a linear layer.

    model: with the masked-image objective; its frozen encoders are used as they are and are not
        part of the state dict, its target crosser is copied.
    num_classes: 3 for MVSA (negative, neutral, positive).
    fine_tune: train the copied crosser too, not the linear layer alone.

    Raises TypeError if the model is no TI-JEPA, ValueError if it has another objective.
    """

    def __init__(self, model: TIJepa, num_classes: int = 3, *, fine_tune: bool = False) -> None:
        super().__init__()
        if not isinstance(model, TIJepa):
            raise TypeError(f"model: expected a TIJepa, got {type(model).__name__}")
        num_classes = integer("num_classes", num_classes, 1)
        if model.objective != "masked_image":
            raise ValueError(
                f"model must have objective='masked_image', got {model.objective!r}, which has no "
                "crosser that reads image and text together"
            )
        self._inputs = model.frozen_inputs
        self.fine_tune = fine_tune
        self.crosser = copy.deepcopy(model.target_crosser)
        if fine_tune:
            trained = model.context_crosser.parameters()
            for mine, theirs in zip(self.crosser.parameters(), trained, strict=True):
                mine.requires_grad_(theirs.requires_grad)
        self.head = nn.Linear(model.embed_dim, num_classes).to(next(self.crosser.parameters()))

    def forward(
        self,
        images: Tensor | None,
        words: Words,
        word_mask: Tensor | None = None,
        caption_mask: Tensor | None = None,
        word_scale: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, num_classes]; arguments as in `TIJepa.forward`."""
        return self.head(
            self.pooled(
                images, words, word_mask, caption_mask, word_scale, image_features=image_features
            )
        )

    def pooled(
        self,
        images: Tensor | None,
        words: Words,
        word_mask: Tensor | None = None,
        caption_mask: Tensor | None = None,
        word_scale: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """What the linear layer reads, [B, width]; arguments as in `TIJepa.forward`."""
        inputs = self._inputs(
            images, words, word_mask, caption_mask, word_scale, image_features=image_features
        )
        with torch.set_grad_enabled(self.fine_tune and torch.is_grad_enabled()):
            return self.crosser(*inputs).mean(1)


def fit_text_image_classifier(
    model: TIJepa,
    train: Iterable[Batch],
    *,
    num_classes: int = 3,
    fine_tune: bool = False,
    epochs: int = 50,
    lr: float = 1e-3,
    decay: float = 0.9,
    batch_size: int = 128,
    seed: int = 0,
) -> TextImageClassifier:
    """Trains a classifier with cross-entropy and Adam, as the paper does (arXiv 2503.06380).

    model: has a text encoder, which takes the captions of the batches.
    train: labelled batches, iterated once, or with `fine_tune` once an epoch (in the batches as
        they come; without it the pooled tokens are kept and shuffled into batches of `batch_size`).
        Pairs without a label do not count.
    num_classes, fine_tune: see `TextImageClassifier`.
    lr, decay: the learning rate is `lr * decay ** epoch`.
    seed: of the linear layer's weights and of the shuffling.

    Raises TypeError or ValueError naming the argument if there is no labelled pair (with
    `fine_tune`, in one of the epochs), a label is not below `num_classes`, or an option is out of
    range.
    """
    epochs, batch_size = integer("epochs", epochs, 1), integer("batch_size", batch_size, 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = TextImageClassifier(model, num_classes, fine_tune=fine_tune)
    parameters = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters if fine_tune else classifier.head.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)

    def step(logits: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    if fine_tune:
        for epoch in range(epochs):
            labelled = 0
            for images, captions, labels in _labelled(classifier, train):
                step(classifier(images, captions), labels)
                labelled += len(labels)
            if not labelled:
                raise ValueError(
                    f"batches must hold at least one labelled pair, got none in epoch {epoch}; "
                    "with fine_tune they are iterated once an epoch, which a generator is not"
                )
            schedule.step()
        return classifier

    pooled, labels = _pooled(classifier, train)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for rows in order.split(batch_size):
            step(classifier.head(pooled[rows]), labels[rows])
        schedule.step()
    return classifier


@torch.no_grad()
def score_text_image_classifier(classifier: TextImageClassifier, val: Iterable[Batch]) -> Scores:
    """Accuracy and weighted F1 on the labelled pairs of `val`.

    Raises ValueError if there are none, or a label is none of the classifier's.
    """
    pooled, labels = _pooled(classifier, val)
    predicted = classifier.head(pooled).argmax(1)
    return Scores(
        accuracy=float((predicted == labels).double().mean()),
        weighted_f1=float(weighted_f1(predicted, labels)),
    )


def weighted_f1(predicted: Tensor, labels: Tensor) -> Tensor:
    """F1 of every class, averaged with the class's share of the labels, as a 0-dim float64 tensor.

    predicted, labels: [n] int64. A class that is never right has F1 0.
    """
    found, numbers = torch.cat([predicted, labels]).unique(return_inverse=True)
    (predicted, labels), classes = numbers.split(len(labels)), len(found)
    asked, told = (torch.bincount(x, minlength=classes).double() for x in (labels, predicted))
    right = torch.bincount(labels[predicted == labels], minlength=classes).double()
    f1 = 2 * right / (asked + told).clamp(min=1)  # 2 TP / (2 TP + FN + FP)
    return (f1 * asked).sum() / asked.sum()


@torch.no_grad()
def _pooled(classifier: TextImageClassifier, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """[n, width] and labels [n] of all labelled pairs."""
    pooled, labels = [], []
    for images, captions, some in _labelled(classifier, batches):
        pooled.append(classifier.pooled(images, captions))
        labels.append(some)
    if not labels:
        raise ValueError("batches must hold at least one labelled pair, got none")
    return torch.cat(pooled), torch.cat(labels)


def _labelled(
    classifier: TextImageClassifier, batches: Iterable[Batch]
) -> Iterable[tuple[Tensor, list[list[str]], Tensor]]:
    """Images, captions and labels of the labelled pairs of every batch, on the head's device."""
    device, classes = classifier.head.weight.device, classifier.head.out_features
    for batch in batches:
        if len(batch) and (largest := int(batch.labels.max())) >= classes:
            raise ValueError(
                f"batches: expected labels below the {classes} of num_classes, got {largest}; "
                "labels count from 0, and -1 is an unknown one"
            )
        keep = (batch.labels >= 0).nonzero()[:, 0]
        if len(keep):
            captions = [batch.captions[i] for i in keep.tolist()]
            yield batch.images[keep].to(device), captions, batch.labels[keep].to(device)
