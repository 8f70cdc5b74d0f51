"""Multi-block masks as a pure function of (seed, step, sample id)."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_fast.masks.block_masks import BlockMasks, pack_members

_SIZES = 4096  # equally likely values of the number that drives a block's size
_TRIES = 20  # layouts drawn before one more target block must share the place of another
_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, splitmix64's increment, as int64

Size = tuple[int, int]  # patches: height, width


class BlockMaskSampler:
    """Draws I-JEPA's multi-block masks (arXiv 2301.08243, section 3) without cutting any.

    An image gets ``num_targets`` target blocks and one context block, from which the target
    patches are removed. Block sizes are a function of (seed, step), one target and one context
    size a batch; positions are a function of (seed, step, sample id), uniform over every place in
    the grid, borders included. So the masks of an image do not depend on workers, on the split
    into batches or on the number of processes, and a resumed run draws the same ones. Contexts of
    different lengths are padded (``context_mask``).

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
        TypeError: ``seed`` is not an int.
        ValueError: an argument out of range, or a combination for which some size that could be
            drawn has no layout. The text names the argument to change.

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
        if isinstance(grid, int):
            grid = (grid, grid)
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"grid: expected (H, W), both at least 1, got {tuple(grid)}")
        for name, count in (("num_targets", num_targets), ("min_context", min_context)):
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        if max_context is not None and max_context < min_context:
            raise ValueError(
                f"max_context: expected at least min_context, {min_context}, got {max_context}"
            )
        if not isinstance(seed, int):
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed: expected 0 <= seed < 2**63, got {seed}")
        self.grid = (int(grid[0]), int(grid[1]))
        self.num_targets = num_targets
        self.min_context = min_context
        self.max_context = max_context
        self.allow_overlap = allow_overlap
        self.seed = seed
        self._target_sizes = _block_sizes(self.grid, "target", target_scale, target_aspect)
        self._context_sizes = _block_sizes(self.grid, "context", context_scale, context_aspect)
        self._check_feasible()

    def __call__(self, step: int, sample_ids: Tensor | int) -> BlockMasks:
        """Draws the masks of one batch.

        Args:
            step: index of the training step, at least 0.
            sample_ids: ``[B]`` int64, a number that stays with each image (its index in the data
                set); or a batch size, short for the ids 0 to B - 1.

        Returns:
            Masks on the device of ``sample_ids``. ``context_mask`` is ``None`` where all contexts
            have one length whatever is drawn: with ``allow_overlap``, or with ``max_context`` equal
            to ``min_context``.

        Raises:
            TypeError: ``sample_ids`` is neither an int nor int64.
            ValueError: ``step`` is negative or ``sample_ids`` has another shape than ``[B]``.
        """
        ids = torch.arange(sample_ids) if isinstance(sample_ids, int) else sample_ids
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"sample_ids: expected an int or an int64 tensor [B], got {got}")
        if ids.dim() != 1:
            raise ValueError(f"sample_ids: expected shape [B], got {list(ids.shape)}")
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")

        step_key = _fold(_fold(torch.tensor(0), torch.tensor(self.seed)), torch.tensor(step))
        sizes = _stream(step_key, torch.arange(2)) >> 52 & _SIZES - 1
        target_size = self._target_sizes[int(sizes[0])]
        context_size = self._context_sizes[int(sizes[1])]

        keys = _fold(step_key, ids)
        tops, lefts = self._place(keys, 0, target_size, context_size)
        context = self._context(tops, lefts, target_size, context_size)
        for attempt in range(1, _TRIES * self.num_targets + 1):
            again = (context.sum(dim=1) < self.min_context).nonzero()[:, 0]
            if not len(again):
                break
            tops[again], lefts[again] = self._place(keys[again], attempt, target_size, context_size)
            context[again] = self._context(tops[again], lefts[again], target_size, context_size)

        width = self.grid[1]
        rows = torch.arange(target_size[0], device=ids.device)[:, None] * width
        block = (rows + torch.arange(target_size[1], device=ids.device)).flatten()
        corners = tops[:, :-1] * width + lefts[:, :-1]
        if self.max_context is not None:
            context &= self._kept(keys, context)
        index, valid = pack_members(context)
        mask = None if self.allow_overlap or self.max_context == self.min_context else valid
        return BlockMasks(index, corners[:, :, None] + block, mask, self.grid)

    def _place(
        self, keys: Tensor, attempt: int, target_size: Size, context_size: Size
    ) -> tuple[Tensor, Tensor]:
        """Top rows and left columns ``[B, M + 1]`` of the target blocks and, last, the context."""
        blocks = self.num_targets + 1
        draws = _stream(keys[:, None], attempt * blocks + torch.arange(blocks, device=keys.device))
        sizes = torch.tensor([target_size] * self.num_targets + [context_size], device=keys.device)
        last_top, last_left = self.grid[0] - sizes[:, 0], self.grid[1] - sizes[:, 1]
        distinct = self.num_targets - attempt // _TRIES
        if distinct:
            tops = _below(draws >> 32, last_top + 1)
            lefts = _below(draws, last_left + 1)
            source = torch.arange(self.num_targets, device=keys.device) % distinct
            tops[:, :-1], lefts[:, :-1] = tops[:, source], lefts[:, source]
            return tops, lefts
        is_context = torch.arange(blocks, device=keys.device) == self.num_targets
        at_bottom = (draws[:, :1] < 0) ^ is_context
        at_right = (draws[:, :1] & 1 == 1) ^ is_context
        return at_bottom * last_top, at_right * last_left

    def _context(
        self,
        tops: Tensor,
        lefts: Tensor,
        target_size: Size,
        context_size: Size,
    ) -> Tensor:
        """``[B, H * W]`` bool, True for the context patches."""
        y = torch.arange(self.grid[0], device=tops.device)[:, None]
        x = torch.arange(self.grid[1], device=tops.device)

        def covers(block: int, size: Size) -> Tensor:
            top, left = tops[:, block, None, None], lefts[:, block, None, None]
            return ((y >= top) & (y < top + size[0])) & ((x >= left) & (x < left + size[1]))

        context = covers(self.num_targets, context_size)
        if not self.allow_overlap:
            for block in range(self.num_targets):
                context &= ~covers(block, target_size)
        return context.flatten(1)

    def _kept(self, keys: Tensor, context: Tensor) -> Tensor:
        """``[B, H * W]`` bool, True for the ``max_context`` patches that an image keeps."""
        height, width = self.grid
        patches = torch.arange(height * width, device=keys.device)
        by_row, by_column = patches, patches % width * height + patches // width
        last = height * width - 1
        from_side = torch.stack([by_row, last - by_row, by_column, last - by_column])
        side = _shift(_stream(_fold(keys, torch.tensor(-1)), torch.tensor(0)), 62)
        order = torch.where(context, from_side[side], height * width)
        kept = order.argsort(dim=1)[:, : self.max_context]
        return torch.zeros_like(context).scatter_(1, kept, True)

    def _check_feasible(self) -> None:
        """Every size that can be drawn has a layout: all targets opposite to the context."""
        context = torch.tensor(self._context_sizes).unique(dim=0)[:, None]
        target = torch.tensor(self._target_sizes).unique(dim=0) * (not self.allow_overlap)
        overlap = (context + target - torch.tensor(self.grid)).clamp(min=0).prod(dim=2)
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


