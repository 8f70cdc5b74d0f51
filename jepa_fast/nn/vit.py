"""Vision Transformer encoder of I-JEPA, and the protocol every encoder here follows."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from jepa_fast._arguments import check_counts, check_number, flag, integer
from jepa_fast.nn.attention import Block
from jepa_fast.nn.initialisation import init_transformer
from jepa_fast.nn.packed import Sequences
from jepa_fast.nn.position import interpolate_position_embedding, sincos_position_embedding


@runtime_checkable
class Encoder(Protocol):
    """What the models ask of an image encoder; any ``nn.Module`` with these members will do.

    A call ``encoder(images, keep=None, keep_mask=None)`` takes ``images [B, 3, H, W]`` and gives
    tokens ``[B, N, embed_dim]``, one a patch in raster order of ``grid`` (no class token). With
    ``keep [B, K]`` int64 it gives ``[B, K, embed_dim]``: the tokens of those patches only, computed
    without looking at any other patch, each at its own position. ``keep_mask [B, K]`` bool is False
    at padding slots: no other token may attend to them, and their own outputs are unspecified
    but finite. It is passed only where contexts differ in length, so that an encoder without it
    serves masks of one length.

    ``num_heads`` is read only where a predictor takes as many heads as the encoder.
    """

    embed_dim: int
    grid: tuple[int, int]
    num_heads: int

    def __call__(
        self, images: Tensor, keep: Tensor | None = None, keep_mask: Tensor | None = None
    ) -> Tensor: ...


def check_images(images: object) -> None:
    """Raises TypeError if the images are no tensor."""
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images: expected a tensor [B, 3, H, W], got {type(images).__name__}; stack them"
        )


def check_encoder(encoder: nn.Module, *, num_heads: bool = True, keep: bool = False) -> None:
    """Refuse a module that lacks what is needed of :class:`Encoder`.

    Args:
        encoder: any module.
        num_heads: whether that attribute is needed.
        keep: whether it has to encode some patches without looking at the others.

    Raises:
        TypeError: an attribute is missing (names all that are) or of another form, or the module
            takes images only.
    """
    needed = ("embed_dim", "grid", "num_heads") if num_heads else ("embed_dim", "grid")
    missing = [name for name in needed if not hasattr(encoder, name)]
    if missing:
        raise TypeError(
            f"encoder: expected a module with the attributes {', '.join(needed[:-1])} and "
            f"{needed[-1]}, got {type(encoder).__name__} without {', '.join(missing)}; set them, "
            "or wrap the model with jepa_fast.interop.timm or jepa_fast.interop.transformers"
        )
    for name in needed:
        value = getattr(encoder, name)
        if name == "grid":
            fits = isinstance(value, Sequence) and len(value) == 2 and all(map(_is_count, value))
            form, fix = "two positive integers, (rows, columns) of patches", "such as grid = (8, 8)"
        else:
            fits, form, fix = _is_count(value), "a positive integer", f"such as {name} = 4"
        if not fits:
            raise TypeError(
                f"encoder: expected {type(encoder).__name__}.{name} to be {form}, got {value!r}; "
                f"set it, {fix}"
            )
    if keep and not _takes(encoder, 2):
        raise TypeError(
            f"encoder: expected a module that is called as encoder(images, keep), got "
            f"{type(encoder).__name__}, which takes images only; the context must be encoded "
            "without its hidden patches, see jepa_fast.nn.vit.Encoder"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and int(value) > 0


def _takes(encoder: nn.Module, count: int) -> bool:
    """Whether ``encoder`` can be called with so many positional arguments."""
    try:
        inspect.signature(encoder.forward).bind(*[None] * count)
    except ValueError:  # it has no signature to look at
        return True
    except TypeError:
        return False
    return True


def encode_patches(
    encoder: Any, images: Tensor, keep: Tensor, keep_mask: Tensor | None = None
) -> Tensor:
    """Tokens ``[B, K, embed_dim]`` of the patches in ``keep``, as :class:`Encoder` gives them.

    Raises:
        TypeError: there is a ``keep_mask``, and the encoder does not take one.
    """
    if keep_mask is None:
        return encoder(images, keep)
    # Signatures cannot be traced.
    if not torch.compiler.is_compiling() and not _takes(encoder, 3):
        raise TypeError(
            f"encoder: expected a module that is called as encoder(images, keep, keep_mask), since "
            f"these contexts differ in length, got {type(encoder).__name__}, which takes no "
            "keep_mask; add keep_mask to its forward, see jepa_fast.nn.vit.Encoder, or set "
            "max_context=min_context in the sampler"
        )
    return encoder(images, keep, keep_mask)


def encode_packed(encoder: Any, images: Tensor, rows: Tensor, sequences: Sequences) -> Tensor:
    """Tokens ``[T, embed_dim]`` of packed patches, as :meth:`VisionTransformer.forward` gives them.

    Raises:
        TypeError: the encoder does not take packed patches.
    """
    if not torch.compiler.is_compiling() and not _takes(encoder, 4):
        raise TypeError(
            f"encoder: expected a module that is called as encoder(images, keep, keep_mask, "
            f"sequences), since these masks are packed, got {type(encoder).__name__}, which takes "
            "no sequences; see jepa_fast.nn.vit.VisionTransformer.forward, or pass padded masks"
        )
    return encoder(images, rows, None, sequences)


def check_keep(keep: Tensor | None, keep_mask: Tensor | None) -> None:
    """Refuse a padding mask that belongs to no kept patches.

    Raises:
        ValueError: ``keep_mask`` without ``keep``.
    """
    if keep is None and keep_mask is not None:
        raise ValueError("keep_mask: expected None without keep, got a mask; pass keep as well")


def pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    """``value`` as (height, width); an int stands for both.

    Raises:
        TypeError: neither an integer nor a sequence.
        ValueError: not one or two positive integers.
    """
    if isinstance(value, Integral):
        sides: Sequence[Any] = (value, value)
    elif isinstance(value, Sequence):
        sides = value
    else:
        raise TypeError(f"{name}: expected one or two positive integers, got {value!r}")
    if len(sides) != 2 or not all(map(_is_count, sides)):
        raise ValueError(f"{name}: expected one or two positive integers, got {value!r}")
    return int(sides[0]), int(sides[1])


class PatchEmbed(nn.Module):
    """Non-overlapping patches of the image, each projected to a token."""

    def __init__(self, patch_size: tuple[int, int], embed_dim: int, in_channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, N, embed_dim]`` in raster order."""
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """I-JEPA's image encoder (arXiv 2301.08243): a ViT without class token.

    Fixed sine-cosine positions are added to all patches before any is dropped; then pre-LN blocks
    with exact GELU and a final LayerNorm. It follows :class:`Encoder`.

    Args:
        img_size: side of the square image, or (height, width); a multiple of ``patch_size``.
        patch_size: side of a patch, or (height, width).
        embed_dim: token width, a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over ``embed_dim``.
        eps: epsilon of every LayerNorm.
        init: ``"released"``, ``"rescaled"`` or ``"fan_in"``, see
            :func:`~jepa_fast.nn.initialisation.init_transformer`.
        interpolate_positions: accept images of other sizes (multiples of ``patch_size``) by
            resampling the position embedding to their grid; otherwise they are refused.
        in_channels: channels of the image.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: sizes that do not divide or are not positive, or an unknown ``init``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        eps: float = 1e-6,
        init: str = "released",
        interpolate_positions: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts(embed_dim=embed_dim, in_channels=in_channels)
        integer("depth", depth, least=0)
        check_number("mlp_ratio", mlp_ratio)
        check_number("eps", eps)
        self.img_size = pair(img_size, "img_size")
        self.patch_size = pair(patch_size, "patch_size")
        self.grid = self._grid_of(self.img_size)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.interpolate_positions = flag("interpolate_positions", interpolate_positions)
        self.patch_embed = PatchEmbed(self.patch_size, embed_dim, in_channels)
        # A buffer, since it is never trained; the state dict names it as the public code does.
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_position_embedding(embed_dim, self.grid)[None])
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        init_transformer(self, self.blocks, init)

    def forward(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        keep_mask: Tensor | None = None,
        sequences: Sequences | None = None,
    ) -> Tensor:
        """Encode images, wholly or only some of their patches.

        Args:
            images: ``[B, C, H, W]``.
            keep: ``[B, K]`` int64, the patches to encode; None for all.
            keep_mask: ``[B, K]`` bool, False at padding slots of ``keep``.
            sequences: packed patches instead: ``keep`` is ``[T]`` int64, ``image * N + patch``, and
                these say where each image's begin.

        Returns:
            Tokens ``[B, K, embed_dim]``, or ``[B, N, embed_dim]`` without ``keep``, or packed
            ``[T, embed_dim]``.

        Raises:
            TypeError: images that are not floating, or of another dtype than the weights without
                autocast.
            ValueError: an image size or channels that do not fit, or ``keep_mask`` without
                ``keep``.
        """
        from jepa_fast import ops

        check_keep(keep, keep_mask)
        x = self._patches(images)
        if keep is not None and sequences is not None:
            x = ops.gather_packed(x.flatten(0, 1), keep)
        elif keep is not None:
            x = ops.gather_patches(x, keep)
        for block in self.blocks:
            x = block(x, keep_mask, sequences=sequences)
        return self.norm(x)

    def _patches(self, images: Tensor) -> Tensor:
        """``[B, N, embed_dim]``, positions added."""
        check_images(images)
        if not images.is_floating_point():
            raise TypeError(
                f"images: expected a floating dtype, got {images.dtype}; convert and normalise "
                "them, for instance (images / 255 - mean) / std"
            )
        weight = self.patch_embed.proj.weight
        if images.ndim != 4:
            raise ValueError(f"images: expected [B, C, H, W], got shape {tuple(images.shape)}")
        if images.shape[1] != weight.shape[1]:
            raise ValueError(
                f"images: expected {weight.shape[1]} channels, [B, {weight.shape[1]}, H, W], got "
                f"shape {tuple(images.shape)}; repeat a grey one, images.expand(-1, 3, -1, -1), or "
                "build the encoder with in_channels"
            )
        if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
            raise TypeError(
                f"images: expected {weight.dtype}, as the encoder's weights are, got "
                f"{images.dtype}; convert them, images.to({weight.dtype}), or call the model under "
                "torch.autocast"
            )
        # A buffer stays as wide as it is where FSDP narrows the weights for a forward pass.
        return self.patch_embed(images) + self._positions(images).to(weight.dtype)

    def _grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = size
        patch_height, patch_width = self.patch_size
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"image size: expected a multiple of the patch size {self.patch_size}, got {size}; "
                "resize or crop the images, or choose another patch size"
            )
        return height // patch_height, width // patch_width

    def _positions(self, images: Tensor) -> Tensor:
        size = (images.shape[2], images.shape[3])
        if size == self.img_size:
            return self.pos_embed
        if not self.interpolate_positions:
            raise ValueError(
                f"images: expected {self.img_size} pixels (height, width), got {size}; resize "
                "them: masks are of one grid, so a model trains at one size. For encode() alone, "
                "encoders of create_encoder(..., interpolate_positions=True) take other sizes"
            )
        return interpolate_position_embedding(self.pos_embed, self.grid, self._grid_of(size))


VIT_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
}
"""Widths, depths and heads of the ViTs of arXiv 2301.08243."""


def create_encoder(
    name: str, img_size: int | tuple[int, int] = 224, **overrides: Any
) -> VisionTransformer:
    """Build a :class:`VisionTransformer` by name.

    Args:
        name: ``vit_{tiny,small,base,large,huge,giant}_patch<side>``, for instance
            ``vit_base_patch16``.
        img_size: side of the square image, or (height, width).
        **overrides: any other argument of :class:`VisionTransformer`, over the named size's own.

    Raises:
        ValueError: the name is not of that form, or the sizes do not fit.
    """
    match = re.fullmatch(r"vit_([a-z]+)_patch([1-9]\d*)", name)
    if match is None or match[1] not in VIT_SIZES:
        raise ValueError(
            f"encoder name: expected vit_<size>_patch<side> with a size of {', '.join(VIT_SIZES)}, "
            f"got {name!r}; for instance 'vit_base_patch16', or for timm's models a module: "
            "jepa_fast.interop.TimmEncoder(timm.create_model(name))"
        )
    options = {"patch_size": int(match[2]), **VIT_SIZES[match[1]], **overrides}
    return VisionTransformer(img_size, **options)
