"""transformers: the weights of ``IJepaModel`` both ways, and vision models as encoders."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jepa_fast.errors import CheckpointError
from jepa_fast.interop.checkpoints import load_parts
from jepa_fast.nn.vit import VisionTransformer, check_keep, pair

if TYPE_CHECKING:
    from transformers import IJepaModel, PreTrainedModel

# Our name -> theirs in transformers 5; below, what differs in transformers 4 and the hub's files.
_NAMES_5 = {
    r"patch_embed\.proj\.(.*)": r"embeddings.patch_embeddings.projection.\1",
    r"pos_embed": r"embeddings.position_embeddings",
    r"blocks\.(\d+)\.norm1\.(.*)": r"layers.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.attn\.([qkv])\.(.*)": r"layers.\1.attention.\2_proj.\3",
    r"blocks\.(\d+)\.attn\.proj\.(.*)": r"layers.\1.attention.o_proj.\2",
    r"blocks\.(\d+)\.norm2\.(.*)": r"layers.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.mlp\.(fc[12])\.(.*)": r"layers.\1.mlp.\2.\3",
    r"norm\.(.*)": r"layernorm.\1",
}
_LAYER_4 = {
    "layers.": "encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}

# Families whose positions are added by `embeddings` and whose layers treat tokens as a set, so
# that dropping tokens after `embeddings` is the same as masking the image.
SUBSET_FAMILIES = ("deit", "dinov2", "dinov2_with_registers", "ijepa", "vit", "vit_msn")


def from_transformers(
    model: IJepaModel, *, interpolate_positions: bool = False
) -> VisionTransformer:
    """Our encoder with the weights of a ``transformers.IJepaModel``.

    Args:
        model: for instance ``IJepaModel.from_pretrained(path)``. Copied, not shared.
        interpolate_positions: as in :class:`~jepa_fast.nn.vit.VisionTransformer`.

    Returns:
        An encoder whose tokens equal the model's ``last_hidden_state``.

    Raises:
        CheckpointError: the model has something that our encoder has not; names it.
    """
    config = model.config
    if config.hidden_act != "gelu" or not config.qkv_bias:
        raise CheckpointError(
            f"model: expected exact GELU and qkv biases, got hidden_act={config.hidden_act!r} and "
            f"qkv_bias={config.qkv_bias}; use TransformersEncoder(model) instead"
        )
    with torch.device("meta"):
        encoder = VisionTransformer(
            img_size=_sides(config.image_size, "image_size"),
            patch_size=_sides(config.patch_size, "patch_size"),
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            eps=config.layer_norm_eps,
            interpolate_positions=interpolate_positions,
            in_channels=config.num_channels,
        )
    try:
        load_transformers_state(encoder, model.state_dict())
    except CheckpointError as error:  # class and register tokens
        raise CheckpointError(
            f"{error}\nTransformersEncoder(model) takes the model as it is"
        ) from None
    return encoder


def load_transformers_state(encoder: VisionTransformer, state: Mapping[str, Tensor]) -> None:
    """Load the state dict of an ``IJepaModel`` into our encoder, whole or not at all.

    Args:
        encoder: of the same sizes, number of heads and LayerNorm epsilon. The last two leave no
            trace in a state dict, so wrong ones go unnoticed; :func:`from_transformers` reads them
            from the model's configuration.
        state: names as in transformers 4, 5 or the files on the hub, with or without ``ijepa.``.
            A classifier and a pooler are left behind.

    Raises:
        CheckpointError: anything missing, unexpected or of another shape; lists all of it, in our
            names where they are known.
    """
    theirs = {
        name.removeprefix("ijepa."): value.clone()
        for name, value in state.items()
        if not name.removeprefix("ijepa.").startswith(("classifier.", "pooler."))
    }
    rename = _names_of(theirs)
    ours = {}
    for name in encoder.state_dict():
        if ".attn.qkv." in name:
            split = [rename(name.replace(".qkv.", f".{part}.")) for part in "qkv"]
            if all(part in theirs for part in split):
                ours[name] = torch.cat([theirs.pop(part) for part in split])
        elif rename(name) in theirs:
            ours[name] = theirs.pop(rename(name))
    load_parts({"encoder": encoder}, {"encoder": {**ours, **theirs}})


def to_transformers(encoder: VisionTransformer, model: IJepaModel) -> None:
    """Load our encoder's weights into a ``transformers.IJepaModel``.

    Args:
        encoder: its weights are copied.
        model: of the same sizes and number of heads, with exact GELU. Its LayerNorms and its
            configuration take the encoder's epsilon (``IJepaConfig`` has another by default), so
            that its ``last_hidden_state`` equals the encoder's tokens.

    Raises:
        CheckpointError: the model computes something else, or anything is missing, unexpected or of
            another shape; lists all of it, and leaves the model as it was.
    """
    config = model.config
    if config.num_attention_heads != encoder.num_heads or config.hidden_act != "gelu":
        raise CheckpointError(
            f"model: expected num_attention_heads={encoder.num_heads} and hidden_act='gelu' as in "
            f"the encoder, got num_attention_heads={config.num_attention_heads} and "
            f"hidden_act={config.hidden_act!r}; build the model with the encoder's values"
        )
    rename = _names_of(model.state_dict())
    theirs = {}
    for name, value in encoder.state_dict().items():
        if ".attn.qkv." in name:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                theirs[rename(name.replace(".qkv.", f".{part}."))] = chunk
        else:
            theirs[rename(name)] = value
    load_parts({"model": model}, {"model": theirs})
    config.layer_norm_eps = encoder.norm.eps
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = encoder.norm.eps


class TransformersEncoder(nn.Module):
    """A transformers vision model as an encoder (:class:`~jepa_fast.nn.vit.Encoder`).

    Whole images work with any model whose ``last_hidden_state`` is ``[B, prefix + N, D]`` or
    ``[B, D, H, W]``; class and register tokens take part, but are not returned. Encoding a subset
    of patches (``keep``) works for the families in ``SUBSET_FAMILIES``.

    Args:
        model: kept, and trained with us where its parameters require gradients; its pooler and mask
            token, which no token depends on, stop requiring them.

    Raises:
        TypeError: the configuration lacks the sizes that an encoder needs, or the model has a head
            on top, as those for classification have.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        config = getattr(model.config, "vision_config", model.config)
        sizes: dict[str, Any] = {
            name: getattr(config, name, None)
            for name in ("hidden_size", "image_size", "patch_size", "num_attention_heads")
        }
        missing = [name for name, value in sizes.items() if value is None]
        if missing:
            raise TypeError(
                f"model: expected a vision transformer, got {type(model).__name__} whose "
                f"configuration lacks {', '.join(missing)}; write a small module that follows "
                "jepa_fast.nn.vit.Encoder around it"
            )
        if "For" in type(model).__name__:  # transformers' name for a model with a head
            bare = "" if model.base_model is model else f", model.{model.base_model_prefix}"
            raise TypeError(
                f"model: expected a model whose output is its tokens, last_hidden_state, got "
                f"{type(model).__name__}; pass the one inside{bare}"
            )
        self.model: Any = model
        # Tokens of unmasked images never use these; distributed training refuses to wait for them.
        embeddings = getattr(model, "embeddings", None)
        for unused in (getattr(model, "pooler", None), getattr(embeddings, "mask_token", None)):
            if unused is not None:
                unused.requires_grad_(False)
        height, width = _sides(sizes["image_size"], "image_size")
        patch_height, patch_width = _sides(sizes["patch_size"], "patch_size")
        self.img_size = (height, width)
        self.grid = (height // patch_height, width // patch_width)
        self.embed_dim: int = sizes["hidden_size"]
        self.num_heads: int = sizes["num_attention_heads"]

    def forward(
        self, images: Tensor, keep: Tensor | None = None, keep_mask: Tensor | None = None
    ) -> Tensor:
        """Tokens ``[B, N or K, D]``, see :class:`~jepa_fast.nn.vit.Encoder`.

        Raises:
            ValueError: images of another size than the model's ``image_size``, ``keep`` or
                ``keep_mask`` where the model cannot honour it, or a model that gives less than a
                token a patch (Swin merges patches, ViTMAE drops most of them).
        """
        check_keep(keep, keep_mask)
        # Where a model takes any size, its patches would be mistaken for class tokens, or these
        # for patches.
        size = tuple(images.shape[-2:])
        if size != self.img_size:
            raise ValueError(
                f"images: expected {self.img_size} pixels (height, width), the model's image_size, "
                f"got {size}; resize the images, or, of a model that takes any size, as DINOv2 and "
                "DINOv3 do, set model.config.image_size before it is wrapped"
            )
        if keep is None:
            tokens = self.model(pixel_values=images).last_hidden_state
            if tokens.ndim == 4:
                tokens = tokens.flatten(2).transpose(1, 2)
            prefix = tokens.shape[1] - self.grid[0] * self.grid[1]
            if prefix < 0:
                raise ValueError(
                    f"model: expected a token for each of {self.grid} patches, got "
                    f"{tokens.shape[1]} from {type(self.model).__name__}; write a small module "
                    "that follows jepa_fast.nn.vit.Encoder around it"
                )
            return tokens[:, prefix:]
        family = self.model.config.model_type
        if family not in SUBSET_FAMILIES:
            raise ValueError(
                f"keep: expected a model of a family that can encode a subset of patches "
                f"({', '.join(SUBSET_FAMILIES)}), got {family!r}; use one of these, encode whole "
                "images, or write a module that follows jepa_fast.nn.vit.Encoder"
            )
        return self._encode_subset(images, keep, keep_mask)

    def _encode_subset(self, images: Tensor, keep: Tensor, keep_mask: Tensor | None) -> Tensor:
        from jepa_fast import ops

        patches = self.grid[0] * self.grid[1]

        def select(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
            prefix = tokens.shape[1] - patches
            kept = ops.gather_patches(tokens[:, prefix:], keep)
            return torch.cat([tokens[:, :prefix], kept], 1)

        options = {}
        if keep_mask is not None:
            if "attention_mask" not in inspect.signature(self.model.forward).parameters:
                raise ValueError(
                    f"keep_mask: expected a model that takes an attention mask, got "
                    f"{type(self.model).__name__} of an older transformers; install transformers>=5"
                )
            count = self._prefix_tokens()
            options["attention_mask"] = torch.cat(
                [keep_mask.new_ones(keep_mask.shape[0], count), keep_mask], 1
            )
        handle = self.model.embeddings.register_forward_hook(select)
        try:
            tokens = self.model(pixel_values=images, **options).last_hidden_state
        finally:
            handle.remove()
        return tokens[:, tokens.shape[1] - keep.shape[1] :]

    def _prefix_tokens(self) -> int:
        names = ("cls_token", "distillation_token", "register_tokens")
        tokens = [getattr(self.model.embeddings, name, None) for name in names]
        return sum(token.shape[1] for token in tokens if token is not None)


def _names_of(state: Mapping[str, Any]) -> Any:
    """Function from our parameter names to those that ``state`` uses."""
    version_4 = any(name.startswith("encoder.layer.") for name in state)

    def rename(name: str) -> str:
        for ours, theirs in _NAMES_5.items():
            match = re.fullmatch(ours, name)
            if match is not None:
                name = match.expand(theirs)
                break
        if version_4 and name.startswith("layers."):
            for new, old in _LAYER_4.items():
                name = name.replace(new, old)
        return name

    return rename


def _sides(value: Any, name: str) -> tuple[int, int]:
    return pair(value if isinstance(value, int) else tuple(value), name)
