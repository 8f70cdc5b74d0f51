"""The masks of one batch, in the form that the models take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jepa_fast._arguments import height_and_width
from jepa_fast.ops._checks import check_index_range, may_be_read


@dataclass(frozen=True, eq=False)
class BlockMasks:
    """Context and target patches of a batch of images, as indices into the raster-ordered patches.

    Attributes:
        context: ``[B, Kc]`` int64, the patches that the context encoder sees, ascending in the
            valid part. Padding slots hold index 0.
        targets: ``[B, M, Kt]`` int64, the patches of the ``M`` target blocks; blocks may overlap.
        context_mask: ``[B, Kc]`` bool, True where a slot holds a real patch; ``None``: in all.
        grid: ``(H, W)``, the patches of an image along each side; or one number for both.

    Raises:
        TypeError: an index is no int64 tensor, the mask no bool one, or the grid no integers.
        ValueError: shapes that do not fit each other, or a grid without patches.
    """

    context: Tensor
    targets: Tensor
    context_mask: Tensor | None
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        for name, index, shape in (
            ("context", self.context, "[B, Kc]"),
            ("targets", self.targets, "[B, M, Kt]"),
        ):
            if not isinstance(index, Tensor):
                raise TypeError(
                    f"{name}: expected a tensor {shape}, got {type(index).__name__}; use "
                    "torch.as_tensor()"
                )
            if index.dtype != torch.int64:
                raise TypeError(
                    f"{name}: expected int64 patch indices, got {index.dtype}; use .long()"
                )
            if index.dim() != shape.count(",") + 1:
                raise ValueError(f"{name}: expected shape {shape}, got {list(index.shape)}")
        if self.context.shape[0] != self.targets.shape[0]:
            raise ValueError(
                f"targets: expected {self.context.shape[0]} images as in context, "
                f"got {self.targets.shape[0]}; pass the masks of one batch"
            )
        if not _is_grid(self.grid):
            object.__setattr__(self, "grid", height_and_width("grid", self.grid, least=1))
        if self.context_mask is None:
            return
        if not isinstance(self.context_mask, Tensor):
            raise TypeError(
                f"context_mask: expected a tensor or None, got {type(self.context_mask).__name__}"
            )
        if self.context_mask.dtype != torch.bool:
            raise TypeError(
                f"context_mask: expected bool, got {self.context_mask.dtype}; use .bool()"
            )
        if self.context_mask.shape != self.context.shape:
            raise ValueError(
                f"context_mask: expected the shape of context, {list(self.context.shape)}, "
                f"got {list(self.context_mask.shape)}"
            )

    def filled(self) -> Tensor:
        """``[B, Kc]`` bool, True where a slot of the context holds a real patch."""
        if self.context_mask is None:
            return torch.ones_like(self.context, dtype=torch.bool)
        return self.context_mask

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> BlockMasks:
        """The same masks on ``device``; ``non_blocking`` as in :meth:`torch.Tensor.to`."""
        mask = self.context_mask
        return replace(
            self,
            context=self.context.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
            context_mask=None if mask is None else mask.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> BlockMasks:
        """The same masks in page-locked memory. ``DataLoader(pin_memory=True)`` calls this."""
        mask = self.context_mask
        return replace(
            self,
            context=self.context.pin_memory(),
            targets=self.targets.pin_memory(),
            context_mask=None if mask is None else mask.pin_memory(),
        )

    @classmethod
    def from_lists(
        cls, contexts: Sequence[Tensor], targets: Sequence[Tensor], grid: tuple[int, int]
    ) -> BlockMasks:
        """Masks from what :class:`MaskCollator` returns.

        Args:
            contexts: one ``[B, Kc]`` int64 tensor.
            targets: ``M`` tensors ``[B, Kt]`` int64, one a target block.
            grid: ``(H, W)`` patches of an image.

        Raises:
            TypeError: no lists of tensors.
            ValueError: not exactly one context, no target block, or blocks of different shapes.
        """
        for name, blocks in (("contexts", contexts), ("targets", targets)):
            if not isinstance(blocks, (list, tuple)):
                raise TypeError(
                    f"{name}: expected a list of tensors [B, K], got {type(blocks).__name__}"
                )
            for i, block in enumerate(blocks):
                if not isinstance(block, Tensor):
                    raise TypeError(
                        f"{name}[{i}]: expected a tensor [B, K], got {type(block).__name__}"
                    )
        if len(contexts) != 1:
            raise ValueError(
                f"contexts: expected 1 context block an image, got {len(contexts)}; "
                "use MaskCollator(nenc=1)"
            )
        shapes = {tuple(block.shape) for block in targets}
        if len(shapes) != 1:
            raise ValueError(
                "targets: expected one or more blocks [B, Kt] of one shape, "
                f"got {sorted(shapes) or 'none'}; use MaskCollator(npred=1) or more"
            )
        return cls(contexts[0], torch.stack(list(targets), dim=1), None, grid)

    @classmethod
    def coerce(
        cls,
        masks: BlockMasks | tuple[Sequence[Tensor], Sequence[Tensor]],
        grid: tuple[int, int],
    ) -> BlockMasks:
        """``masks`` as :class:`BlockMasks`: what every model does with its ``masks`` argument.

        Args:
            masks: :class:`BlockMasks`, or the pair ``(contexts, targets)`` of lists that
                :class:`MaskCollator` returns.
            grid: ``(H, W)`` of the model that is going to use them.

        Raises:
            TypeError: neither of the two forms, such as a list of packs.
            ValueError: masks made for another grid, or lists that :meth:`from_lists` refuses.
        """
        if isinstance(masks, BlockMasks):
            if tuple(masks.grid) != tuple(grid):
                raise ValueError(
                    f"masks: expected masks of a {grid[0]}x{grid[1]} grid, got "
                    f"{masks.grid[0]}x{masks.grid[1]}; give the sampler the encoder's grid"
                )
            return masks
        if isinstance(masks, (tuple, list)) and any(map(_is_of_a_batch, masks)):
            raise TypeError(
                f"masks: expected those of one forward pass, got a {type(masks).__name__} of "
                f"{len(masks)}; each pack of pack_masks is a pass of its own: for pack in packs: "
                "(pack.share * model(images, pack).loss).backward()"
            )
        if isinstance(masks, (tuple, list)) and len(masks) == 2:
            return cls.from_lists(masks[0], masks[1], grid)
        raise TypeError(
            "masks: expected BlockMasks or the pair (contexts, targets) of lists of tensors, "
            f"got {type(masks).__name__}; see jepa_fast.masks"
        )

    def target_union(self) -> tuple[Tensor, Tensor]:
        """The patches that lie in any target block of an image.

        Returns:
            ``[B, U]`` int64 indices, ascending, padded with 0 to the longest union of the batch,
            and ``[B, U]`` bool, True where a slot holds a real patch. In compiled code, which
            cannot know the longest, U is the most that there could be, ``min(M * Kt, N)``.
            Elsewhere the host reads it, and waits for the GPU if the masks are there.

        Raises:
            ValueError: a patch outside the grid, on a CPU (a GPU is asked with
                ``JEPA_FAST_DEBUG=1``).
        """
        patches = self.grid[0] * self.grid[1]
        if may_be_read(self.targets):
            check_index_range("masks", "targets", self.targets, patches)
        batch = self.targets.shape[0]
        member = torch.zeros(batch, patches, dtype=torch.bool, device=self.targets.device)
        most = min(self.targets.shape[1] * self.targets.shape[2], patches)
        return pack_members(member.scatter_(1, self.targets.flatten(1), True), most)


def _is_grid(grid: object) -> bool:
    """Whether it is what samplers give, which compiled code need not look at any further."""
    return type(grid) is tuple and len(grid) == 2 and all(type(x) is int and x > 0 for x in grid)


def _is_of_a_batch(value: object) -> bool:
    from jepa_fast.masks.packed import PackedMasks

    return isinstance(value, (BlockMasks, PackedMasks))


def pack_members(member: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Indices of the True entries of every row.

    Args:
        member: ``[B, N]`` bool.
        most: no row has more of them.

    Returns:
        ``[B, K]`` int64, ascending, padded with 0 to the fullest row, in compiled code to ``most``,
        and ``[B, K]`` bool, True where a slot is filled.
    """
    counts = member.sum(dim=1)
    slots = most
    if not torch.compiler.is_compiling():
        slots = int(counts.max()) if counts.numel() else 0
    # What is no member goes to one slot more, which is cut off.
    slot = torch.where(member, member.cumsum(dim=1) - 1, slots)
    number = torch.arange(member.shape[1], device=member.device).expand_as(member)
    index = torch.zeros(member.shape[0], slots + 1, dtype=torch.int64, device=member.device)
    index = index.scatter_(1, slot, number)[:, :slots]
    return index, torch.arange(slots, device=member.device) < counts[:, None]
