"""Multi-block masks as a pure function of (seed, step, sample id)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jepa_fast._arguments import flag, height_and_width, holds_integers, integer, interval
from jepa_fast.masks.block_masks import BlockMasks
from jepa_fast.ops import _random, draw_block_masks
from jepa_fast.ops.draw_block_masks.reference import most_context

if TYPE_CHECKING:
    import numpy as np

_SIZES = 4096  # equally likely values of the number that drives a block's size
_SHIFT = 52  # leaves the bits of a draw that choose among them
_ROUNDING = 1e-12  # so that a share such as 1/49 is of one patch: 49 * (1 / 49) is below 1
_OPTIONS = ("grid", "num_targets", "min_context", "max_context", "allow_overlap", "seed")

Size = tuple[int, int]  # patches: height, width


class BlockMaskSampler:
    """Draws I-JEPA's multi-block masks (arXiv 2301.08243, section 3) without cutting any.

    An image gets ``num_targets`` target blocks and one context block, from which the target
    patches are removed. Block sizes are a function of (seed, step), one target and one context
    size a batch; positions are a function of (seed, step, sample id), uniform over every place in
    the grid, borders included. So the masks of an image do not depend on workers, on the split
    into batches, on the number of processes or on the device, and a resumed run draws the same
    ones. Contexts of different lengths are padded (``context_mask``).

    Where ``sample_ids`` are on the CPU, contexts are padded to the longest of the batch (a view of
    longer rows). On a GPU nobody waits to learn how long that is: there they are padded to the most
    that the step's block sizes can leave, and the masks differ in that alone. Draw on the CPU
    (:meth:`BlockMasks.to` moves masks), or set ``max_context``, where the encoder's time on padding
    matters more.

    As in the public code one uniform number drives scale and aspect ratio of a size. A layout that
    leaves fewer than ``min_context`` context patches is drawn again, as a whole; after every 20
    such failures one more target block takes the place of another, and at last all of them lie in
    the corner opposite to the context. The constructor refuses what even that cannot satisfy, so
    every call returns and no context ever holds a target patch unless ``allow_overlap``.

    Args:
        grid: ``(H, W)`` patches of an image, or one number for both.
        num_targets: target blocks ``M`` an image.
        target_scale: smallest and largest share of the patches in a target block.
        target_aspect: smallest and largest height / width of a target block.
        context_scale: the share of the context block, before targets are removed.
        context_aspect: height / width of the context block.
        min_context: fewest context patches an image may be left with.
        max_context: most context patches an image keeps: those nearest to one of its four sides,
            drawn for every image; None keeps all. With ``max_context = min_context`` all contexts
            have that length and need no padding: the cost of the public code's truncated contexts,
            and as compact, without their bias towards the top of the image. (Patches kept at random
            lie beside every target, and make the task too easy: features collapse.)
        allow_overlap: leave the target patches in the context.
        seed: any integer in ``[0, 2**63)``.

    Raises:
        TypeError: an argument of another type; NumPy's integers are ints here.
        ValueError: an argument out of range, or a combination for which some size that could be
            drawn has no layout. The text names the argument to change.
        AttributeError: an option that is set later.

    Example:
        >>> sampler = BlockMaskSampler((14, 14))
        >>> masks = sampler(step=0, sample_ids=torch.tensor([17, 4]))
        >>> masks.targets.shape[:2]
        torch.Size([2, 4])
    """

    def __init__(
        self,
        grid: int | tuple[int, int],
        num_targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        context_aspect: tuple[float, float] = (1.0, 1.0),
        min_context: int = 10,
        max_context: int | None = None,
        allow_overlap: bool = False,
        seed: int = 0,
    ) -> None:
        self.grid = height_and_width("grid", grid, least=1)
        self.num_targets = integer("num_targets", num_targets, least=1)
        self.min_context = integer("min_context", min_context, least=1)
        self.max_context = None if max_context is None else integer("max_context", max_context)
        if self.max_context is not None and self.max_context < self.min_context:
            raise ValueError(
                f"max_context: expected at least min_context, {min_context}, got {max_context}"
            )
        self.allow_overlap = flag("allow_overlap", allow_overlap)
        self.seed = integer("seed", seed)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 <= seed < 2**63, got {seed}")
        self._seed_key = _random.fold(0, self.seed)
        self._equally_long = allow_overlap or max_context == min_context
        self._target_sizes = _block_sizes(self.grid, "target", target_scale, target_aspect)
        self._context_sizes = _block_sizes(self.grid, "context", context_scale, context_aspect)
        self._check_feasible()
        self._made = True

    def __setattr__(self, name: str, value: object) -> None:
        if name in _OPTIONS and "_made" in self.__dict__:
            raise AttributeError(
                f"{name}: expected to stay as it was when the sampler was made, since block sizes "
                "follow from it; make another BlockMaskSampler"
            )
        super().__setattr__(name, value)

    def __call__(
        self, step: int, sample_ids: Tensor | np.ndarray | Sequence[int] | int
    ) -> BlockMasks:
        """Draws the masks of one batch.

        Args:
            step: index of the training step, at least 0.
            sample_ids: ``[B]`` integers, a number that stays with each image (its index in the data
                set): a tensor, a NumPy array or a sequence, of whatever integer dtype (the masks
                are those of the ids in int64); or a batch size, short for the ids 0 to B - 1.

        Returns:
            Masks on the device of ``sample_ids``, which is the CPU unless they are a tensor, by
            :func:`jepa_fast.ops.draw_block_masks`.
            ``context_mask`` is ``None`` where all contexts have one length whatever is drawn: with
            ``allow_overlap``, or with ``max_context`` equal to ``min_context``.

        Raises:
            TypeError: ``sample_ids`` or ``step`` are no integers.
            ValueError: ``step`` or a batch size is negative, or ``sample_ids`` has another shape
                than ``[B]``.
        """
        ids = _as_ids(sample_ids)
        if ids.dim() != 1:
            raise ValueError(f"sample_ids: expected shape [B], got {list(ids.shape)}")
        step = integer("step", step, least=0)

        step_key = _random.fold(self._seed_key, step)
        context, real, lengths, targets = draw_block_masks(
            ids,
            self.seed,
            step,
            self.grid,
            self.num_targets,
            self._target_sizes[_random.draw(step_key, 0) >> _SHIFT],
            self._context_sizes[_random.draw(step_key, 1) >> _SHIFT],
            self.min_context,
            self.max_context,
            self.allow_overlap,
        )
        if self._equally_long:
            return BlockMasks(context, targets, None, self.grid)
        if ids.device.type == "cpu":
            longest = int(lengths.max()) if len(lengths) else 0
            context, real = context.narrow(1, 0, longest), real.narrow(1, 0, longest)
        return BlockMasks(context, targets, real, self.grid)

    @functools.cached_property
    def largest_target(self) -> int:
        """Most patches of a target block in any step."""
        return max(height * width for height, width in self._target_sizes)

    @functools.cached_property
    def longest_context(self) -> int:
        """Most context patches that an image can have in any step."""
        longest = max(
            most_context(self.grid, target, context, self.allow_overlap)
            for target in set(self._target_sizes)
            for context in set(self._context_sizes)
        )
        return longest if self.max_context is None else min(longest, self.max_context)

    def _check_feasible(self) -> None:
        """Every size that can be drawn has a layout: all targets opposite to the context."""
        context, target, grid = (
            torch.tensor(sizes, device="cpu")
            for sizes in (self._context_sizes, self._target_sizes, self.grid)
        )
        context = context.unique(dim=0)[:, None]
        target = target.unique(dim=0) * (not self.allow_overlap)
        overlap = (context + target - grid).clamp(min=0).prod(dim=2)
        left = context.prod(dim=2) - overlap
        worst = int(left.min())
        if worst >= self.min_context:
            return
        row, column = (left == worst).nonzero()[0].tolist()
        (h, w), (target_h, target_w) = context[row, 0].tolist(), target[column].tolist()
        beside = "" if self.allow_overlap else f" beside a target block of {target_h}x{target_w}"
        blocks = f"a context block of {h}x{w} on the {self.grid[0]}x{self.grid[1]} grid{beside}"
        if not worst:
            raise ValueError(f"target_scale: nothing is left of {blocks}; lower target_scale")
        fixes = "" if self.allow_overlap else ", lower target_scale, or set allow_overlap=True"
        raise ValueError(
            f"min_context: expected at most {worst}, the patches of {blocks}, got "
            f"{self.min_context}; lower min_context, raise context_scale{fixes}"
        )


def _as_ids(value: object) -> Tensor:
    """``value`` as int64; a count stands for the numbers below it.

    Raises:
        TypeError: it holds other things than integers; says which.
    """
    if isinstance(value, Integral):
        return torch.arange(integer("sample_ids", value, least=0), device="cpu")
    ids = value
    if not isinstance(ids, Tensor):
        empty = isinstance(value, Sequence) and not value  # which torch takes for floating
        if type(value).__module__ == "numpy":  # torch takes none reversed, or of other byte order
            array: Any = value
            ids = array.astype(array.dtype.newbyteorder("="))
        try:
            ids = torch.tensor(ids, dtype=torch.int64 if empty else None, device="cpu")
        except (OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"sample_ids: expected an int or integers [B], got {type(value).__name__} ({error})"
            ) from None
    if not holds_integers(ids):
        of = "" if isinstance(value, Tensor) else f" in a {type(value).__name__}"
        raise TypeError(
            f"sample_ids: expected an int or integers [B], got {ids.dtype}{of}; use the images' "
            "indices in the data set"
        )
    return ids.long()


def _block_sizes(
    grid: Size, name: str, scale: tuple[float, float], aspect: tuple[float, float]
) -> list[Size]:
    """The block sizes that can be drawn, all equally likely."""
    patches = grid[0] * grid[1]
    scale = interval(f"{name}_scale", scale, most=1)
    aspect = interval(f"{name}_aspect", aspect)
    whole = patches * (1 + _ROUNDING)
    if whole * scale[0] < 1:
        raise ValueError(
            f"{name}_scale: expected at least one patch, got {scale[0]} of the {patches} patches "
            f"of a {grid[0]}x{grid[1]} grid; raise {name}_scale to 1/{patches} or more"
        )
    uniform = (torch.arange(_SIZES, dtype=torch.float64, device="cpu") + 0.5) / _SIZES
    area = (whole * (scale[0] + uniform * (scale[1] - scale[0]))).floor()
    ratio = aspect[0] + uniform * (aspect[1] - aspect[0])
    heights = (area * ratio).sqrt().round().clamp(1, grid[0]).long().tolist()
    widths = (area / ratio).sqrt().round().clamp(1, grid[1]).long().tolist()
    return list(zip(heights, widths, strict=True))
