"""TC-JEPA: I-JEPA whose predictor reads the image's captions (arXiv 2605.03245)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jepa_fast import ops
from jepa_fast._arguments import check_choice, check_number
from jepa_fast.masks import BlockMasks, PackedMasks
from jepa_fast.models.collapse import collapse_metrics
from jepa_fast.models.ijepa import (
    IJepa,
    Masks,
    block_major_mask,
    check_patch_count,
    gather_targets,
    target_mask,
)
from jepa_fast.models.output import JepaOutput
from jepa_fast.nn.precision import without_autocast
from jepa_fast.nn.text_conditioner import (
    CONDITIONERS,
    Captions,
    WordConditioner,
    WordConditioning,
    check_word_options,
)
from jepa_fast.nn.vit import check_images, encode_patches
from jepa_fast.ranges import phase

_DIAGNOSED_IMAGES = 8  # attention statistics are taken from the first images of a batch
_OPTIONS = {  # by the names that the text conditioner has for them
    "dim": "predictor_dim",
    "num_heads": "text_heads",
    "scale": "text_scale",
    "mlp_ratio": "text_mlp_ratio",
    "mlp_residual": "text_mlp_residual",
    "after": "text_layers",
}


class TCJepa(IJepa):
    """I-JEPA with a text conditioner after every block of the predictor, or after chosen ones.

    The loss is ``mean_p ||prediction - target||_2 + sparsity_weight * L_sparse +
    consistency_weight * L_consistency`` with the similarities ``O_n^l[p, w] = relu(cos(Q[p],
    K_n[w]))`` of token p and word w of caption n in layer l::

        L_sparse      = mean_{n,p,l} sum_w O
        L_consistency = mean_{n,p,l} sum_w |O^l - mean_l O^l|

    Args:
        encoder, img_size, predictor_dim, predictor_depth, predictor_heads, init: as in
            :class:`~jepa_fast.models.ijepa.IJepa`.
        text_dim: width of the word vectors (1024: T5-large).
        conditioning: ``"words"`` for TC-JEPA, or a caption-level baseline: ``"mean_words"`` (tokens
            attend to captions, each the mean of its words), ``"adaln"``, ``"feature"`` (both by the
            mean caption) or ``"append"`` (all words join the predictor's sequences).
        text_heads: heads of the text attention; this and the next eight, up to the regularisers'
            weights, are for ``"words"`` and ``"mean_words"``, see
            :class:`~jepa_fast.nn.text_conditioner.WordConditioner`.
        text_scale: of its scores; None: one over the square root of a head's width. The paper's
            formula as written has 1.
        pool: over captions: ``"max"``, ``"mean"`` or ``"attention"``.
        per_caption: MLP and LayerNorm once a caption, before the pool, instead of after it.
        text_mlp_ratio: hidden width of the conditioner's MLP over ``predictor_dim``.
        text_mlp_residual: add the MLP's input to its output before the LayerNorm.
        similarity: ``"relu"``, or ``"softplus"`` for ``O = softplus(cos / tau)``, which still has a
            gradient once all cosines are negative.
        tau: positive.
        text_layers: the predictor blocks that text attention follows, from 0; None: all.
        sparsity_weight, consistency_weight: of the regularisers.
        loss: prediction loss; ``"l2_norm"`` is the paper's, others as in ``IJepa``.
        normalize_target: LayerNorm on the teacher's tokens (the paper does not say).

    With FSDP2, ``encoder``, ``target_encoder``, ``predictor``, their blocks and the conditioner's
    ``layers`` can be units of their own beside the whole model. All of ``conditioner`` cannot: it
    works between the predictor's blocks.

    Raises:
        TypeError, ValueError: as ``IJepa``; an option of the wrong type, an unknown name, a number
            out of range, or sizes that do not fit.
    """

    def __init__(
        self,
        encoder: str | nn.Module = "vit_base_patch16",
        *,
        img_size: int | tuple[int, int] = 224,
        predictor_dim: int = 384,
        predictor_depth: int | None = None,
        predictor_heads: int | None = None,
        text_dim: int = 1024,
        conditioning: str = "words",
        text_heads: int = 1,
        text_scale: float | None = None,
        pool: str = "max",
        per_caption: bool = False,
        text_mlp_ratio: float = 4.0,
        text_mlp_residual: bool = False,
        similarity: str = "relu",
        tau: float = 0.1,
        text_layers: Sequence[int] | None = None,
        sparsity_weight: float = 0.1,
        consistency_weight: float = 0.5,
        loss: str = "l2_norm",
        normalize_target: bool = True,
        init: str = "released",
    ) -> None:
        check_choice("conditioning", conditioning, CONDITIONERS)
        super().__init__(
            encoder,
            img_size=img_size,
            predictor_dim=predictor_dim,
            predictor_depth=predictor_depth,
            predictor_heads=predictor_heads,
            loss=loss,
            normalize_target=normalize_target,
            init=init,
        )
        _check_weights(sparsity_weight, consistency_weight)
        options: dict[str, Any] = {}
        if issubclass(CONDITIONERS[conditioning], WordConditioner):
            options = {
                "num_heads": text_heads,
                "scale": text_scale,
                "pool": pool,
                "per_caption": per_caption,
                "mlp_ratio": text_mlp_ratio,
                "mlp_residual": text_mlp_residual,
                "similarity": similarity,
                "tau": tau,
                "after": text_layers,
            }
            check_word_options(
                predictor_dim,
                len(self.predictor.predictor_blocks),
                text_dim,
                **options,
                called=_OPTIONS,
            )
        self.conditioner = CONDITIONERS[conditioning](
            predictor_dim, len(self.predictor.predictor_blocks), text_dim, **options
        )
        self.text_dim = text_dim
        self.sparsity_weight = sparsity_weight
        self.consistency_weight = consistency_weight

    def forward(  # type: ignore[override]
        self,
        images: Tensor,
        masks: Masks,
        words: Tensor,
        word_mask: Tensor | None = None,
        caption_mask: Tensor | None = None,
        word_scale: Tensor | None = None,
    ) -> JepaOutput:
        """One training step's loss.

        Args:
            images: ``[B, 3, H, W]``.
            masks: context and target blocks of every image, on the images' device.
            words: ``[B, C, S, text_dim]``, the words of C captions an image, in any floating dtype:
                they are cast to that of the conditioner's weights, or to autocast's.
            word_mask: ``[B, C, S]`` bool, False at padding; None: every word is there.
            caption_mask: ``[B, C]`` bool, False at padding; None: every caption is there. Images
                without captions are fine: their tokens go through the predictor without text.
            word_scale: ``[B, C, S]``, what words in float8 are multiplied by; both come from
                :func:`jepa_fast.nn.words.quantize_words`. None for words in other dtypes.

        Returns:
            Loss; prediction and target ``[M * B, Kt, D]``, block-major; metrics: collapse numbers,
            ``prediction_loss``, and with ``"words"`` or ``"mean_words"`` also ``sparsity``,
            ``consistency``, ``positive_cosine_share`` and ``attention_entropy`` (1: uniform).

        Raises:
            TypeError, ValueError: masks, images or captions that do not fit; an option that has
                been set to one that does not serve.
        """
        _check_weights(self.sparsity_weight, self.consistency_weight)  # schedules set them
        masks = self._masks_of(images, masks)
        captions = self._captions(images, words, word_mask, caption_mask, word_scale)
        teacher = self.encode(images)
        check_patch_count(teacher, masks)
        prediction, text = self._predict_with_text(images, masks, captions)
        with phase("loss"):
            loss = ops.latent_loss(
                prediction,
                teacher,
                masks.targets,
                kind=self.loss,
                normalize_target=self.normalize_target,
                target_mask=target_mask(masks),
            )
            metrics = {"prediction_loss": loss.detach()}
            if isinstance(text, WordConditioning):
                sparsity = text.sparsity()
                if self.consistency_weight == 0:
                    # A number to look at, not worth a backward pass.
                    with torch.no_grad():
                        consistency = text.consistency()
                else:
                    consistency = text.consistency()
                metrics |= {"sparsity": sparsity.detach(), "consistency": consistency.detach()}
                regularisers = (
                    self.sparsity_weight * sparsity + self.consistency_weight * consistency
                )
                loss = loss + _weight_of_pairs(masks, text.word_mask) * regularisers
        with phase("metrics"):
            if isinstance(text, WordConditioning):
                positive, entropy = text.statistics(_DIAGNOSED_IMAGES)
                metrics |= {"positive_cosine_share": positive, "attention_entropy": entropy}
            target = gather_targets(teacher, masks.targets, self.normalize_target)
            metrics |= collapse_metrics(prediction, target, block_major_mask(masks))
        return JepaOutput(loss, metrics, prediction.detach(), target)

    @torch.no_grad()
    def similarity_map(
        self,
        images: Tensor,
        masks: Masks | None,
        words: Tensor,
        word_mask: Tensor | None = None,
        caption_mask: Tensor | None = None,
        word_scale: Tensor | None = None,
    ) -> Tensor:
        """Which patches go with which words: the similarity O, averaged over layers and heads.

        Args:
            images: ``[B, 3, H, W]``; a few, this is for pictures.
            masks: None: the predictor gets all patches as context and predicts nothing. Otherwise
                as in :meth:`forward`: what it makes of context and masked patches, averaged over
                the sequences that a patch is in; zero for patches that are in none.
            words, word_mask, caption_mask, word_scale: as in :meth:`forward`.

        Returns:
            ``[B, C, N, S]`` float32 (float64 of a float64 model), zero at words that are not there.

        Raises:
            TypeError, ValueError: as :meth:`forward`; the conditioning is not ``"words"``.
        """
        check_images(images)
        batch, (height, width) = images.shape[0], self.encoder.grid
        patches = torch.arange(height * width, device=images.device)
        if masks is None:
            everything = patches.expand(batch, -1)
            masks = BlockMasks(everything, everything[:, None, :0], None, self.encoder.grid)
        masks = self._masks_of(images, masks)
        if isinstance(masks, PackedMasks):
            raise TypeError("masks: expected padded masks for a map, got PackedMasks")
        captions = self._captions(images, words, word_mask, caption_mask, word_scale)
        _, text = self._predict_with_text(images, masks, captions)
        if not isinstance(text, WordConditioning) or text.word_mask.shape != words.shape[:3]:
            raise ValueError("similarity_map: needs a model with conditioning='words'")

        blocks = masks.targets.shape[1]
        # Tokens of an image's sequences side by side, [B, C, M * T, S], and whose patch each is.
        of_tokens = text.similarity_map().unflatten(0, (blocks, batch))
        of_tokens = of_tokens.permute(1, 2, 0, 3, 4).flatten(2, 3)
        index = torch.cat([masks.context[:, None].expand(-1, blocks, -1), masks.targets], 2)
        member = index.flatten(1)[:, None] == patches[:, None]  # [B, N, M * T]
        if text.token_mask is not None:
            of_image = text.token_mask.unflatten(0, (blocks, batch)).transpose(0, 1)
            member = member & of_image.flatten(1)[:, None]
        share = member / member.sum(-1, keepdim=True).clamp_min(1)
        with without_autocast(of_tokens):
            return share[:, None].to(of_tokens.dtype) @ of_tokens

    def _captions(
        self,
        images: Tensor,
        words: Tensor,
        word_mask: Tensor | None,
        caption_mask: Tensor | None,
        word_scale: Tensor | None,
    ) -> Captions:
        return Captions.of(
            words,
            word_mask,
            caption_mask,
            images=images.shape[0],
            text_dim=self.text_dim,
            scale=word_scale,
            dtype=next(self.conditioner.parameters()).dtype,
        )

    def _predict_with_text(
        self,
        images: Tensor,
        masks: BlockMasks | PackedMasks,
        captions: Captions,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """The prediction, and the conditioning that went into it.

        ``slots``: ``[B, M, Kt]`` bool, of padded masks the target slots that are in a sequence;
        None: all.
        """
        if isinstance(masks, PackedMasks):
            return self._predict_packed_with_text(images, masks, captions)
        with phase("context encoder"):
            context = encode_patches(self.encoder, images, masks.context, masks.context_mask)
        with phase("text conditioner"):  # what depends on the words alone
            text = self.conditioner(captions, _token_mask(masks))

        def condition(layer: int, tokens: Tensor) -> Tensor:
            with phase("text conditioner"):
                return text(layer, tokens)

        with phase("predictor"):
            prediction = self.predictor(
                context,
                masks.context,
                masks.targets,
                masks.context_mask,
                slots,
                after_block=condition,
                appended=text.appended,
            )
            return prediction, text

    def _predict_packed_with_text(
        self, images: Tensor, masks: PackedMasks, captions: Captions
    ) -> tuple[Tensor, Any]:
        """The same of packed tokens; conditioners see them in slots, as sequences of one length."""
        sequences = self.predictor.sequences(masks)
        with phase("text conditioner"):
            text = self.conditioner(captions, sequences.filled)
        if text.appended is not None:  # to sequences of one length
            slots = masks.target_mask
            if slots is not None:  # images of other packs attend to all, as a softmax needs keys
                slots = slots | ~masks.members()[:, None, None]
            return self._predict_with_text(images, masks.padded(partly=True), captions, slots)
        context = self._packed_context(images, masks)

        def condition(layer: int, tokens: Tensor) -> Tensor:
            with phase("text conditioner"):
                return sequences.pack(text(layer, sequences.unpack(tokens)))

        with phase("predictor"):
            return self.predictor(context, masks, sequences, after_block=condition), text


def _check_weights(sparsity_weight: float, consistency_weight: float) -> None:
    check_number("sparsity_weight", sparsity_weight, zero=True)
    check_number("consistency_weight", consistency_weight, zero=True)


def _weight_of_pairs(masks: BlockMasks | PackedMasks, word_mask: Tensor) -> Tensor | float:
    """What a pack's mean over pairs of caption and token counts for among those of its batch."""
    if isinstance(masks, BlockMasks) or masks.target_mask is None:  # all of the batch
        return 1.0
    tokens = masks.lengths + masks.target_mask.sum(-1).amax()  # of a sequence
    return masks.reweighted(word_mask.any(2).sum(1) * tokens)


def _token_mask(masks: BlockMasks) -> Tensor | None:
    """Which predictor tokens are real, ``[M * B, Kc + Kt]`` bool, block-major; None: all."""
    if masks.context_mask is None:
        return None
    blocks, targets = masks.targets.shape[1:]
    return nn.functional.pad(masks.context_mask, (0, targets), value=True).repeat(blocks, 1)