def _block_sizes(
    grid: Size, name: str, scale: tuple[float, float], aspect: tuple[float, float]
) -> list[Size]:
    """The block sizes that can be drawn, all equally likely."""
    patches = grid[0] * grid[1]
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"{name}_scale: expected 0 < low <= high <= 1, got {tuple(scale)}")
    if not 0 < aspect[0] <= aspect[1]:
        raise ValueError(f"{name}_aspect: expected 0 < low <= high, got {tuple(aspect)}")
    if patches * scale[0] < 1:
        raise ValueError(
            f"{name}_scale: expected at least one patch, got {scale[0]} of the {patches} patches "
            f"of a {grid[0]}x{grid[1]} grid; raise {name}_scale to {1 / patches:.3g} or more"
        )
    uniform = (torch.arange(_SIZES, dtype=torch.float64) + 0.5) / _SIZES
    area = (patches * (scale[0] + uniform * (scale[1] - scale[0]))).floor()
    ratio = aspect[0] + uniform * (aspect[1] - aspect[0])
    heights = (area * ratio).sqrt().round().clamp(1, grid[0]).long().tolist()
    widths = (area / ratio).sqrt().round().clamp(1, grid[1]).long().tolist()
    return list(zip(heights, widths, strict=True))


# A counter-based generator in wrapping int64 arithmetic, the same on every device: splitmix64
# (Steele, Lea and Flood, 2014), whose k-th draw needs no draw before it.


def _shift(x: Tensor, bits: int) -> Tensor:
    return x >> bits & (1 << 64 - bits) - 1  # torch shifts the sign in


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as int64
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB as int64
    return x ^ _shift(x, 31)


def _stream(key: Tensor, counter: Tensor) -> Tensor:
    """The draws number ``counter`` of the stream ``key``: 64 random bits each."""
    return _mix(key + (counter + 1) * _GOLDEN)


def _fold(key: Tensor, value: Tensor) -> Tensor:
    """The key of sub-stream ``value`` of ``key``; different values give different keys."""
    return _mix(key ^ _mix(value + _GOLDEN))


def _below(draws: Tensor, bound: Tensor) -> Tensor:
    """The low 32 bits of ``draws`` scaled to ``[0, bound)``."""
    return (draws & 0xFFFFFFFF) * bound >> 32
