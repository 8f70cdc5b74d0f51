"""The downstream classifier of TI-JEPA on pairs whose class the text and the image decide."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from jepa_fast import TIJepa
from jepa_fast.data.batch import Batch
from jepa_fast.data.text import HashedWords
from jepa_fast.eval.text_image import (
    TextImageClassifier,
    fit_text_image_classifier,
    score_text_image_classifier,
    weighted_f1,
)
from jepa_fast.nn.vit import VisionTransformer

MOODS = ("awful", "plain", "lovely")


def build(**options) -> TIJepa:
    torch.manual_seed(0)
    small = {"predictor_dim": 12, "predictor_depth": 1, "predictor_heads": 1}
    model = TIJepa(
        VisionTransformer(8, 4, 16, 1, 2),
        text_dim=12,
        text_encoder=HashedWords(12, 4),
        width=16,
        depth=1,
        num_heads=2,
        **small,
        **options,
    )
    if model.objective == "masked_image":
        for parameter in model.target_crosser.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def pairs(count: int, seed: int) -> list[Batch]:
    """The caption says the mood; every seventh pair has no label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    captions = [[f"a {MOODS[label]} day"] for label in labels.tolist()]
    labels[::7] = -1
    images = torch.randn(count, 3, 8, 8, generator=generator)
    half = count // 2
    return [
        Batch(images[rows], labels[rows], torch.arange(count)[rows], captions[rows])
        for rows in (slice(half), slice(half, count))
    ]


def test_the_frozen_classifier_learns_only_its_linear_layer() -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    train, val = pairs(90, 0), pairs(40, 1)
    classifier = fit_text_image_classifier(model, train, epochs=40, lr=0.05, decay=0.95)
    scores = score_text_image_classifier(classifier, val)
    assert scores.accuracy > 0.8
    assert scores.weighted_f1 > 0.8
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for mine, theirs in zip(
        classifier.crosser.parameters(), model.target_crosser.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
        assert mine.grad is None
    again = fit_text_image_classifier(model, train, epochs=40, lr=0.05, decay=0.95)
    assert torch.equal(again.head.weight, classifier.head.weight)


def test_fine_tuning_trains_a_copy_of_the_crosser() -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    classifier = fit_text_image_classifier(model, pairs(60, 0), fine_tune=True, epochs=12, lr=5e-3)
    assert score_text_image_classifier(classifier, pairs(40, 1)).accuracy > 0.8
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for (name, mine), theirs in zip(
        classifier.crosser.named_parameters(), model.target_crosser.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs) == ("norm_after_cross_attn" in name)


def test_logits_are_the_linear_layer_of_the_mean_token() -> None:
    model = build()
    classifier = TextImageClassifier(model, 5)
    images, captions = torch.randn(2, 3, 8, 8), [["a lovely day"], []]
    mean = model.encode(images, captions).mean(1)
    logits = classifier(images, captions)
    torch.testing.assert_close(logits, classifier.head(mean))
    assert logits.shape == (2, 5)
    text = model.text_encoder(captions)
    same = classifier(
        None,
        text.words,
        text.word_mask,
        text.caption_mask,
        image_features=model.encoder(images),
    )
    torch.testing.assert_close(same, logits)
    assert {name.split(".")[0] for name in classifier.state_dict()} == {"crosser", "head"}


def test_weighted_f1_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    for classes in (2, 3, 6):
        labels, predicted = generator.integers(0, classes, (2, 50))
        labels[labels == 1] = 0  # a class that is predicted but never asked for
        expected = metrics.f1_score(labels, predicted, average="weighted", zero_division=0)
        ours = weighted_f1(torch.from_numpy(predicted), torch.from_numpy(labels))
        assert float(ours) == pytest.approx(expected, abs=1e-12)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="objective='masked_image', got 'cross_modal'"):
        TextImageClassifier(build(objective="cross_modal"))
    unlabelled = [Batch(torch.randn(1, 3, 8, 8), torch.tensor([-1]), torch.tensor([0]), [["a"]])]
    with pytest.raises(ValueError, match="at least one labelled pair, got none"):
        fit_text_image_classifier(build(), unlabelled)
    with pytest.raises(ValueError, match="at least one labelled pair, got none in epoch 0"):
        fit_text_image_classifier(build(), unlabelled, fine_tune=True)
    with pytest.raises(ValueError, match="got none in epoch 1; with fine_tune they are iterated"):
        fit_text_image_classifier(build(), iter(pairs(4, 0)), fine_tune=True)
    for fine_tune in (False, True):
        with pytest.raises(ValueError, match="expected labels below the 2 of num_classes, got 2"):
            fit_text_image_classifier(build(), pairs(20, 0), num_classes=2, fine_tune=fine_tune)
    with pytest.raises(ValueError, match="expected labels below the 2 of num_classes, got 2"):
        score_text_image_classifier(TextImageClassifier(build(), 2), pairs(20, 0))
    with pytest.raises(TypeError, match="model: expected a TIJepa, got Linear"):
        fit_text_image_classifier(nn.Linear(2, 2), unlabelled)
    for option, given in (("epochs", 0), ("batch_size", 0), ("num_classes", 0)):
        with pytest.raises(ValueError, match=f"{option}: expected at least 1, got 0"):
            fit_text_image_classifier(build(), unlabelled, **{option: given})
