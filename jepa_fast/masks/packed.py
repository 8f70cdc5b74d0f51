"""Masks whose context tokens lie in one row of fixed length: no padding, no cut, one shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from jepa_fast._arguments import integer
from jepa_fast.masks.block_masks import BlockMasks
from jepa_fast.masks.sampler import BlockMaskSampler
from jepa_fast.ops._checks import check_index_range, reads_values


@dataclass(frozen=True, eq=False)
class PackedMasks:
    """Contexts and target blocks of a batch, packed to a fixed number of tokens.

    ``T`` context tokens of all images lie one after the other; what is left of them is slack, a
    sequence of its own that nobody reads. The predictor's ``P`` tokens likewise: sequence
    ``m * B + b`` is image b's context, then block m's mask tokens. All shapes are those of the
    batch size and of :func:`pack_masks`' arguments, so every step has the same.

    Attributes:
        context: ``[T]`` int64, rows of all images' patches: ``image * N + patch``.
        context_offsets: ``[B + 2]`` int32, where each image's tokens begin; then the slack, and T.
        targets: ``[B, M, Kt]`` int64, patches of the target blocks; slots that a smaller block
            leaves over repeat its patches.
        target_mask: ``[B, M, Kt]`` bool, True where a slot counts: not in slots left over, and not
            for images that belong to another pack. None: everywhere, which only packs made without
            ``block`` say; with it there is always a mask, as compiled models want.
        predictor: ``[P]`` int64, rows of context tokens followed by all mask tokens
            ``[T + B * M * Kt]``.
        predictor_offsets: ``[M * B + 2]`` int32, as ``context_offsets``.
        prediction: ``[M * B, Kt]`` int64, which predictor token each target slot is predicted by.
        grid: ``(H, W)``, the patches of an image along each side.
        longest: most context tokens that an image can have here.
        share: of the batch's target patches that count in this pack; over its packs they sum to 1.
        lengths: ``[B]`` int64, context tokens of every image of the batch, whatever its pack.
    """

    context: Tensor
    context_offsets: Tensor
    targets: Tensor
    target_mask: Tensor | None
    predictor: Tensor
    predictor_offsets: Tensor
    prediction: Tensor
    grid: tuple[int, int]
    longest: int
    share: float
    lengths: Tensor

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedMasks:
        """The same masks on ``device``; ``non_blocking`` as in :meth:`torch.Tensor.to`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedMasks:
        """The same masks in page-locked memory. ``DataLoader(pin_memory=True)`` calls this."""
        return self._with(Tensor.pin_memory)

    def members(self) -> Tensor:
        """``[B]`` bool: the images that belong to this pack."""
        if self.target_mask is None:
            return torch.ones_like(self.lengths, dtype=torch.bool)
        return self.target_mask.flatten(1).any(1)

    def reweighted(self, count: Tensor) -> Tensor:
        """What turns a mean over this pack into its part of the batch's mean, ``share`` aside.

        For losses that are means over other things than target patches: `share * reweighted(n)` is
        the part that this pack has of all things. Counts on the device; nothing waits for it.

        Args:
            count: ``[B]``, how many of them every image of the batch has.
        """
        member = self.members()
        part = (count * member).sum() / count.sum().clamp(min=1)
        return part * len(member) / member.sum().clamp(min=1)

    def padded(self, partly: bool = False) -> BlockMasks:
        """The same masks, one row an image of ``longest`` slots.

        Target slots that a block leaves over repeat its patches here, too: ``target_mask`` says
        which, and a predictor should attend to none of them.

        Args:
            partly: also where images belong to another pack; here they have no context then.

        Raises:
            ValueError: some of the images belong to another pack, without ``partly``.
        """
        if not partly and self.share < 1:
            raise ValueError(
                "masks: expected all images of the batch in one pack, got some of them; raise the "
                "budget of pack_masks"
            )
        begin = self.context_offsets[:-2].long()
        lengths = self.context_offsets[1:-1].long() - begin
        slot = torch.arange(self.longest, device=begin.device)
        filled = slot < lengths[:, None]
        row = self.context[torch.where(filled, begin[:, None] + slot, 0)]
        patches = self.grid[0] * self.grid[1]
        context = torch.where(filled, row % patches, 0)
        return BlockMasks(context, self.targets, filled, self.grid)

    def _with(self, change: Callable[[Tensor], Tensor]) -> PackedMasks:
        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return PackedMasks(**{**values, **{name: change(x) for name, x in tensors.items()}})


