"""timm's ViTs as encoders, and their weights in ours where the architectures agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jepa_fast.errors import CheckpointError
from jepa_fast.interop.checkpoints import load_parts
from jepa_fast.nn.vit import VisionTransformer, check_keep

if TYPE_CHECKING:
    import timm


class TimmEncoder(nn.Module):
    """A timm ``VisionTransformer`` as an encoder (:class:`~jepa_fast.nn.vit.Encoder`).

    Class and register tokens take part, also when only some patches are encoded, but are not
    returned. The final LayerNorm is applied to every token, whether timm keeps it before or after
    pooling. The classifier and pooling are removed from ``model``.

    Args:
        model: ``timm.create_model(name, ...)``. Changed and kept, not copied.

    Raises:
        TypeError: ``model`` is not a timm ``VisionTransformer``, or drops patches itself.
    """

    def __init__(self, model: timm.models.VisionTransformer) -> None:
        super().__init__()
        from timm.models import VisionTransformer as TimmViT

        if not isinstance(model, TimmViT) or not isinstance(model.patch_drop, nn.Identity):
            raise TypeError(
                f"model: expected a timm VisionTransformer without patch dropout, got "
                f"{type(model).__name__}; write a small module that follows "
                "jepa_fast.nn.vit.Encoder around it"
            )
        model.reset_classifier(0, "")
        self.model: Any = model
        self.embed_dim: int = model.embed_dim
        self.grid: tuple[int, int] = tuple(model.patch_embed.grid_size)
        # Parallel blocks have no `attn`, or several.
        heads = (getattr(module, "num_heads", None) for module in model.blocks[0].modules())
        self.num_heads: int = next(number for number in heads if number is not None)

    def forward(
        self, images: Tensor, keep: Tensor | None = None, keep_mask: Tensor | None = None
    ) -> Tensor:
        """Tokens ``[B, N or K, D]``, see :class:`~jepa_fast.nn.vit.Encoder`."""
        from jepa_fast import ops

        check_keep(keep, keep_mask)
        model = self.model
        prefix = model.num_prefix_tokens
        x = model._pos_embed(model.patch_embed(images))
        attn_mask = None
        if keep is not None:
            x = torch.cat([x[:, :prefix], ops.gather_patches(x[:, prefix:], keep)], 1)
            if keep_mask is not None:
                mask = torch.cat([keep_mask.new_ones(keep_mask.shape[0], prefix), keep_mask], 1)
                attn_mask = mask[:, None, None, :]
        x = model.norm_pre(x)
        for block in model.blocks:
            x = block(x, attn_mask=attn_mask)
        return model.fc_norm(model.norm(x))[:, prefix:]


def from_timm(model: timm.models.VisionTransformer) -> VisionTransformer:
    """Our encoder with the weights of a timm ViT without class token (I-JEPA's ``_gap_`` models).

    Args:
        model: copied, not shared; its classifier is left behind.

    Returns:
        An encoder that gives the tokens of :class:`TimmEncoder`.

    Raises:
        CheckpointError: the model has something that our encoder has not; lists it.
    """
    from timm.models.vision_transformer import Block

    first: Any = model.blocks[0]
    plain = (
        isinstance(first, Block)
        and isinstance(first.norm1, nn.LayerNorm)
        and isinstance(first.mlp.act, nn.GELU)
        and first.mlp.act.approximate == "none"
    )
    if not plain:
        raise CheckpointError(
            f"model: expected pre-LN blocks with LayerNorm and exact GELU, got {first}; "
            "use TimmEncoder(model) instead"
        )
    with torch.device("meta"):
        encoder = VisionTransformer(
            img_size=tuple(model.patch_embed.img_size),
            patch_size=tuple(model.patch_embed.patch_size),
            embed_dim=model.embed_dim,
            depth=len(model.blocks),
            num_heads=first.attn.num_heads,
            mlp_ratio=first.mlp.fc1.out_features / model.embed_dim,
            eps=first.norm1.eps,
            in_channels=model.patch_embed.proj.in_channels,
        )
    state = {
        name.replace("fc_norm.", "norm."): value.clone()
        for name, value in model.state_dict().items()
        if not name.startswith(("head.", "attn_pool."))
    }
    try:
        load_parts({"encoder": encoder}, {"encoder": state})
    except CheckpointError as error:  # class and register tokens, layer scale
        raise CheckpointError(f"{error}\nTimmEncoder(model) takes the model as it is") from None
    return encoder
