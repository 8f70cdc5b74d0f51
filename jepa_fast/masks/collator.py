"""The mask collator of the public I-JEPA code, index for index (arXiv 2301.08243)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from jepa_fast._arguments import flag, height_and_width, integer, interval

_logger = logging.getLogger(__name__)
_TRIES_PER_CONSTRAINT = 20


class MaskCollator:
    """Collates a batch and draws I-JEPA's multi-block masks for it.

    Under the same seeds it returns the very indices of the public I-JEPA collator, and leaves the
    random generators in the same state, so a run can change over in the middle. That includes its
    quirks: no block touches the last row or column, and every context of a batch is cut to the
    shortest one, in raster order. :class:`BlockMaskSampler` has neither.

    Block sizes are drawn once a batch, from a generator seeded by a step counter that all workers
    of a ``DataLoader`` share. Positions are drawn an image, from torch's global generator.

    Args:
        input_size: image ``(height, width)`` in pixels, or one number for both.
        patch_size: side of a patch in pixels.
        enc_mask_scale: smallest and largest share of the patches in a context block.
        pred_mask_scale: the same for a target block.
        aspect_ratio: smallest and largest height / width of a target block. Context blocks are
            square.
        nenc: context blocks an image.
        npred: target blocks an image.
        min_keep: a mask must hold *more than* this many patches.
        allow_overlap: leave the target patches in the context.

    Raises:
        TypeError: an argument of another type; NumPy's integers are ints here.
        ValueError: the grid is smaller than 2x2, a range is empty or not positive, a share is above
            1, or a number of blocks negative.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = (224, 224),
        patch_size: int = 16,
        enc_mask_scale: tuple[float, float] = (0.2, 0.8),
        pred_mask_scale: tuple[float, float] = (0.2, 0.8),
        aspect_ratio: tuple[float, float] = (0.3, 3.0),
        nenc: int = 1,
        npred: int = 2,
        min_keep: int = 4,
        allow_overlap: bool = False,
    ) -> None:
        size = height_and_width("input_size", input_size, least=1)
        self.patch_size = integer("patch_size", patch_size, least=1)
        self.height, self.width = (side // self.patch_size for side in size)
        if min(self.height, self.width) < 2:
            raise ValueError(
                f"input_size: expected at least 2x2 patches of {patch_size} pixels, got "
                f"{size[0]}x{size[1]} pixels; lower patch_size or raise input_size"
            )
        self.enc_mask_scale = interval("enc_mask_scale", enc_mask_scale, most=1)
        self.pred_mask_scale = interval("pred_mask_scale", pred_mask_scale, most=1)
        self.aspect_ratio = interval("aspect_ratio", aspect_ratio)
        self.nenc = integer("nenc", nenc, least=0)
        self.npred = integer("npred", npred, least=0)
        self.min_keep = integer("min_keep", min_keep)
        self.allow_overlap = flag("allow_overlap", allow_overlap)
        # In shared memory: one count for all workers. The spawn context's lock works under every
        # start method, that of fork under fork alone.
        self._counter = get_context("spawn").Value("i", -1)

    def step(self) -> int:
        """Advances the shared step counter and returns it. To resume at step n, call it n times."""
        with self._counter.get_lock():
            self._counter.value += 1
            return self._counter.value

    def __call__(self, batch: Sequence[Any]) -> tuple[Any, list[Tensor], list[Tensor]]:
        """Collates ``batch`` with torch's ``default_collate`` and draws its masks.

        Returns:
            ``(collated_batch, contexts, targets)``: ``nenc`` and ``npred`` int64 tensors
            ``[B, K]`` of ascending patch indices.

        Raises:
            ValueError: an empty batch; or a block size drawn for this step that cannot hold more
                than ``min_keep`` patches (the public code never returns from such a step). The
                text says what to change.
        """
        if not batch:
            raise ValueError("batch: expected at least one sample, got none")
        collated = default_collate(list(batch))
        step = self.step()
        generator = torch.Generator().manual_seed(step)
        target_size = self._block_size(generator, self.pred_mask_scale, self.aspect_ratio)
        context_size = self._block_size(generator, self.enc_mask_scale, (1.0, 1.0))
        if self.npred:
            self._check_size("pred_mask_scale", self.pred_mask_scale, target_size, step)
        if self.nenc:
            self._check_size("enc_mask_scale", self.enc_mask_scale, context_size, step)
        corners, contexts = self._place(len(batch), target_size, context_size)
        return (
            collated,
            self._context_indices(contexts, len(batch)),
            self._block_indices(corners, len(batch), target_size),
        )

    def _block_size(
        self, generator: torch.Generator, scale: tuple[float, float], aspect: tuple[float, float]
    ) -> tuple[int, int]:
        uniform = torch.rand(1, generator=generator, device="cpu").item()  # one number drives both
        patches = int(self.height * self.width * (scale[0] + uniform * (scale[1] - scale[0])))
        ratio = aspect[0] + uniform * (aspect[1] - aspect[0])
        height = round(math.sqrt(patches * ratio))
        width = round(math.sqrt(patches / ratio))
        return min(height, self.height - 1), min(width, self.width - 1)

    def _check_size(
        self, name: str, scale: tuple[float, float], size: tuple[int, int], step: int
    ) -> None:
        patches = size[0] * size[1]
        if patches <= self.min_keep:
            raise ValueError(
                f"{name}: expected blocks of more than min_keep={self.min_keep} patches, got "
                f"{size[0]}x{size[1]} = {patches} from {name}={tuple(scale)} on the "
                f"{self.height}x{self.width} grid at step {step}; raise {name}, or lower "
                f"min_keep below {patches}"
            )

    def _place(
        self, batch: int, target_size: tuple[int, int], context_size: tuple[int, int]
    ) -> tuple[list[int], list[int]]:
        """Draws the positions of all blocks of a batch.

        A mask is a Python integer with one bit a patch: moving a block is a shift, removing the
        targets an AND, counting a popcount. That keeps the order of the draws, which depends on
        every rejection before, and still costs little.

        Returns:
            The top left patch of the target blocks, and the context masks, both image by image.
        """
        draws = _raw_draws(batch * (self.npred + self.nenc))
        target = self._block_bits(target_size)
        context = self._block_bits(context_size)
        everywhere = (1 << self.height * self.width) - 1
        corners, contexts = [], []
        for _ in range(batch):
            allowed = []  # the outside of each target block
            for _ in range(self.npred):
                corner = self._corner(next(draws), target_size)
                corners.append(corner)
                allowed.append(everywhere ^ (target << corner))
            if self.allow_overlap:
                allowed = []
            for _ in range(self.nenc):
                contexts.append(self._constrained(context, context_size, allowed, draws))
        return corners, contexts

    def _constrained(
        self, block: int, size: tuple[int, int], allowed: list[int], draws: Iterator[int]
    ) -> int:
        """A context mask outside the target blocks; every 20 failures it may enter one more."""
        kept, failures = len(allowed), 0
        while True:  # ends at the latest without constraints, because _check_size passed
            mask = block << self._corner(next(draws), size)
            for outside in allowed[:kept]:
                mask &= outside
            if mask.bit_count() > self.min_keep:
                return mask
            failures += 1
            if failures % _TRIES_PER_CONSTRAINT == 0:
                kept -= 1
                _logger.warning(
                    "found no context of more than min_keep=%d patches outside %d target blocks; "
                    "it may now overlap one more of them",
                    self.min_keep,
                    kept + 1,
                )

    def _corner(self, draw: int, size: tuple[int, int]) -> int:
        # The bounds leave out the last row and column, as the public code does.
        top = (draw >> 32 & 0xFFFFFFFF) % (self.height - size[0])
        left = (draw & 0xFFFFFFFF) % (self.width - size[1])
        return top * self.width + left

    def _block_bits(self, size: tuple[int, int]) -> int:
        row = (1 << size[1]) - 1
        return sum(row << y * self.width for y in range(size[0]))

    def _block_indices(self, corners: list[int], batch: int, size: tuple[int, int]) -> list[Tensor]:
        rows = torch.arange(size[0], device="cpu")[:, None] * self.width
        block = (rows + torch.arange(size[1], device="cpu")).flatten()
        first = torch.tensor(corners, dtype=torch.int64, device="cpu").view(batch, self.npred, 1)
        return list((first + block).transpose(0, 1).contiguous())

    def _context_indices(self, masks: list[int], batch: int) -> list[Tensor]:
        if not masks:
            return []
        size = -(-self.height * self.width // 8)
        data = bytearray(b"".join(mask.to_bytes(size, "little") for mask in masks))
        octets = torch.frombuffer(data, dtype=torch.uint8).view(len(masks), size, 1)
        bits = (octets >> torch.arange(8, dtype=torch.uint8, device="cpu") & 1).flatten(1)
        counts = bits.sum(dim=1)
        shortest = torch.arange(int(counts.min()), device="cpu")
        index = bits.nonzero()[:, 1][(counts.cumsum(0) - counts)[:, None] + shortest]
        return list(index.view(batch, self.nenc, -1).transpose(0, 1).contiguous())


def _raw_draws(expected: int) -> Iterator[int]:
    """The global generator's next raw draws, a pair of 32 bits each; ``expected`` in one call.

    Such a pair is what two calls of ``torch.randint(0, n, (1,))`` take, the first in the high
    half, before they reduce it modulo n.
    """
    while True:
        draws = torch.empty(expected, dtype=torch.int64, device="cpu").random_(-(2**63), None)
        yield from draws.tolist()
        expected = 1  # rejections need more, one at a time
