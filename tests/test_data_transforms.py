"""Crops, flips and normalisation; the counter-based draws behind them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jepa_fast.data import Transform, counter


def pictures(n: int = 6, height: int = 20, width: int = 28) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)


def test_counter_draws() -> None:
    draws = counter.uniform(1, 2, np.arange(20000))
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03
    assert counter.bits(1, 2) == counter.bits(1, 2)
    assert len({int(counter.bits(a, b)) for a in range(-20, 20) for b in range(20)}) == 800
    normal = counter.normal(3, np.arange(20000))
    assert abs(normal.mean()) < 0.03
    assert abs(normal.std() - 1) < 0.03
    assert np.bincount(counter.integers(4, np.arange(4000))).min() > 900
    assert sorted(counter.permutation(50, 1)) == list(range(50))
    assert counter.text_key("seven") == 3195765316400059559


def test_a_draw_depends_on_seed_epoch_and_id_alone() -> None:
    images, ids = pictures(), torch.arange(100, 106)
    transform = Transform(16, crop_scale=(0.3, 1), flip=0.5)
    whole = transform(images, ids, epoch=3)
    assert whole.shape == (6, 3, 16, 16)
    assert whole.dtype == torch.float32
    assert torch.equal(transform(list(images[2:4]), ids[2:4], epoch=3), whole[2:4])
    assert not torch.equal(transform(images, ids, epoch=4), whole)
    assert not torch.equal(
        Transform(16, crop_scale=(0.3, 1), flip=0.5, seed=1)(images, ids, 3), whole
    )


def test_random_crop_is_that_of_its_box() -> None:
    torchvision = pytest.importorskip("torchvision.transforms.v2.functional")
    images, ids = pictures(4, 40, 60), torch.arange(4)
    transform = Transform(16, crop_scale=(0.3, 1))
    boxes = transform._boxes(np.array([[40, 60]] * 4), ids.numpy(), 0)
    for image, box, crop in zip(images, boxes, transform.crop(images, ids), strict=True):
        expected = torchvision.resized_crop(image, *box, size=[16, 16], antialias=True)
        assert torch.equal(crop, expected)


def test_crops_keep_to_scale_and_ratio() -> None:
    n = 2000
    transform = Transform(16, crop_scale=(0.3, 1.0))
    boxes = np.array(transform._boxes(np.array([[200, 300]] * n), np.arange(n), 0))
    top, left, height, width = boxes.T
    assert top.min() == 0
    assert left.min() == 0
    assert (top + height).max() == 200
    assert (left + width).max() == 300
    area, ratio = height * width / 60000, width / height
    assert 0.29 < area.min() < 0.31
    assert area.max() > 0.8  # a full image has ratio 1.5, outside 3/4..4/3
    assert 0.74 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.35
    # No candidate fits a very long image: the centre, at the nearest allowed ratio.
    assert transform._boxes(np.array([[10, 4000]]), np.array([0]), 0) == [[0, 1994, 10, 13]]


def test_centre_crop_and_plain_resize() -> None:
    images, ids = pictures(2, 20, 28), torch.arange(2)
    assert torch.equal(Transform(20).crop(images, ids), images[:, :, :, 4:24])
    assert torch.equal(Transform((20, 28)).crop(images, ids), images)
    assert torch.equal(Transform(10, centre=0.5).crop(images, ids), images[:, :, 5:15, 9:19])
    assert Transform((10, 14)).crop(images, ids).shape == (2, 3, 10, 14)
    assert Transform(8)(images[:0], ids[:0]).shape == (0, 3, 8, 8)


def test_flip() -> None:
    images, ids = pictures(200, 4, 4), torch.arange(200)
    flipped = Transform(4, flip=0.5).crop(images, ids)
    as_is = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert (as_is | mirrored).all()
    assert 70 < mirrored.sum() < 130
    assert torch.equal(Transform(4, flip=1.0).crop(images, ids), images.flip(3))


def test_normalise_and_back() -> None:
    transform = Transform(20, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    images = pictures(3, 20, 20)
    result = transform(images, torch.arange(3))
    expected = (images[:, 1].double() / 255 - 0.4) / 0.3
    torch.testing.assert_close(result[:, 1].double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(transform.denormalise(result), images / 255, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, r"size: expected \(height, width\), both at least 1, got \(0, 0\)"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale: expected 0 < low <= high <= 1"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio: expected 0 < low <= high"),
        ({"mean": 0.5}, "mean and std must be 3 values"),
        ({"std": ("1", "1", "1")}, "mean and std must be 3 values"),
        ({"flip": 2.0}, "centre and flip must be shares"),
        ({"std": (1.0, 0.0, 1.0)}, "std positive"),
        ({"interpolation": "nearest"}, "interpolation must be"),
    ],
)
def test_errors_name_the_argument(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transform(**{"size": 8, **arguments})


def test_what_is_no_picture_is_refused() -> None:
    for size in (8, 9):  # as it is, and resized
        with pytest.raises(
            TypeError, match=r"images: expected uint8 .*, got torch.float32; of ima"
        ):
            Transform(size)(torch.rand(2, 3, 8, 8), torch.arange(2))
    with pytest.raises(
        TypeError, match="images: expected uint8 tensors from 0 to 255, got ndarray"
    ):
        Transform(8)([np.zeros((3, 8, 8), np.uint8)], torch.arange(1))
    with pytest.raises(ValueError, match="ids: expected one for each of 2 images, got 3"):
        Transform(8)(pictures(2, 8, 8), torch.arange(3))
    for options in ({"crop_scale": 0.3}, {"crop_ratio": None}, {"flip": "x"}, {"centre": None}):
        (name,) = options
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            Transform(8, **options)
