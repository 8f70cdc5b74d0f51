"""I-JEPA: predict the teacher's tokens of target blocks from a context block (arXiv 2301.08243)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast._arguments import check_choice, flag
from jepa_fast.masks import BlockMasks, PackedMasks
from jepa_fast.models.collapse import collapse_metrics
from jepa_fast.models.output import JepaOutput
from jepa_fast.nn.packed import Sequences
from jepa_fast.nn.predictor import VisionTransformerPredictor
from jepa_fast.nn.vit import (
    check_encoder,
    check_images,
    create_encoder,
    encode_packed,
    encode_patches,
)
from jepa_fast.ops.latent_loss import KINDS
from jepa_fast.optim.teachers import HasTeachers, copy_teacher_buffers, teacher_parameters
from jepa_fast.ranges import phase

Masks = BlockMasks | PackedMasks | tuple[Sequence[Tensor], Sequence[Tensor]]
"""Masks of a batch, padded or packed, or the pair (contexts, targets) of the mask collator."""


class IJepa(nn.Module):
    """Image encoder, its EMA teacher, and a predictor between them.

    Args:
        encoder: a name for :func:`~jepa_fast.nn.vit.create_encoder`, or a module that follows
            :class:`~jepa_fast.nn.vit.Encoder`.
        img_size: side of the images, or (height, width); only read where ``encoder`` is a name.
        predictor_dim: width of the predictor.
        predictor_depth: its blocks; None: 6 up to encoder width 768, 12 up to 1280, 16 above.
        predictor_heads: its attention heads; None: as many as the encoder has.
        loss: ``"smooth_l1"``, ``"l1"``, ``"l2"`` or ``"l2_norm"``, see
            :func:`~jepa_fast.ops.latent_loss`.
        normalize_target: LayerNorm (no affine, eps 1e-5) on the teacher's tokens.
        init: ``"released"``, ``"rescaled"`` or ``"fan_in"``, of the predictor and of an encoder
            given by name; see :func:`~jepa_fast.nn.initialisation.init_transformer`.

    Raises:
        TypeError: ``encoder`` is neither a name nor a module that follows the protocol; an option
            of the wrong type.
        ValueError: unknown names, or sizes that do not divide.
    """

    def __init__(
        self,
        encoder: str | nn.Module = "vit_base_patch16",
        *,
        img_size: int | tuple[int, int] = 224,
        predictor_dim: int = 384,
        predictor_depth: int | None = None,
        predictor_heads: int | None = None,
        loss: str = "smooth_l1",
        normalize_target: bool = True,
        init: str = "released",
    ) -> None:
        super().__init__()
        module: Any = (
            create_encoder(encoder, img_size, init=init) if isinstance(encoder, str) else encoder
        )
        check_encoder(module, num_heads=predictor_heads is None, keep=True)
        check_choice("loss", loss, KINDS)
        if predictor_depth is None:
            predictor_depth = default_predictor_depth(module.embed_dim)
        self.encoder = module
        self.target_encoder = make_teacher(module)
        self.predictor = VisionTransformerPredictor(
            grid=module.grid,
            embed_dim=module.embed_dim,
            predictor_dim=predictor_dim,
            depth=predictor_depth,
            num_heads=module.num_heads if predictor_heads is None else predictor_heads,
            init=init,
        )
        self.loss = loss
        self.normalize_target = flag("normalize_target", normalize_target)

    def forward(self, images: Tensor, masks: Masks) -> JepaOutput:
        """One training step's loss.

        Args:
            images: ``[B, 3, H, W]``.
            masks: context and target blocks of every image, on the images' device.

        Returns:
            Loss, collapse metrics, and prediction and target ``[M * B, Kt, D]``, block-major; of
            packed masks they have tokens that do not count, see :class:`JepaOutput`.

        Raises:
            ValueError: masks or images that do not fit each other or the encoder's grid.
        """
        from jepa_fast import ops

        masks = self._masks_of(images, masks)
        teacher = self.encode(images)
        check_patch_count(teacher, masks)
        prediction = self._predict(images, masks)
        with phase("loss"):
            loss = ops.latent_loss(
                prediction,
                teacher,
                masks.targets,
                kind=self.loss,
                normalize_target=self.normalize_target,
                target_mask=target_mask(masks),
            )
        with phase("metrics"):
            target = gather_targets(teacher, masks.targets, self.normalize_target)
            metrics = collapse_metrics(prediction, target, block_major_mask(masks))
        return JepaOutput(loss, metrics, prediction.detach(), target)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The teacher's tokens of whole images, ``[B, N, D]``, without gradient."""
        with phase("target encoder"):
            return self.target_encoder(images)

    @torch.no_grad()
    def update_target(self, momentum: float | Tensor) -> None:
        """Teacher = ``momentum * teacher + (1 - momentum) * encoder``; buffers are copied."""
        update_teachers(self, momentum)

    def teachers(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Every teacher, with the network whose moving average it is."""
        yield self.target_encoder, self.encoder

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimizer should see: encoder and predictor."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def train(self, mode: bool = True) -> IJepa:
        """Set the training mode; the teacher always stays in evaluation mode (no dropout)."""
        super().train(mode)
        self.target_encoder.eval()
        return self

    def _predict(self, images: Tensor, masks: BlockMasks | PackedMasks) -> Tensor:
        """What the predictor says of the target patches, [M * B, Kt, D], block-major."""
        if isinstance(masks, PackedMasks):
            context = self._packed_context(images, masks)
            with phase("predictor"):
                return self.predictor(context, masks, self.predictor.sequences(masks))
        with phase("context encoder"):
            context = encode_patches(self.encoder, images, masks.context, masks.context_mask)
        with phase("predictor"):
            return self.predictor(context, masks.context, masks.targets, masks.context_mask)

    def _packed_context(self, images: Tensor, masks: PackedMasks) -> Tensor:
        """The context encoder's tokens, [T, D]."""
        sequences = Sequences(masks.context_offsets, len(masks.context), masks.longest)
        with phase("context encoder"):
            return encode_packed(self.encoder, images, masks.context, sequences)

    def _masks_of(self, images: Tensor, masks: Masks) -> BlockMasks | PackedMasks:
        """The masks, which must be of so many images and of the encoder's grid."""
        check_images(images)
        if not isinstance(masks, PackedMasks):
            masks = BlockMasks.coerce(masks, self.encoder.grid)
        elif tuple(masks.grid) != tuple(self.encoder.grid):
            raise ValueError(
                f"masks: expected masks of a {self.encoder.grid} grid, got {masks.grid}; give the "
                "sampler the encoder's grid"
            )
        expected, got = images.shape[0], masks.targets.shape[0]
        if got != expected:
            raise ValueError(
                f"masks: expected {expected} images, as given, got {got}; pass images and masks of "
                "one batch"
            )
        if isinstance(masks, PackedMasks) and 0 in masks.targets.shape[:2]:
            # Slack would have no tokens to read, and nothing is to be predicted.
            return masks.padded(partly=True)
        return masks


def target_mask(masks: BlockMasks | PackedMasks) -> Tensor | None:
    """Which target slots count, [B, M, Kt] bool; None: all."""
    return masks.target_mask if isinstance(masks, PackedMasks) else None


def block_major_mask(masks: BlockMasks | PackedMasks) -> Tensor | None:
    """Which tokens of prediction and target count, [M * B, Kt] bool; None: all."""
    mask = target_mask(masks)
    return None if mask is None else mask.transpose(0, 1).flatten(0, 1)


def default_predictor_depth(embed_dim: int) -> int:
    """I-JEPA's predictor depth by encoder width: 6 (up to B), 12 (L, H), 16 (g)."""
    if embed_dim <= 768:
        return 6
    return 12 if embed_dim <= 1280 else 16


def make_teacher(encoder: nn.Module) -> Any:
    """A copy of ``encoder`` without gradients, in evaluation mode."""
    return copy.deepcopy(encoder).requires_grad_(False).eval()


@torch.no_grad()
def update_teachers(model: HasTeachers, momentum: float | Tensor) -> None:
    """EMA of parameters in place; buffers (of normalisation, say) are copied."""
    from jepa_fast import ops

    with phase("EMA of the target"):
        pairs = teacher_parameters(model)
        ops.ema_update_([mine for _, mine in pairs], [theirs for theirs, _ in pairs], momentum)
        copy_teacher_buffers(model)


def check_patch_count(teacher: Tensor, masks: BlockMasks | PackedMasks) -> None:
    """Refuse tokens ``[B, N, D]`` of images whose patches are not those that the masks count.

    Raises:
        ValueError: ``N`` is not the number of patches of the masks' grid.
    """
    height, width = masks.grid
    if teacher.shape[1] != height * width:
        raise ValueError(
            f"images: expected {height * width} patches, as the {height}x{width} grid of the masks "
            f"has, got {teacher.shape[1]}; train on images of the size the encoder was built for"
        )


@torch.no_grad()
def gather_targets(teacher: Tensor, target_index: Tensor, normalize: bool = True) -> Tensor:
    """What the predictor should have said, block-major.

    Args:
        teacher: ``[B, N, D]`` tokens of whole images.
        target_index: ``[B, M, Kt]`` patch indices.
        normalize: LayerNorm without affine over D, eps 1e-5.

    Returns:
        ``[M * B, Kt, D]`` in the teacher's dtype.
    """
    from jepa_fast import ops

    target = ops.gather_patches(teacher, target_index).transpose(0, 1).flatten(0, 1)
    return F.layer_norm(target, target.shape[-1:]) if normalize else target
