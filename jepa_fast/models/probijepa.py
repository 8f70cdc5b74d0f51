"""Probabilistic I-JEPA: the predictor gives a distribution over each target patch's embedding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jepa_fast.masks import BlockMasks, PackedMasks
from jepa_fast.models.collapse import collapse_metrics
from jepa_fast.models.ijepa import (
    IJepa,
    Masks,
    block_major_mask,
    check_patch_count,
    gather_targets,
)
from jepa_fast.models.output import JepaOutput
from jepa_fast.nn.heads import LatentDistribution, check_head_options, create_head
from jepa_fast.nn.precision import widened
from jepa_fast.ranges import phase


class ProbIJepa(IJepa):
    """I-JEPA whose predictor's tokens condition a density over the teacher's embeddings.

    The head reads the predictor's tokens after its last LayerNorm, at the predictor's width d. The
    projection to the encoder's width D, which ends I-JEPA's predictor, is left out: every head
    begins with a linear layer, and two in a row are one, at up to D / d times the cost.

    The targets are always LayerNorm-ed (no affine, eps 1e-5): without that, the teacher could raise
    the likelihood by shrinking.

    Args:
        encoder: as in `IJepa`.
        head: `"mixture"`, `"autoregressive"`, `"flow"`, `"flow_matching"` or `"diffusion"`; or a
            class, or any callable, that makes a head from (d, D, **head_options); or such a head
            itself. A head is a module with two methods, `forward(condition [T, d], target [T, D])`
            giving the loss, a scalar, and `distribution(condition)` giving an object with
            `log_prob(z)`, `sample(n, generator)`, `mean` and `variance`: see
            `jepa_fast.nn.heads.Head`.
        head_options: further arguments of the head.
        img_size, predictor_dim, predictor_depth, predictor_heads, init: as in `IJepa`.

    Raises:
        TypeError: `head` is none of these, takes other arguments, or lacks a method; options that
            are no mapping of names.
        ValueError: an unknown head or option, a head of other widths, options for a finished head,
            and as `IJepa`.
    """

    def __init__(
        self,
        encoder: str | nn.Module = "vit_base_patch16",
        head: str | nn.Module | Callable[..., nn.Module] = "mixture",
        *,
        head_options: Mapping[str, Any] | None = None,
        img_size: int | tuple[int, int] = 224,
        predictor_dim: int = 384,
        predictor_depth: int | None = None,
        predictor_heads: int | None = None,
        init: str = "released",
    ) -> None:
        super().__init__(
            encoder,
            img_size=img_size,
            predictor_dim=predictor_dim,
            predictor_depth=predictor_depth,
            predictor_heads=predictor_heads,
            init=init,
        )
        self.predictor.register_module("predictor_proj", nn.Identity())
        self.head = _make_head(head, predictor_dim, self.encoder.embed_dim, head_options)

    def forward(self, images: Tensor, masks: Masks) -> JepaOutput:
        """One training step's loss.

        Args:
            images: [B, 3, H, W].
            masks: context and target blocks of every image, on the images' device.

        Returns:
            The head's loss; collapse metrics; `prediction`, the tokens [M * B, Kt, d] that
            condition the head (most heads' means take sampling), at the predictor's width d; and
            `target` [M * B, Kt, D], at the encoder's width D, LayerNorm-ed, float32 or wider. Both
            are block-major; their widths differ, unlike in the other models' output.

        Raises:
            ValueError: masks or images that do not fit each other or the encoder's grid, or a head
                whose loss is not a scalar.
        """
        masks = self._masks_of(images, masks)
        target = self._targets(images, masks)
        condition = self._condition(images, masks)
        with phase("loss"):
            loss = self._loss(masks, condition, target)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"head: expected {type(self.head).__name__}.forward(condition, target) to give the "
                f"loss, a scalar, got {got}; return the mean over tokens, loss.mean()"
            )
        condition = condition.detach()
        with phase("metrics"):
            metrics = collapse_metrics(condition, target, block_major_mask(masks))
        return JepaOutput(loss, metrics, condition, target)

    def predict_distribution(self, images: Tensor, masks: Masks) -> LatentDistribution:
        """What the model believes of the embedding of every target patch.

        Args:
            images: [B, 3, H, W].
            masks: context and target blocks of every image, on the images' device.

        Returns:
            `log_prob(z)`, `sample(n)`, `mean`, `variance`, `entropy` and `cdf(z)` over the T tokens
            that count, block-major as `targets(images, masks)` gives them: M * B * Kt, and with
            packed masks those of `target_mask`, without left over slots and without images of other
            packs. It holds a graph unless called under `torch.no_grad()`.

        Raises:
            ValueError: masks that do not fit the images or the encoder's grid.
        """
        masks = self._masks_of(images, masks)
        return self.head.distribution(*counted_tokens(masks, self._condition(images, masks)))

    def targets(self, images: Tensor, masks: Masks) -> Tensor:
        """What `predict_distribution` predicts: LayerNorm-ed teacher tokens, [T, D]."""
        masks = self._masks_of(images, masks)
        return counted_tokens(masks, self._targets(images, masks))[0]

    def _loss(self, masks: BlockMasks | PackedMasks, condition: Tensor, target: Tensor) -> Any:
        """The head's, of the tokens that count: by a mask where it takes one and their number is
        not to be known, lest compiled code changed its shapes or the host waited for a GPU."""
        token_mask = block_major_mask(masks)
        unknown = condition.is_cuda or torch.compiler.is_compiling()
        if token_mask is None or not unknown or not getattr(self.head, "takes_token_mask", False):
            return self.head(*counted_tokens(masks, condition, target))
        return self.head(condition.flatten(0, 1), target.flatten(0, 1), token_mask.flatten())

    def _targets(self, images: Tensor, masks: BlockMasks | PackedMasks) -> Tensor:
        """[M * B, Kt, D], in float32 or wider."""
        teacher = widened(self.encode(images))
        check_patch_count(teacher, masks)
        with phase("targets"):
            return gather_targets(teacher, masks.targets)

    def _condition(self, images: Tensor, masks: BlockMasks | PackedMasks) -> Tensor:
        """[M * B, Kt, d]."""
        return self._predict(images, masks)


def counted_tokens(masks: BlockMasks | PackedMasks, *tokens: Tensor) -> list[Tensor]:
    """The tokens that count, [M * B, Kt, D] to [T, D]: all, but for slots that packing leaves over
    and images of other packs.
    """
    counts = block_major_mask(masks)
    return [x.flatten(0, 1) if counts is None else x[counts] for x in tokens]


def _make_head(
    head: str | nn.Module | Callable[..., nn.Module],
    condition_dim: int,
    target_dim: int,
    options: Mapping[str, Any] | None,
) -> Any:
    made: Any
    if not isinstance(head, str):  # of a name, `create_head` looks at them
        check_head_options(getattr(head, "__name__", type(head).__name__), options)
    if isinstance(head, str):
        made = create_head(head, condition_dim, target_dim, options)
    elif isinstance(head, nn.Module):
        if options:
            raise ValueError(
                f"head_options: expected none with a finished head, got {sorted(options)}; set "
                f"them on the {type(head).__name__}, or pass its class"
            )
        made = head
    elif callable(head):
        _check_signature(head, condition_dim, target_dim, options or {})
        made = head(condition_dim, target_dim, **(options or {}))
    else:
        raise TypeError(f"head must be a name, a class or a module, got {type(head).__name__}")
    if not (
        isinstance(made, nn.Module)
        and callable(getattr(made, "distribution", None))
        and getattr(made.forward, "__func__", None) is not nn.Module.forward  # which only raises
    ):
        raise TypeError(
            f"head must be a module with forward(condition, target) and distribution(condition), "
            f"got {type(made).__name__}; see jepa_fast.nn.heads.Head"
        )
    for name, expected in (("condition_dim", condition_dim), ("target_dim", target_dim)):
        if getattr(made, name, expected) != expected:
            raise ValueError(
                f"head: {name} must be {expected}, the width of the "
                f"{'predictor' if name == 'condition_dim' else 'encoder'}, "
                f"got {getattr(made, name)}"
            )
    return made


def _check_signature(
    head: Callable[..., nn.Module],
    condition_dim: int,
    target_dim: int,
    options: Mapping[str, Any],
) -> None:
    """Raises TypeError where a class or function cannot be called as one that makes heads."""
    try:
        signature = inspect.signature(head)
    except ValueError:  # of some callables written in C there is none
        return
    try:
        signature.bind(condition_dim, target_dim, **options)
    except TypeError as error:
        name = getattr(head, "__name__", type(head).__name__)
        raise TypeError(
            f"head: {name} is called as {name}(condition_dim, target_dim, **head_options), with "
            f"options {sorted(options)}, and takes {signature}: {error}"
        ) from None