def pack_masks(
    masks: BlockMasks, tokens: int, block: int | None = None, longest: int | None = None
) -> list[PackedMasks]:
    """Packs the contexts of a batch; what does not fit goes to further packs, nothing is cut.

    Every pack is of the whole batch, so that shapes stay; images of other packs have no context in
    it, and their targets do not count. A step over several packs is::

        for pack in pack_masks(masks, tokens=7168, block=40, longest=196):
            (pack.share * model(images, pack).loss).backward()

    The losses then sum to that of the whole batch (but for VICReg's terms of TI-JEPA, which are of
    the images together).

    Processes may have different numbers of packs. DistributedDataParallel would wait for ever for
    those of the others: do all passes but the last of a step, forward and backward, within its
    ``no_sync()``. FSDP communicates in every pass; there take ``tokens`` that hold any batch in one
    pack, images times ``longest`` and one.

    Models take packs where their encoder takes ``sequences``, as ours do and ``TimmEncoder`` and
    ``TransformersEncoder`` of :mod:`jepa_fast.interop` do not: train those with padded masks, or as
    encoders of ours, by ``from_timm`` and ``from_transformers``. Any will do for TI-JEPA and
    ``TCJepa(conditioning="append")``, which unpack.

    Args:
        masks: of one batch, best on the CPU: how many packs there are depends on their values.
        tokens: the budget T; one of them always stays slack. :func:`packing_budget` suggests one.
        block: Kt, the most patches of a target block in any step; None: those of these masks, so
            that shapes differ by step.
        longest: the most context tokens of an image in any step, at most the patches of the grid;
            None: of these masks. It bounds what attention without variable lengths works on.

    Returns:
        Mostly one pack.

    Raises:
        TypeError: ``masks`` are no :class:`BlockMasks`, or a size is no integer.
        ValueError: an image's context does not fit into the budget, or is longer than ``longest``,
            or blocks have more than ``block`` patches; a patch outside the grid, on a CPU (a GPU is
            asked with ``JEPA_FAST_DEBUG=1``).
    """
    if not isinstance(masks, BlockMasks):
        fix = (
            "they are packed already"
            if isinstance(masks, PackedMasks)
            else "of a collator's lists make them by BlockMasks.from_lists(contexts, targets, grid)"
        )
        raise TypeError(f"masks: expected BlockMasks, got {type(masks).__name__}; {fix}")
    tokens = integer("tokens", tokens)
    block = None if block is None else integer("block", block)
    longest = None if longest is None else integer("longest", longest)
    batch, _, patches = masks.targets.shape
    slots = patches if block is None else block
    real = masks.filled()
    size = masks.grid[0] * masks.grid[1]
    if reads_values(masks.context):  # other rows of the batch would be taken for what is out of it
        check_index_range("pack_masks", "masks.context", masks.context[real], size)
    check_index_range("pack_masks", "masks.targets", masks.targets, size)
    lengths = real.sum(1).cpu()
    most = int(lengths.max()) if batch else 0
    longest = most if longest is None else longest
    if most > longest:
        raise ValueError(f"longest: expected at least {most}, a context's tokens, got {longest}")
    if most > tokens - 1:
        raise ValueError(
            f"tokens: expected more than {most}, an image's context, got {tokens}; raise tokens, "
            "or set max_context in the sampler"
        )
    if slots < patches:
        raise ValueError(f"block: expected at least {patches}, a block's patches, got {slots}")
    if slots > patches == 0:  # slots repeat a block's patches
        raise ValueError(f"block: expected 0, since the target blocks have no patches, got {slots}")
    return [
        _pack(masks, member.to(masks.targets.device), tokens, block, longest)
        for member in _split(lengths, tokens - 1)
    ]


