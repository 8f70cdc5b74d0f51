"""TI-JEPA's crosser: image tokens that query the words of a text (arXiv 2503.06380, section 3)."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor, nn

from jepa_fast._arguments import check_choice, check_counts, check_number
from jepa_fast.nn.attention import Attention, Mlp, attend, check_heads
from jepa_fast.nn.initialisation import init_transformer
from jepa_fast.nn.linear import Linear
from jepa_fast.nn.words import check_word_mask

BlockKind = Literal["self_cross", "cross"]

CROSSER_SIZES: dict[str, tuple[int, int]] = {
    "small": (768, 4),
    "medium": (768, 6),
    "large": (1024, 8),
}
"""Width and depth of the paper's three sizes."""


class CrossAttention(nn.Module):
    """Multi-head attention of image tokens to words.

    Args:
        dim: width of the queries, and of the output.
        word_dim: width of the words.
        num_heads: heads; must divide ``dim``.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, word_dim: int, num_heads: int) -> None:
        super().__init__()
        check_heads(num_heads, dim)
        self.num_heads = num_heads
        self.query = Linear(dim, dim)
        self.key = Linear(word_dim, dim)
        self.value = Linear(word_dim, dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, words: Tensor, word_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: ``[B, T, dim]``.
            words: ``[B, S, word_dim]``.
            word_mask: ``[B, S]`` bool, False at padding; None: all words are real.

        Returns:
            ``[B, T, dim]``; zero for an image whose words are all padding.
        """
        heads = (self.num_heads, -1)
        q = self.query(x).unflatten(-1, heads).transpose(1, 2)  # [B, heads, T, dim / heads]
        k = self.key(words).unflatten(-1, heads).transpose(1, 2)
        v = self.value(words).unflatten(-1, heads).transpose(1, 2)
        if word_mask is None:
            attended = attend(q, k, v)
            return self.proj(attended.transpose(1, 2).flatten(2))
        # A softmax over nothing is NaN: where there is no word, attend to all and drop the result.
        has_words = word_mask.any(dim=1)[:, None, None]
        mask = (word_mask[:, None] | ~has_words)[:, None]  # [B, 1, 1, S]
        attended = attend(q, k, v, mask)
        return self.proj(attended.transpose(1, 2).flatten(2)).where(has_words, 0.0)


