"""Masks of image patches: what the encoder sees and what the predictor has to predict."""

from __future__ import annotations

import torch

from jepa_fast.masks.block_masks import BlockMasks
from jepa_fast.masks.collator import MaskCollator
from jepa_fast.masks.packed import PackedMasks, pack_masks, packing_budget
from jepa_fast.masks.sampler import BlockMaskSampler

__all__ = [
    "BlockMaskSampler",
    "BlockMasks",
    "MaskCollator",
    "PackedMasks",
    "pack_masks",
    "packing_budget",
]

# Masks that were saved come back by torch.load, which takes nothing else by default than it knows.
torch.serialization.add_safe_globals([BlockMasks, PackedMasks])