def packing_budget(
    sampler: BlockMaskSampler, batch: int, steps: int = 64, multiple: int = 64
) -> tuple[int, int, int]:
    """``(tokens, block, longest)`` for :func:`pack_masks`, measured on the masks of some steps.

    The budget holds the fullest of these steps' batches, so that few batches of a run need a second
    pack, and the longest context there can be, so that none is refused; ``block`` and ``longest``
    hold every batch.

    Args:
        sampler: of the run's masks.
        batch: images a step on one process.
        steps: how many to look at.
        multiple: the budget is one of it.

    Raises:
        TypeError: another sampler, or a number that is no integer.
        ValueError: a number that is not positive.
    """
    if not isinstance(sampler, BlockMaskSampler):
        raise TypeError(
            f"sampler: expected a BlockMaskSampler, got {type(sampler).__name__}; of other masks "
            "take the most that there are of each"
        )
    batch = integer("batch", batch, least=1)
    steps = integer("steps", steps, least=1)
    multiple = integer("multiple", multiple, least=1)
    fullest = sampler.longest_context
    for step in range(steps):
        fullest = max(fullest, int(sampler(step, batch).filled().sum()))
    tokens = -(-(fullest + 1) // multiple) * multiple
    return tokens, sampler.largest_target, sampler.longest_context


def _split(lengths: Tensor, tokens: int) -> list[Tensor]:
    """Which images go into each pack, ``[B]`` bool: in their order, as many as fit."""
    packs, used = [torch.zeros_like(lengths, dtype=torch.bool)], 0
    for image, length in enumerate(lengths.tolist()):
        if used + length > tokens:
            packs.append(torch.zeros_like(lengths, dtype=torch.bool))
            used = 0
        packs[-1][image] = True
        used += length
    return packs


def _pack(
    masks: BlockMasks, member: Tensor, tokens: int, block: int | None, longest: int
) -> PackedMasks:
    """One pack of the images that are its members."""
    batch, blocks, patches = masks.targets.shape
    slots = patches if block is None else block
    # With the slots of every step given, a mask that is there in some steps alone would make
    # compiled models two graphs.
    whole = block is None and bool(member.all())
    device = masks.targets.device
    grid_patches = masks.grid[0] * masks.grid[1]
    real = masks.filled() & member[:, None]
    lengths = real.sum(1)
    images = torch.arange(batch, device=device)

    rows = (masks.context + images[:, None] * grid_patches)[real]
    context = _with_slack(rows, tokens, max(batch * grid_patches, 1))
    first = _offsets(lengths, tokens)

    # Sequences m * B + b: the context's tokens, then the block's.
    sequence_lengths = (lengths + member * patches).repeat(blocks)
    total = blocks * (tokens + batch * slots) if blocks else 1
    begin = _offsets(sequence_lengths, total)
    sequence = torch.arange(blocks * batch, device=device).repeat_interleave(sequence_lengths)
    place = torch.arange(len(sequence), device=device) - begin[sequence]
    image = sequence % max(batch, 1)
    hidden = place - lengths[image]
    mask_row = tokens + (image * blocks + sequence // max(batch, 1)) * slots + hidden
    predictor = torch.where(hidden < 0, first[image] + place, mask_row)

    slot = torch.arange(slots, device=device)
    repeated = slot % max(patches, 1)
    targets = masks.targets[:, :, repeated]
    counts = (slot < patches) & member[:, None, None]
    counts = counts.expand(batch, blocks, slots)
    # Those of other packs have no tokens here; any row will do, and the loss leaves them out.
    found = (begin[:-2] + lengths.repeat(blocks))[:, None] + repeated
    found = torch.where(member.repeat(blocks)[:, None], found, 0)
    return PackedMasks(
        context=context,
        context_offsets=first.int(),
        targets=targets,
        target_mask=None if whole else counts.contiguous(),
        predictor=_with_slack(predictor, total, tokens),
        predictor_offsets=begin.int(),
        prediction=found,
        grid=masks.grid,
        longest=longest,
        share=float(member.sum()) / batch if batch else 1.0,
        lengths=masks.filled().sum(1),
    )


def _with_slack(rows: Tensor, length: int, sources: int) -> Tensor:
    """``rows`` made ``length`` long. Slack reads all sources in turn: none then has all of the work
    of summing its gradients, zero as they are.
    """
    slack = torch.arange(length - len(rows), device=rows.device) % sources
    return torch.cat([rows, slack])


def _offsets(lengths: Tensor, end: int) -> Tensor:
    """``[S + 2]``: where S sequences and the slack after them begin, and the end."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0), lengths.new_full((1,), end)])
