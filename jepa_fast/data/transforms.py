"""From uint8 images of any size to normalised float32 images of one size.

Every draw is a function of (seed, epoch, sample id), so an image gets the same crop in a resumed
run and in any worker.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from jepa_fast._arguments import check_number, height_and_width, interval
from jepa_fast.data import counter

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_ATTEMPTS = 10
_AREA, _RATIO, _TOP, _LEFT, _FLIP = range(5)


class Transform:
    """Crop, resize, flip, normalise.

    size: pixels a side of the result, or (height, width).
    crop_scale: range of the random crop's share of the image's area, as in RandomResizedCrop;
        None for the centre.
    crop_ratio: range of the random crop's width / height.
    centre: size of the centre crop as a share of the largest crop of the result's aspect ratio.
    flip: probability of a horizontal flip.
    mean, std: of each channel, for values in [0, 1].
    interpolation: "bilinear" or "bicubic", both antialiased.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        crop_scale: tuple[float, float] | None = None,
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        centre: float = 1.0,
        flip: float = 0.0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        seed: int = 0,
    ) -> None:
        self.height, self.width = height_and_width("size", size, 1)
        crop_scale = None if crop_scale is None else interval("crop_scale", crop_scale, 1)
        crop_ratio = interval("crop_ratio", crop_ratio)
        check_number("centre", centre)
        check_number("flip", flip, zero=True)
        if centre > 1 or flip > 1:
            raise ValueError(f"centre and flip must be shares, got {centre} and {flip}")
        if not _are_three(mean) or not _are_three(std) or min(std) <= 0:
            raise ValueError(f"mean and std must be 3 values, std positive, got {mean} and {std}")
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(
                f'interpolation must be "bilinear" or "bicubic", got {interpolation!r}'
            )
        self.seed, self.interpolation = seed, interpolation
        self.crop_scale, self.crop_ratio = crop_scale, crop_ratio
        self.centre, self.flip = centre, flip
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    def __call__(self, images: Tensor | Sequence[Tensor], ids: Tensor, epoch: int = 0) -> Tensor:
        """Transforms `B` images.

        images: uint8, [B, 3, H, W] or `B` of [3, H, W] of any sizes.
        ids: [B] int64.

        Returns [B, 3, height, width] float32.

        Raises TypeError if an image is no uint8 tensor, ValueError if not every one has an id.
        """
        return self.normalise(self.crop(images, ids, epoch))

    def crop(self, images: Tensor | Sequence[Tensor], ids: Tensor, epoch: int = 0) -> Tensor:
        """Everything but the normalisation, [B, 3, height, width] uint8."""
        for image in [images] if isinstance(images, Tensor) else images:
            if not isinstance(image, Tensor) or image.dtype != torch.uint8:
                got = image.dtype if isinstance(image, Tensor) else type(image).__name__
                raise TypeError(
                    f"images: expected uint8 tensors from 0 to 255, got {got}; of images in [0, 1]"
                    ", (255 * images).round().to(torch.uint8)"
                )
        if len(ids) != len(images):
            raise ValueError(f"ids: expected one for each of {len(images)} images, got {len(ids)}")
        keys = torch.as_tensor(ids).cpu().numpy()
        whole = self.crop_scale is None and self.centre == 1
        if isinstance(images, Tensor) and whole and images.shape[2:] == (self.height, self.width):
            result = images
        else:
            result = torch.empty(len(images), 3, self.height, self.width, dtype=torch.uint8)
            shapes = np.array([image.shape[1:] for image in images]).reshape(-1, 2)
            boxes = self._boxes(shapes, keys, epoch)
            for i, (image, box) in enumerate(zip(images, boxes, strict=True)):
                result[i] = self._resize(image, box)
        if self.flip > 0:
            flipped = counter.uniform(self.seed, epoch, keys, _FLIP) < self.flip
            result = torch.where(
                torch.from_numpy(flipped)[:, None, None, None], result.flip(3), result
            )
        return result

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to float32, each channel less its mean, over its deviation."""
        return images.float().sub_(self.mean * 255).div_(self.std * 255)

    def denormalise(self, images: Tensor) -> Tensor:
        """Back to values in [0, 1], float32, for pictures."""
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return (images.float() * std + mean).clamp(0, 1)

    def keeps_layout(self, images: Tensor) -> bool:
        """Whether labels of the patches of `images` [B, 3, H, W] hold after the transform too."""
        height, width = images.shape[2:]
        moves = self.crop_scale is not None or self.flip > 0 or self.centre < 1
        return not moves and height * self.width == width * self.height

    def _resize(self, image: Tensor, box: list[int]) -> Tensor:
        top, left, height, width = box
        part = image[:, top : top + height, left : left + width]
        size = (self.height, self.width)
        if part.shape[1:] == size:
            return part
        return F.interpolate(part[None], size, mode=self.interpolation, antialias=True)[0]

    def _boxes(
        self, shapes: NDArray[np.int64], keys: NDArray[np.int64], epoch: int
    ) -> list[list[int]]:
        """(top, left, height, width) to cut out of each image of `shapes` [B, 2]."""
        height, width = shapes[:, 0], shapes[:, 1]
        if self.crop_scale is None:
            zoom = self.centre * np.minimum(height / self.height, width / self.width)
            h = np.maximum((zoom * self.height).round(), 1).astype(np.int64)
            w = np.maximum((zoom * self.width).round(), 1).astype(np.int64)
            return np.stack([(height - h) // 2, (width - w) // 2, h, w], 1).tolist()

        # Several candidates an image, of which the first that fits inside is taken.
        at = (self.seed, epoch, keys[:, None], np.arange(_ATTEMPTS))
        low, high = self.crop_scale
        area = (low + (high - low) * counter.uniform(*at, _AREA)) * (height * width)[:, None]
        low, high = (math.log(ratio) for ratio in self.crop_ratio)
        ratio = np.exp(low + (high - low) * counter.uniform(*at, _RATIO))
        w = np.sqrt(area * ratio).round().astype(np.int64)
        h = np.sqrt(area / ratio).round().astype(np.int64)
        fits = (w >= 1) & (h >= 1) & (w <= width[:, None]) & (h <= height[:, None])
        first = fits.argmax(1)[:, None]
        w = np.take_along_axis(w, first, 1)[:, 0]
        h = np.take_along_axis(h, first, 1)[:, 0]

        # Where none fits (a very long image): the largest centred crop of an allowed ratio.
        none = ~fits.any(1)
        w = np.where(none, np.minimum(width, (height * self.crop_ratio[1]).round()), w).astype(int)
        h = np.where(none, np.minimum(height, (width / self.crop_ratio[0]).round()), h).astype(int)
        u_top = np.where(none, 0.5, counter.uniform(self.seed, epoch, keys, _TOP))
        u_left = np.where(none, 0.5, counter.uniform(self.seed, epoch, keys, _LEFT))
        top = (u_top * (height - h + 1)).astype(np.int64)
        left = (u_left * (width - w + 1)).astype(np.int64)
        return np.stack([top, left, h, w], 1).tolist()


def _are_three(values: Any) -> bool:
    try:
        return len(values) == 3 and all(isinstance(value, Real) for value in values)
    except TypeError:
        return False
