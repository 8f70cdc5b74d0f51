"""What a data source hands out: one `Sample`, many of them as a `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

UNKNOWN = -1  # the label of an image or a patch that has none


class _Required(TypedDict):
    image: Tensor  # [3, H, W], uint8 as sources read it, float32 once transformed
    label: int  # UNKNOWN where there is none
    captions: list[str]
    id: int  # stable from run to run; every random draw about the sample is keyed by it


class Sample(_Required, total=False):
    """One image with what is known about it."""

    patch_labels: Tensor  # [N] int64, UNKNOWN for a patch without a label


@dataclass(frozen=True)
class Batch:
    """`B` samples.

    images: [B, 3, H, W], uint8 as a source reads them, float32 once transformed.
    labels: [B] int64, -1 where unknown.
    ids: [B] int64, stable from run to run.
    captions: for each image its captions, possibly none.
    patch_labels: [B, N] int64, -1 for a patch without a label, or None.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    captions: list[list[str]]
    patch_labels: Tensor | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on `device`."""
        patches = self.patch_labels
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            ids=self.ids.to(device, non_blocking=non_blocking),
            patch_labels=None if patches is None else patches.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The batch with its tensors in page-locked memory, so that copies to a GPU overlap."""
        patches = self.patch_labels
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            ids=self.ids.pin_memory(),
            patch_labels=None if patches is None else patches.pin_memory(),
        )


def collate(samples: Sequence[Sample], images: Tensor | None = None) -> Batch:
    """Stacks samples. Patch labels survive if every sample has them.

    images: [B, 3, H, W] to use in place of the samples' own, which must have one size.

    Raises ValueError if `images` is None and the samples' images differ in size.
    """
    if images is None:
        sizes = {tuple(sample["image"].shape) for sample in samples}
        if len(sizes) != 1:
            raise ValueError(
                f"images must have one size to be stacked, got {len(sizes)} sizes such as "
                f"{sorted(sizes)[:3]}; give the loader a transform, or load_in_memory a size "
                "(data.memory_size)"
            )
        images = torch.stack([sample["image"] for sample in samples])
    patches = [sample["patch_labels"] for sample in samples if "patch_labels" in sample]
    return Batch(
        images=images,
        labels=torch.tensor([sample["label"] for sample in samples]),
        ids=torch.tensor([sample["id"] for sample in samples]),
        captions=[sample["captions"] for sample in samples],
        patch_labels=torch.stack(patches) if len(patches) == len(samples) else None,
    )
