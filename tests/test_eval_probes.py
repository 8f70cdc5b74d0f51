"""Probes on features whose right answer is known, and the comparison with untrained encoders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jepa_fast.data import Batch, DigitScenes, Loader, Transform
from jepa_fast.eval import (
    ProbeComparison,
    compare_with_untrained,
    extract,
    fit_linear_probe,
    knn_accuracy,
    patch_accuracy,
    probe_all,
)
from jepa_fast.eval.text_image import weighted_f1


def blobs(n: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Points around three directions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return 3 * torch.eye(8)[labels] + noise * torch.randn(n, 8, generator=generator), labels


def test_knn_against_a_plain_loop() -> None:
    x, y = blobs(40, 1.5, 0)
    val, val_y = blobs(25, 1.5, 1)
    for k, temperature in ((1, None), (5, None), (7, 0.07), (100, 0.5)):
        right = 0
        for point, label in zip(val.double(), val_y.tolist(), strict=True):
            cosine = torch.cosine_similarity(point[None], x.double())
            near = cosine.argsort(descending=True)[:k]
            votes = [0.0] * 3
            for i in near.tolist():
                weight = 1.0 if temperature is None else float((cosine[i] / temperature).exp())
                votes[int(y[i])] += weight
            right += votes.index(max(votes)) == label
        got = knn_accuracy(x, y, val, val_y, k=k, temperature=temperature)
        assert got == pytest.approx(right / 25)
    assert knn_accuracy(1000 * x, y, val, val_y) == knn_accuracy(x, y, val, val_y)


def test_linear_probe_against_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(60, 2.0, 0)
    probe = fit_linear_probe(x, y, penalties=[0.01])
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    expected = linear_model.LogisticRegression(C=1 / (0.01 * 60), tol=1e-8, max_iter=1000)
    expected.fit(standard, y.numpy())
    np.testing.assert_allclose(probe.weight.numpy(), expected.coef_, atol=5e-3)
    assert probe.accuracy(x, y) == pytest.approx(expected.score(standard, y.numpy()))


def test_linear_probe_chooses_its_penalty_and_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 30, generator=generator), torch.arange(80) % 2
    assert fit_linear_probe(x, y).penalty == 0.1  # nothing to learn: hold back
    x[:, 0] = y * 2.0 - 1
    x[:, 1] = 7.0  # a constant dimension
    probe = fit_linear_probe(x, y)
    assert probe.penalty < 0.1
    assert probe.accuracy(x, y) == 1.0
    assert torch.equal(probe.weight, fit_linear_probe(x, y).weight)
    assert not probe.weight[:, 1].any()


def test_labels_may_be_any_numbers() -> None:
    (x, y), (val, val_y) = blobs(40, 1.5, 0), blobs(25, 1.5, 1)
    far = torch.tensor([5, 1000, 2**31 - 1])
    assert knn_accuracy(x, far[y], val, far[val_y]) == knn_accuracy(x, y, val, val_y)
    near, probe = fit_linear_probe(x, y), fit_linear_probe(x, far[y])
    assert torch.equal(probe.weight, near.weight)
    assert torch.equal(probe.predict(val), far[near.predict(val)])
    assert torch.equal(
        weighted_f1(far[val_y], far[val_y.flip(0)]), weighted_f1(val_y, val_y.flip(0))
    )


class Patchwise(nn.Module):
    """A token is its patch's pixels, through a fixed random layer."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.layer = nn.Linear(48, width)
        self.noise = nn.Dropout(0.9)

    def forward(self, images: Tensor) -> Tensor:
        tokens = nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
        return self.noise(self.layer(tokens).relu())


def loaders() -> tuple[Loader, Loader]:
    transform = Transform(16)
    train = DigitScenes(60, grid=(2, 2), empty=0.2)
    val = DigitScenes(30, grid=(2, 2), empty=0.2, split="val")
    return (
        Loader(train, 16, train=False, transform=transform),
        Loader(val, 16, train=False, transform=transform),
    )


def test_extract_keeps_labelled_patches_and_evaluates() -> None:
    train, _ = loaders()
    encoder = Patchwise().train()
    encoder.layer.eval()
    features = extract(encoder, train, patches_per_image=5)
    assert encoder.training
    assert encoder.noise.training
    assert not encoder.layer.training
    assert features.pooled.shape == (60, 24)
    assert features.patches is not None
    assert features.patch_labels is not None
    assert features.patch_labels.min() >= 0
    assert 5 * 55 < len(features.patches) == len(features.patch_labels) <= 5 * 60
    # The features depend on the image, not on how images fall into batches.
    again = extract(
        encoder.forward, Loader(train.source, 7, train=False, transform=train.transform)
    )
    torch.testing.assert_close(again.pooled, extract(encoder.eval(), train).pooled)

    every = extract(encoder, train, patches_per_image=99)
    labels = torch.cat([batch.patch_labels for batch in train if batch.patch_labels is not None])
    assert every.patch_labels is not None
    assert len(every.patch_labels) == int((labels >= 0).sum())
    assert torch.equal(every.patch_labels.bincount(), labels[labels >= 0].bincount())
    assert extract(encoder, train, patches_per_image=0).patches is None