class SelfCrossBlock(nn.Module):
    """Self-attention, LayerNorm, cross-attention to the words, MLP, LayerNorm (post-norm)."""

    def __init__(self, dim: int, word_dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads)
        self.norm_after_self_attn = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attn = CrossAttention(dim, word_dim, num_heads)
        # The public code owns this LayerNorm and never applies it. It is here for its state dict
        # and its parameter count, frozen so that no optimizer waits for its gradient.
        self.norm_after_cross_attn = nn.LayerNorm(dim, eps=1e-6).requires_grad_(False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm_after_mlp = nn.LayerNorm(dim, eps=1e-6)

    def forward(
        self,
        x: Tensor,
        words: Tensor | None,
        word_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """``[B, T, dim]`` to ``[B, T, dim]``; arguments as in :class:`Crosser`."""
        x = self.norm_after_self_attn(x + self.attn(x, token_mask))
        if words is not None:
            x = x + self.cross_attn(x, words, word_mask)
        return self.norm_after_mlp(x + self.mlp(x))


class CrossBlock(nn.Module):
    """Pre-LN cross-attention and MLP. One LayerNorm serves tokens and words, so widths agree."""

    def __init__(self, dim: int, word_dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if word_dim != dim:
            raise ValueError(
                f"text_dim: expected the crosser's width {dim} with block='cross', whose LayerNorm "
                f"is shared by tokens and words, got {word_dim}; take block='self_cross', "
                "or a text encoder of that width"
            )
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attn = CrossAttention(dim, dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        words: Tensor | None,
        word_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """``[B, T, dim]`` to ``[B, T, dim]``; tokens never see each other, so no ``token_mask``."""
        if words is not None:
            x = x + self.cross_attn(self.norm1(x), self.norm1(words), word_mask)
        return x + self.mlp(self.norm2(x))


class Crosser(nn.Module):
    """Projection of image tokens, LayerNorm, then blocks that let them read a text.

    Module names are those of the public TI-JEPA state dict.

    Args:
        image_dim: width of the image encoder's tokens.
        text_dim: width of the text encoder's words.
        width: width inside and of the output.
        depth: number of blocks.
        num_heads: heads of every attention; must divide ``width``.
        block: ``"self_cross"`` (the paper's sizes) or ``"cross"``, which needs
            ``text_dim == width``.
        mlp_ratio: hidden width of the MLPs over ``width``.
        init: ``"released"``, ``"rescaled"`` or ``"fan_in"``, see
            :func:`~jepa_fast.nn.initialisation.init_transformer`.

    Raises:
        TypeError: a size that is no integer, or a ratio that is no number.
        ValueError: an unknown ``block`` or ``init``, widths that do not fit, or no blocks.
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        width: int = 768,
        depth: int = 4,
        num_heads: int = 8,
        block: str = "self_cross",
        mlp_ratio: float = 4.0,
        init: str = "released",
    ) -> None:
        super().__init__()
        check_choice("block", block, get_args(BlockKind))
        check_counts(image_dim=image_dim, text_dim=text_dim, width=width, depth=depth)
        check_number("mlp_ratio", mlp_ratio)
        make = SelfCrossBlock if block == "self_cross" else CrossBlock
        self.image_dim, self.text_dim, self.width = image_dim, text_dim, width
        self.vision_proj = Linear(image_dim, width)
        self.vision_norm = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList(
            make(width, text_dim, num_heads, mlp_ratio) for _ in range(depth)
        )
        init_transformer(self, (), init)
        if init == "rescaled":
            for name, module in self.blocks.named_modules():
                if name.endswith(("attn.proj", "mlp.fc2")) and isinstance(module, nn.Linear):
                    module.weight.data.div_(math.sqrt(2.0 * (int(name.split(".")[0]) + 1)))

    def forward(
        self,
        tokens: Tensor,
        words: Tensor | None,
        word_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Let image tokens read a text.

        Args:
            tokens: ``[B, T, image_dim]`` from the image encoder.
            words: ``[B, S, text_dim]`` from the text encoder, finite at padding, too; None: no
                image has a text, and no block has cross-attention.
            word_mask: ``[B, S]`` bool, False at padding. Cross-attention adds nothing to an image
                whose words are all padding.
            token_mask: ``[B, T]`` bool, False at padding tokens: no other token attends to them,
                and their own outputs are unspecified but finite.

        Returns:
            ``[B, T, width]``.

        Raises:
            TypeError: tokens or words that are no floating tensors, or a mask that is not bool.
            ValueError: tokens or words of another width, another number of texts than of images, or
                a mask of another shape.
        """
        _check_vectors("tokens", tokens, f"[B, T, {self.image_dim}]", self.image_dim)
        if words is not None:
            expected = f"[B, S, {self.text_dim}] of {len(tokens)} texts, as images"
            _check_vectors("words", words, expected, self.text_dim, len(tokens))
            check_word_mask("word_mask", word_mask, words.shape[:2], words.device)
            if words.shape[1] == 0:
                words = None
        check_word_mask("token_mask", token_mask, tokens.shape[:2], tokens.device)
        x = self.vision_norm(self.vision_proj(tokens))
        for block in self.blocks:
            x = block(x, words, word_mask, token_mask)
        return x


def _check_vectors(
    name: str, x: object, expected: str, width: int, count: int | None = None
) -> None:
    """Raises unless it is a floating tensor of three dimensions, the last of them the width."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected floating vectors, got {x.dtype}")
    if x.ndim != 3 or x.shape[2] != width or count not in (None, len(x)):
        raise ValueError(f"{name}: expected {expected}, got {list(x.shape)}")
