"""I-JEPA's predictor: a narrow ViT over context tokens and mask tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from jepa_fast._arguments import integer
from jepa_fast.masks import PackedMasks
from jepa_fast.nn.attention import Block, check_heads
from jepa_fast.nn.initialisation import init_mask_token, init_transformer
from jepa_fast.nn.linear import Linear
from jepa_fast.nn.packed import Sequences
from jepa_fast.nn.position import sincos_position_embedding


class VisionTransformerPredictor(nn.Module):
    """Predicts the teacher's tokens of target blocks from the context's tokens.

    An image with ``M`` target blocks becomes ``M`` sequences: all its context tokens, then one mask
    token a patch of the block (a learned vector plus that patch's position). Sequences are
    block-major: row ``m * B + b`` is block ``m`` of image ``b`` (arXiv 2301.08243, section 3).

    Args:
        grid: (H, W) patches of the image.
        embed_dim: width of the encoder's tokens, in and out.
        predictor_dim: width inside, a multiple of 4 and of ``num_heads``.
        depth: number of blocks, at least one.
        num_heads: attention heads; I-JEPA takes the encoder's.
        mlp_ratio: hidden width of the MLPs over ``predictor_dim``.
        init: ``"released"``, ``"rescaled"`` or ``"fan_in"``, see
            :func:`~jepa_fast.nn.initialisation.init_transformer`.

    Raises:
        TypeError: a size that is no integer.
        ValueError: sizes that do not divide or are not positive, or an unknown ``init``.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        embed_dim: int = 768,
        predictor_dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        init: str = "released",
    ) -> None:
        super().__init__()
        integer("predictor_dim", predictor_dim)
        integer("predictor_depth", depth)
        if predictor_dim < 1 or predictor_dim % 4:
            raise ValueError(
                f"predictor_dim: expected a positive multiple of 4, got {predictor_dim}; its "
                "position embedding is sine and cosine of two axes"
            )
        if depth < 1:
            raise ValueError(f"predictor_depth: expected at least one block, got {depth}")
        default = " (by default the encoder's num_heads)"
        check_heads(num_heads, predictor_dim, "predictor_heads", "predictor_dim", default)
        self.grid = grid
        self.embed_dim = embed_dim
        self.predictor_dim = predictor_dim
        self.num_heads = num_heads
        self.predictor_embed = Linear(embed_dim, predictor_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_dim))
        self.predictor_pos_embed: Tensor
        self.register_buffer(
            "predictor_pos_embed", sincos_position_embedding(predictor_dim, grid)[None]
        )
        self.predictor_blocks = nn.ModuleList(
            Block(predictor_dim, num_heads, mlp_ratio) for _ in range(depth)
        )
        self.predictor_norm = nn.LayerNorm(predictor_dim, eps=1e-6)
        self.predictor_proj = Linear(predictor_dim, embed_dim)
        init_transformer(self, self.predictor_blocks, init)
        init_mask_token(self.mask_token)

    def forward(
        self,
        context: Tensor,
        context_index: Tensor | PackedMasks,
        target_index: Tensor | Sequences,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        after_block: Callable[[int, Tensor], Tensor] | None = None,
        appended: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Predicted tokens ``[M * B, Kt, embed_dim]``.

        Arguments as in :meth:`features`; of packed tokens, masks and sequences stand in the places
        of both indices, and arguments are as in :meth:`features_packed`.
        """
        if isinstance(context_index, PackedMasks):
            sequences = cast(Sequences, target_index)
            hidden = self.features_packed(context, context_index, sequences, after_block)
        else:
            hidden = self.features(
                context,
                context_index,
                cast(Tensor, target_index),
                context_mask,
                target_mask,
                after_block,
                appended,
            )
        return self.predictor_proj(hidden)

    def features(
        self,
        context: Tensor,
        context_index: Tensor,
        target_index: Tensor,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        after_block: Callable[[int, Tensor], Tensor] | None = None,
        appended: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """What the predictor knows of each target patch, before the projection to ``embed_dim``.

        Args:
            context: ``[B, Kc, embed_dim]`` the encoder's tokens of the context patches.
            context_index: ``[B, Kc]`` int64 their patch indices.
            target_index: ``[B, M, Kt]`` int64 patch indices of the target blocks.
            context_mask: ``[B, Kc]`` bool, False at padding slots of the context.
            target_mask: ``[B, M, Kt]`` bool, False at padding slots of the targets.
            after_block: called as ``tokens = after_block(layer, tokens)`` after every block, on all
                ``[M * B, Kc + Kt, predictor_dim]`` tokens; the place for conditioning.
            appended: more tokens for all sequences of an image to attend to, ``[B, E,
                predictor_dim]``, and which of them exist, ``[B, E]`` bool. They come last.

        Returns:
            ``[M * B, Kt, predictor_dim]`` after the final LayerNorm, block-major.
        """
        from jepa_fast import ops

        tokens = ops.assemble_predictor_tokens(
            self.predictor_embed(context),
            self.mask_token.flatten(),
            self._positions(),
            context_index,
            target_index,
        )
        key_mask = _key_mask(context_index, target_index, context_mask, target_mask)
        if appended is not None:
            if key_mask is None:
                key_mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
            more, exists = appended
            blocks = target_index.shape[1]
            tokens = torch.cat([tokens, more.repeat(blocks, 1, 1)], 1)
            key_mask = torch.cat([key_mask, exists.repeat(blocks, 1)], 1)
        first, last = context.shape[1], len(self.predictor_blocks) - 1
        for layer, block in enumerate(self.predictor_blocks):
            if after_block is not None:
                tokens = after_block(layer, block(tokens, key_mask))
            elif layer < last:
                tokens = block(tokens, key_mask)
            else:  # nobody reads the context tokens any more, so they are not computed
                tokens = block(tokens, key_mask, skip=first)
                first = 0
        return self.predictor_norm(tokens[:, first : first + target_index.shape[2]])

    def _positions(self) -> Tensor:
        """``[N, predictor_dim]``."""
        # A buffer stays as wide as it is where FSDP narrows the weights for a forward pass.
        return self.predictor_pos_embed[0].to(self.mask_token.dtype)

    def sequences(self, masks: PackedMasks, backend: str = "auto") -> Sequences:
        """Where the predictor's packed sequences begin; ``backend`` of attention."""
        longest = masks.longest + masks.prediction.shape[1]
        return Sequences(masks.predictor_offsets, len(masks.predictor), longest, backend)

    def features_packed(
        self,
        context: Tensor,
        masks: PackedMasks,
        sequences: Sequences,
        after_block: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """:meth:`features` of packed tokens.

        Args:
            context: ``[T, embed_dim]`` the encoder's tokens, packed as ``masks.context``.
            masks: what is where.
            sequences: as :meth:`sequences` gives them.
            after_block: called as ``tokens = after_block(layer, tokens)`` after every block, on all
                ``[P, predictor_dim]`` tokens.

        Returns:
            ``[M * B, Kt, predictor_dim]`` after the final LayerNorm, block-major.
        """
        from jepa_fast import ops

        position = self._positions()
        seen = self.predictor_embed(context) + ops.gather_packed(
            position, masks.context % position.shape[0]
        )
        hidden = self.mask_token[0] + ops.gather_packed(position, masks.targets.flatten())
        tokens = ops.gather_packed(torch.cat([seen, hidden.to(seen.dtype)]), masks.predictor)
        wanted = masks.prediction.flatten()
        last = len(self.predictor_blocks) - 1
        for layer, block in enumerate(self.predictor_blocks):
            if after_block is not None:
                tokens = after_block(layer, block(tokens, sequences=sequences))
            elif layer < last:
                tokens = block(tokens, sequences=sequences)
            else:  # nobody reads the others any more
                tokens = block(tokens, sequences=sequences, rows=wanted)
        if after_block is not None:
            tokens = ops.gather_packed(tokens, wanted)
        return self.predictor_norm(tokens).unflatten(0, masks.prediction.shape)


def _key_mask(
    context_index: Tensor,
    target_index: Tensor,
    context_mask: Tensor | None,
    target_mask: Tensor | None,
) -> Tensor | None:
    """Block-major ``[M * B, Kc + Kt]``, True where a token may be attended to; None: everywhere."""
    if context_mask is None and target_mask is None:
        return None
    if context_mask is None:
        context_mask = torch.ones_like(context_index, dtype=torch.bool)
    if target_mask is None:
        target_mask = torch.ones_like(target_index, dtype=torch.bool)
    blocks = target_index.shape[1]
    return torch.cat([context_mask.repeat(blocks, 1), target_mask.transpose(0, 1).flatten(0, 1)], 1)