def test_a_patch_probe_reads_what_a_token_knows() -> None:
    labels = torch.randint(0, 4, (12, 9), generator=torch.Generator().manual_seed(0))
    labels[0] = -1
    batch = Batch(
        images=nn.functional.one_hot(labels.clamp(min=0), 4).float()[:, None],
        labels=torch.full((12,), -1),
        ids=torch.arange(12),
        captions=[[]] * 12,
        patch_labels=labels,
    )
    telling = extract(lambda images: images[:, 0], [batch])
    assert patch_accuracy(telling, telling) == 1.0
    result = probe_all(lambda images: images[:, 0], [batch], [batch])
    assert result == {"patch": 1.0}  # no image has a label
    with pytest.raises(ValueError, match="one label for each of 4 tokens"):
        extract(lambda images: images[:, 0, :4], [batch])
    with pytest.raises(ValueError, match=r"must give tokens \[B, N, D\]"):
        extract(lambda images: images, [batch])


def test_comparison_with_untrained_encoders() -> None:
    train, val = loaders()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    trained = Patchwise()
    torch.random.set_rng_state(state)
    rows = compare_with_untrained(trained, Patchwise, train, val, seeds=(1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [row.name for row in rows] == ["knn", "linear", "patch"]
    again = compare_with_untrained(trained, Patchwise, train, val, seeds=(1, 2))
    assert rows == again
    torch.manual_seed(2)
    assert rows[1].untrained[1] == probe_all(Patchwise(), train, val)["linear"]
    with pytest.raises(ValueError, match="seeds must be at least one"):
        compare_with_untrained(trained, Patchwise, train, val, seeds=())


def test_what_a_comparison_says() -> None:
    row = ProbeComparison("knn", 0.5, (0.3, 0.4))
    assert row.mean == pytest.approx(0.35)
    assert row.std == pytest.approx(0.0707, abs=1e-4)
    assert (row.low, row.high, row.beyond_spread) == (0.3, 0.4, True)
    assert str(row) == (
        "knn: trained 50.0%, untrained 35.0% (std 7.1%, 30.0% to 40.0%, 2 seeds), gain +15.0 points"
    )
    assert ProbeComparison("knn", 0.5, (0.6,)).std == 0
    assert not ProbeComparison("knn", 0.5, (0.5,)).beyond_spread


def test_any_data_set_of_images_and_labels_can_be_probed() -> None:
    train, val = loaders()
    encoder = Patchwise()
    plain = [[(batch.images, batch.labels) for batch in each] for each in (train, val)]
    expected = probe_all(encoder, train, val, patches_per_image=0)
    assert probe_all(encoder, *plain) == expected
    images, labels = plain[0][0]
    for given, error, message in (
        (
            {"image": images},
            TypeError,
            r"expected jepa_fast.data.Batch or \(images, labels\), got d",
        ),
        ((images, labels, labels), ValueError, "expected pairs of images"),
        ((images, labels[1:]), ValueError, "expected pairs of images"),
        ((images, labels.float()), TypeError, "labels: expected integers, got torch.float32"),
    ):
        with pytest.raises(error, match=f"^batches: {message}"):
            extract(encoder, [given])


def test_errors_name_the_argument() -> None:
    x, y = blobs(6, 1.0, 0)
    for bad, error, message in (
        ((x, y[:3]), ValueError, r"\[n, D\] and labels \[n\], got \[6, 8\] and \[3\]"),
        ((x[0], y), ValueError, r"\[n, D\] and labels \[n\], got \[8\] and \[6\]"),
        ((x, y.float()), TypeError, "labels: expected integers, got torch.float32; use .long()"),
        ((x.numpy(), y), TypeError, "got ndarray and Tensor; use torch.as_tensor"),
    ):
        for name, probe, arguments in (
            ("train", knn_accuracy, (*bad, x, y)),
            ("val", knn_accuracy, (x, y, *bad)),
            ("features", fit_linear_probe, bad),
        ):
            with pytest.raises(error, match=f"^{name}: .*{message}"):
                probe(*arguments)
    with pytest.raises(ValueError, match="val: expected features of the width of train, 8, got 3"):
        knn_accuracy(x, y, x[:, :3], y)
    with pytest.raises(TypeError, match="k: expected an int, got float"):
        knn_accuracy(x, y, x, y, k=2.5)
    with pytest.raises(ValueError, match="k must be positive"):
        knn_accuracy(x, y, x, y, k=0)
    for bad_number, error in ((float("nan"), ValueError), (0.0, ValueError), ("a", TypeError)):
        with pytest.raises(error, match=r"^temperature: expected a positive number"):
            knn_accuracy(x, y, x, y, temperature=bad_number)
        with pytest.raises(error, match=r"^penalties\[1\]: expected a positive number"):
            fit_linear_probe(x, y, penalties=[0.1, bad_number])
    with pytest.raises(ValueError, match="train and val must hold labelled features"):
        knn_accuracy(x[:0], y[:0], x, y)
    with pytest.raises(ValueError, match="features must be at least 2"):
        fit_linear_probe(x[:1], y[:1])
    odd = x.clone()
    odd[2, 1] = float("nan")
    for arguments in ((odd, y, x, y), (x, y, odd, y)):
        with pytest.raises(ValueError, match="must be finite, those of 1 of 6 are not"):
            knn_accuracy(*arguments)
    with pytest.raises(ValueError, match="features must be finite"):
        fit_linear_probe(odd, y)
    with pytest.raises(ValueError, match="penalties must be positive"):
        fit_linear_probe(x, y, penalties=[])
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        extract(lambda images: images, [])
    batch = next(iter(loaders()[0]))
    with pytest.raises(ValueError, match="tokens must be finite, those of 16 of 16 are not"):
        extract(lambda images: images[:, 0] * torch.inf, [batch], patches_per_image=0)
    empty = extract(lambda images: images[:, 0], [batch], patches_per_image=0)
    with pytest.raises(ValueError, match="train must hold labelled patches"):
        patch_accuracy(empty, empty)
