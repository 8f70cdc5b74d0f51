"""TI-JEPA: a text helps to tell what is hidden in an image (arXiv 2503.06380)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from jepa_fast._arguments import (
    captions_by_image,
    check_choice,
    check_count,
    check_number,
    flag,
    height_and_width,
    integer,
)
from jepa_fast.masks import BlockMasks, BlockMaskSampler, PackedMasks
from jepa_fast.models.collapse import collapse_metrics
from jepa_fast.models.cross_modal import CrossModal, Representation, energy_spread
from jepa_fast.models.ijepa import Masks, gather_targets, make_teacher, update_teachers
from jepa_fast.models.output import JepaOutput
from jepa_fast.models.vicreg import insured_loss
from jepa_fast.nn.crosser import CROSSER_SIZES, Crosser
from jepa_fast.nn.predictor import VisionTransformerPredictor
from jepa_fast.nn.vit import check_encoder, create_encoder, encode_patches
from jepa_fast.nn.words import (
    check_dense_words,
    check_word_mask,
    is_text_batch,
    outside_inference,
    word_vectors,
)
from jepa_fast.ops.latent_loss import KINDS
from jepa_fast.ranges import phase

Objective = Literal["masked_image", "cross_modal"]
Words = Tensor | Sequence[str | Sequence[str]]
"""Word vectors ``[B, S, Dt]`` or ``[B, C, S, Dt]``; with a text encoder also captions, for each
image a sequence of them or a plain string, its one caption."""

_FROZEN_ENCODERS = ("encoder", "text_encoder")


class TIJepa(nn.Module):
    """Frozen encoders of image and text, with a trained network, its EMA and a predictor on top.

    ``objective="masked_image"`` (the paper's): ``context_crosser`` lets the image tokens of the
    context read the text, ``predictor`` guesses the tokens of all target blocks as one sequence,
    and the target is what ``target_crosser`` makes of the whole image and the same text.

    ``objective="cross_modal"``: ``cross_modal`` encodes image and text each on its own and predicts
    one from the other, in both directions, see :class:`~jepa_fast.models.cross_modal.CrossModal`.

    Args:
        encoder: image encoder, a name for :func:`~jepa_fast.nn.vit.create_encoder` or a module that
            follows :class:`~jepa_fast.nn.vit.Encoder`, frozen in place. None: every call brings
            ``image_features``; ``image_dim`` and ``grid`` are then needed.
        text_dim: width ``Dt`` of the words.
        text_encoder: maps ``list[list[str]]`` to a :class:`~jepa_fast.data.text.TextBatch`, for
            instance :func:`~jepa_fast.interop.text.load_text_encoder`; frozen in place. Without
            one, words are given as tensors.
        objective: ``"masked_image"`` or ``"cross_modal"``.
        size: ``"small"`` (width 768, 4 blocks), ``"medium"`` (768, 6) or ``"large"`` (1024, 8).
        width: instead of the size's own.
        depth: instead of the size's own.
        num_heads: attention heads of those blocks (8 in the public code).
        block: masked image only: ``"self_cross"`` or ``"cross"``, see
            :class:`~jepa_fast.nn.crosser.Crosser`.
        encode_masked_image: masked image only: encode the context by itself, so that it has not
            seen the targets, instead of taking its tokens from the whole image's.
        representation: cross-modal only: ``"pooled"`` or ``"token"``.
        img_size: side of the images, or (height, width); only read where ``encoder`` is a name.
        image_dim: width of image features; only read without an encoder.
        grid: (H, W) patches of image features; only read without an encoder.
        predictor_dim: width of the predictor.
        predictor_depth: its blocks.
        predictor_heads: its attention heads.
        loss: ``"l1"`` (the paper), ``"smooth_l1"`` (the public code), ``"l2"`` or ``"l2_norm"``,
            see :func:`~jepa_fast.ops.latent_loss`. None: ``"l1"``, or cross-modal ``"l2"``.
        normalize_target: LayerNorm (no affine, eps 1e-5) on the target tokens.
        vicreg: weights of prediction loss, variance and covariance, for instance
            :data:`~jepa_fast.models.vicreg.VICREG_WEIGHTS`. None: the prediction loss alone.
        energy_pairs: masked image only: so many images of a batch are also tried with their
            neighbour's text, for the energy metrics, at a forward pass each; below 2: none.
        save_frozen: the frozen encoders are part of the state dict.
        init: of all but the image encoder, ``"released"``, ``"rescaled"`` or ``"fan_in"``, see
            :func:`~jepa_fast.nn.initialisation.init_transformer`.

    Raises:
        TypeError: ``encoder`` is neither a name nor a module that follows the protocol; an option
            of the wrong type.
        ValueError: unknown names, weights that are negative or not finite, or sizes that are
            missing, not positive, or do not divide.
    """

    def __init__(
        self,
        encoder: str | nn.Module | None = "vit_huge_patch14",
        *,
        text_dim: int = 768,
        text_encoder: Callable[[list[list[str]]], Any] | None = None,
        objective: str = "masked_image",
        size: str = "small",
        width: int | None = None,
        depth: int | None = None,
        num_heads: int = 8,
        block: str = "self_cross",
        encode_masked_image: bool = False,
        representation: str = "pooled",
        img_size: int | tuple[int, int] = 224,
        image_dim: int | None = None,
        grid: tuple[int, int] | None = None,
        predictor_dim: int = 384,
        predictor_depth: int = 12,
        predictor_heads: int = 12,
        loss: str | None = None,
        normalize_target: bool = True,
        vicreg: Sequence[float] | None = None,
        energy_pairs: int = 8,
        save_frozen: bool = False,
        init: str = "released",
    ) -> None:
        super().__init__()
        if loss is None:
            loss = "l1" if objective == "masked_image" else "l2"
        for name, value, choices in (
            ("objective", objective, get_args(Objective)),
            ("size", size, tuple(CROSSER_SIZES)),
            ("representation", representation, get_args(Representation)),
            ("loss", loss, KINDS),
        ):
            check_choice(name, value, choices)
        check_count("text_dim", text_dim)
        if text_encoder is not None and not callable(text_encoder):
            raise TypeError(
                f"text_encoder: expected a callable, got {type(text_encoder).__name__}; "
                "interop.text.load_text_encoder makes one"
            )
        if vicreg is not None:
            vicreg = _weights("vicreg", vicreg)
        module: Any = create_encoder(encoder, img_size) if isinstance(encoder, str) else encoder
        if module is not None:
            check_encoder(module, num_heads=False, keep=encode_masked_image)
            image_dim, grid = module.embed_dim, module.grid
        if image_dim is None or grid is None:
            raise ValueError(
                "encoder: expected a name or a module, got None; without an encoder pass "
                "image_dim= and grid= of the image features"
            )
        width = CROSSER_SIZES[size][0] if width is None else width
        depth = CROSSER_SIZES[size][1] if depth is None else depth
        self.encoder = module
        self.text_encoder = text_encoder
        self.objective = objective
        self.image_dim, self.text_dim, self.embed_dim = image_dim, text_dim, width
        self.grid = grid = height_and_width("grid", grid, least=1)
        self.encode_masked_image = flag("encode_masked_image", encode_masked_image)
        self.loss = loss
        self.normalize_target = flag("normalize_target", normalize_target)
        self.vicreg = vicreg
        self.energy_pairs = integer("energy_pairs", energy_pairs)
        if objective == "masked_image":
            self.context_crosser = Crosser(
                image_dim, text_dim, width, depth, num_heads, block, init=init
            )
            self.target_crosser = make_teacher(self.context_crosser)
            self.predictor = VisionTransformerPredictor(
                grid, width, predictor_dim, predictor_depth, predictor_heads, init=init
            )
        else:
            self.cross_modal = CrossModal(
                image_dim,
                text_dim,
                grid,
                width,
                depth,
                num_heads,
                representation,
                predictor_dim,
                predictor_depth,
                predictor_heads,
                self.loss,
                normalize_target,
                vicreg,
                init,
            )
        for frozen in self._frozen_encoders().values():
            frozen.requires_grad_(False).eval()
        if not save_frozen:
            self.register_state_dict_post_hook(_drop_frozen)
            self.register_load_state_dict_pre_hook(_keep_frozen)

    def forward(
        self,
        images: Tensor | None,
        masks: Masks | None,
        words: Words,
        word_mask: Tensor | None = None,
        caption_mask: Tensor | None = None,
        word_scale: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
    ) -> JepaOutput:
        """One training step's loss.

        Args:
            images: ``[B, 3, H, W]``; None if ``image_features`` are given.
            masks: context and target blocks of every image, best on the CPU: the size of a union of
                blocks depends on what is in them, which makes the host wait for a GPU. Compiled
                code does not wait, and predicts as many slots as a union could fill; the loss is
                the same. The cross-modal objective hides nothing and does not read them.
            words: ``[B, S, Dt]``, or ``[B, C, S, Dt]``, where an image's captions are taken as one
                text; captions if the model has a text encoder: for each image a sequence of them
                or a plain string, its one caption.
            word_mask: bool, of the shape of ``words`` without ``Dt``; False at padding. None with
                captions, as are the next two.
            caption_mask: ``[B, C]`` bool, False at padding.
            word_scale: of the shape of ``word_mask``, what words in float8 are multiplied by; both
                come from :func:`jepa_fast.nn.words.quantize_words`. None for words in other dtypes.
            image_features: ``[B, N, image_dim]`` the frozen encoder's tokens of whole images, where
                they have been computed before, floating.

        Returns:
            Loss, and as metrics ``prediction_loss``, those of collapse, for batches of at least two
            ``energy_matched``, ``energy_shuffled`` and the difference ``energy_spread``, and with
            ``vicreg`` ``variance`` and ``covariance``. Prediction and target are, for masked
            images, ``[B, U, width]``: the union of the image's target blocks in ascending order,
            from the start again where it leaves slots over, see
            :meth:`~jepa_fast.masks.BlockMasks.target_union`. Cross-modal they are the image's
            representation ``[B, 1 or N, width]`` as predicted from the text, while loss and metrics
            are of both directions.

        Raises:
            TypeError: captions without a text encoder, or None; a text encoder that gives no
                TextBatch; words or features that are not floating, words in float8 without a scale,
                masks that are not bool.
            ValueError: shapes that do not fit.
        """
        tokens, vectors, word_mask = self.frozen_inputs(
            images, words, word_mask, caption_mask, word_scale, image_features=image_features
        )
        _check_pairs(tokens, vectors)
        if self.objective == "cross_modal":
            return self.cross_modal(tokens, vectors, word_mask)
        if masks is None:
            raise ValueError("masks: expected masks for objective='masked_image', got None")

        with phase("masks"):
            view = self._hide(tokens, images, masks)
        prediction, teacher = self._predict(view, vectors, word_mask)
        with phase("loss"):
            loss, metrics = insured_loss(
                prediction,
                teacher,
                view.targets,
                view.target_mask,
                self.loss,
                self.normalize_target,
                self.vicreg,
            )
            loss = loss * view.weight
        with phase("metrics"):
            target = gather_targets(teacher, view.targets[:, None], self.normalize_target)
            metrics |= collapse_metrics(prediction, target, view.target_mask)
            pairs = min(self.energy_pairs, len(vectors))
            if pairs >= 2:
                with torch.no_grad():
                    metrics |= energy_spread(
                        view.mean(_energy(prediction, target, view.target_mask)[:pairs]),
                        view.mean(
                            self._pair_energy(
                                view.first(pairs),
                                vectors[:pairs].roll(1, 0),
                                None if word_mask is None else word_mask[:pairs].roll(1, 0),
                            )
                        ),
                    )
        return JepaOutput(loss, metrics, prediction.detach(), target)

    @torch.no_grad()
    def energy(
        self,
        images: Tensor | None,
        texts: Words,
        word_mask: Tensor | None = None,
        caption_mask: Tensor | None = None,
        word_scale: Tensor | None = None,
        *,
        masks: Masks | None = None,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Energy of every image with every text: the lower, the better they go together.

        It is ``||prediction - target||^2``, averaged over target tokens, and for the cross-modal
        objective over both directions. That objective takes one pass over the images and one over
        the texts; with masked images it is a pass over all images for each text.

        Args:
            images: ``[Bi, 3, H, W]``, or None with ``image_features``.
            texts: of ``Bt`` texts, what :meth:`forward` calls ``words``.
            word_mask: of these, as in :meth:`forward`, like ``caption_mask`` and ``word_scale``.
            masks: masked image only: those of the ``Bi`` images. None: the same for all, drawn by
                :class:`~jepa_fast.masks.BlockMaskSampler` with seed 0.
            image_features: as in :meth:`forward`.

        Returns:
            ``[Bi, Bt]`` float32, without gradient. Cross-modal, a text without words has infinite
            energy.

        Raises:
            TypeError, ValueError: as in :meth:`forward`.
        """
        tokens, vectors, word_mask = self.frozen_inputs(
            images, texts, word_mask, caption_mask, word_scale, image_features=image_features
        )
        if self.objective == "cross_modal":
            return self.cross_modal.energy(tokens, vectors, word_mask)
        count = len(tokens)
        if masks is None:
            # At least one patch a target block, whatever the grid; any context is better than none.
            low = max(0.15, 1 / (self.grid[0] * self.grid[1]))
            scale = (low, max(0.2, low))
            sampler = BlockMaskSampler(self.grid, target_scale=scale, min_context=1)
            masks = sampler(0, torch.zeros(count, dtype=torch.int64, device="cpu"))
        view = self._hide(tokens, images, masks)
        energies = tokens.new_zeros(count, len(vectors), dtype=torch.float32)
        for t, text in enumerate(vectors):
            mask = None if word_mask is None else word_mask[t].expand(count, -1)
            energies[:, t] = self._pair_energy(view, text.expand(count, -1, -1), mask)
        return energies

    @torch.no_grad()
    def encode(
        self,
        images: Tensor | None,
        words: Words | None = None,
        word_mask: Tensor | None = None,
        caption_mask: Tensor | None = None,
        word_scale: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """The EMA network's tokens of whole images, ``[B, N, width]``, without gradient.

        Args:
            images: as in :meth:`forward`, like all the others.
            words: None: no image has a text. The cross-modal objective's image tokens never read
                one.
        """
        tokens = self._image_tokens(images, image_features)
        if self.objective == "cross_modal":
            return self.cross_modal.encode(tokens)
        vectors = mask = None
        if words is not None:
            vectors, mask = self._words(words, word_mask, caption_mask, word_scale)
            _check_pairs(tokens, vectors)
        elif not (word_mask is None and caption_mask is None and word_scale is None):
            raise ValueError("words: expected those of the masks or scales given, got None")
        with phase("target crosser"):
            return self.target_crosser(tokens, vectors, mask)

    @torch.no_grad()
    def frozen_inputs(
        self,
        images: Tensor | None,
        words: Words,
        word_mask: Tensor | None = None,
        caption_mask: Tensor | None = None,
        word_scale: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the trained networks read: the frozen encoders' output, checked.

        Args:
            images: as in :meth:`forward`, like all the others.

        Returns:
            Image tokens ``[B, N, image_dim]`` and words ``[B, S, Dt]``, in the dtype of the trained
            weights, and the words' mask ``[B, S]`` or None.
        """
        tokens = self._image_tokens(images, image_features)
        return tokens, *self._words(words, word_mask, caption_mask, word_scale)

    @torch.no_grad()
    def update_target(self, momentum: float | Tensor) -> None:
        """EMA network = ``momentum`` * EMA network + (1 - ``momentum``) * trained network."""
        update_teachers(self, momentum)

    def teachers(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Every teacher, with the network whose moving average it is."""
        if self.objective == "cross_modal":
            yield from self.cross_modal.teachers()
        else:
            yield self.target_crosser, self.context_crosser

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimizer should see."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def train(self, mode: bool = True) -> TIJepa:
        """Set the training mode; whatever is not trained stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen_encoders().values():
            module.eval()
        if self.objective == "masked_image":
            self.target_crosser.eval()
        return self

    def _hide(self, tokens: Tensor, images: Tensor | None, masks: Masks) -> _HiddenImages:
        from jepa_fast import ops

        pack = None
        if isinstance(masks, PackedMasks):
            pack, masks = masks, masks.padded(partly=True)
        masks = BlockMasks.coerce(masks, self.grid)
        targets, target_mask = masks.target_union()
        weight: Tensor | float = 1.0
        if pack is not None:
            weight = pack.reweighted(target_mask.sum(1)).to(tokens.device)
            target_mask = target_mask & pack.members()[:, None]
        targets, target_mask = targets.to(tokens.device), target_mask.to(tokens.device)
        masks = masks.to(tokens.device)
        if len(masks.context) != len(tokens):
            raise ValueError(
                f"masks: expected {len(tokens)} images, as given, got {len(masks.context)}; pass "
                "images and masks of one batch"
            )
        if not self.encode_masked_image:
            context_tokens = ops.gather_patches(tokens, masks.context)
        elif images is None or self.encoder is None:
            raise ValueError(
                "images: expected images and an encoder with encode_masked_image=True, got None; "
                "image_features are of whole images, so the context has to be encoded here"
            )
        else:
            with torch.no_grad(), phase("frozen image encoder"):
                context_tokens = encode_patches(
                    self.encoder, images, masks.context, masks.context_mask
                )
            context_tokens = context_tokens.to(tokens.dtype)
        # Padding slots ask for the image's targets once more: no token attends to them and the loss
        # leaves them out, but whatever reads the predictions finds nothing made up among them.
        slot = torch.arange(targets.shape[1], device=targets.device)
        targets = targets.gather(1, slot % target_mask.sum(1, keepdim=True).clamp(min=1))
        return _HiddenImages(
            tokens, context_tokens, masks.context, masks.context_mask, targets, target_mask, weight
        )

    def _predict(
        self, view: _HiddenImages, words: Tensor, word_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Prediction ``[B, U, width]`` and the EMA crosser's tokens ``[B, N, width]``."""
        with phase("context crosser"):
            context = self.context_crosser(view.context_tokens, words, word_mask, view.context_mask)
        with phase("predictor"):
            prediction = self.predictor(
                context,
                view.context,
                view.targets[:, None],
                view.context_mask,
                view.target_mask[:, None],
            )
        with torch.no_grad(), phase("target crosser"):
            return prediction, self.target_crosser(view.tokens, words, word_mask)

    def _pair_energy(self, view: _HiddenImages, words: Tensor, word_mask: Tensor | None) -> Tensor:
        """Energy of every image with its text, ``[B]`` float32."""
        prediction, teacher = self._predict(view, words, word_mask)
        target = gather_targets(teacher, view.targets[:, None], self.normalize_target)
        return _energy(prediction, target, view.target_mask)

    def _image_tokens(self, images: Tensor | None, features: Tensor | None) -> Tensor:
        """The frozen encoder's tokens of whole images, in the dtype of the trained weights."""
        if features is None:
            if images is None or self.encoder is None:
                raise ValueError(
                    f"{'images' if images is None else 'encoder'}: expected images and an encoder, "
                    "or image_features, got None"
                )
            with phase("frozen image encoder"):
                features = self.encoder(images)
        if not isinstance(features, Tensor):
            raise TypeError(
                f"image_features: expected a tensor, got {type(features).__name__}; stack them"
            )
        if not features.dtype.is_floating_point:
            raise TypeError(
                f"image_features: expected floating tokens, got {features.dtype}; an image encoder "
                "makes them"
            )
        expected = (self.grid[0] * self.grid[1], self.image_dim)
        if features.ndim != 3 or features.shape[1:] != expected:
            raise ValueError(
                f"image_features: expected [B, {expected[0]}, {expected[1]}] for a grid of "
                f"{self.grid[0]} x {self.grid[1]} patches, got {list(features.shape)}"
            )
        return outside_inference(features.to(self._weight().dtype))

    def _words(
        self,
        words: Words,
        word_mask: Tensor | None,
        caption_mask: Tensor | None,
        word_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, S, Dt]`` in the dtype of the trained weights, and ``[B, S]`` bool or None."""
        if isinstance(words, Tensor):
            vectors = words
        elif is_text_batch(words):
            raise TypeError(
                f"words: expected a tensor or captions, got {type(words).__name__}; pass its "
                ".words, .word_mask and .caption_mask"
            )
        elif self.text_encoder is None:
            raise TypeError(
                f"words: expected a tensor [B, S, {self.text_dim}], got {type(words).__name__}; "
                "build the model with text_encoder= to pass captions"
            )
        else:
            for name, given in (
                ("word_mask", word_mask),
                ("caption_mask", caption_mask),
                ("word_scale", word_scale),
            ):
                if given is not None:
                    raise ValueError(
                        f"{name}: expected None with captions, of which the text encoder makes "
                        "words and masks, got a tensor; leave captions out of the list instead"
                    )
            captions = captions_by_image("words", words)
            with phase("frozen text encoder"):
                text = self.text_encoder(captions)
                if not is_text_batch(text):
                    raise TypeError(
                        "text_encoder: expected a TextBatch (jepa_fast.data.TextBatch), got "
                        f"{type(text).__name__}; have it return TextBatch(words, word_mask, "
                        "caption_mask)"
                    )
                text = text.to(self._weight().device)
            vectors, word_mask, caption_mask = text.words, text.word_mask, text.caption_mask
        check_dense_words(vectors)
        if vectors.ndim not in (3, 4) or vectors.shape[-1] != self.text_dim:
            raise ValueError(
                f"words: expected [B, S, {self.text_dim}] or [B, C, S, {self.text_dim}], got "
                f"{list(vectors.shape)}; text_dim= sets the width"
            )
        vectors = word_vectors(vectors, word_scale, self._weight().dtype)
        check_word_mask("word_mask", word_mask, vectors.shape[:-1], vectors.device)
        check_word_mask("caption_mask", caption_mask, vectors.shape[:-2], vectors.device)
        if caption_mask is not None:
            real = caption_mask[..., None].expand(vectors.shape[:-1])
            word_mask = real if word_mask is None else word_mask & real
        if vectors.ndim == 4:
            vectors = vectors.flatten(1, 2)
            word_mask = None if word_mask is None else word_mask.flatten(1)
        vectors = outside_inference(vectors)
        if word_mask is not None:
            word_mask = outside_inference(word_mask)
            # Padding may hold anything, also what is not finite.
            vectors = vectors.masked_fill(~word_mask[..., None], 0)
        return vectors, word_mask

    def _weight(self) -> Tensor:
        """A trained parameter, for dtype and device."""
        masked = self.objective == "masked_image"
        return next((self.context_crosser if masked else self.cross_modal).parameters())

    def _frozen_encoders(self) -> dict[str, nn.Module]:
        modules = {name: getattr(self, name) for name in _FROZEN_ENCODERS}
        return {name: module for name, module in modules.items() if isinstance(module, nn.Module)}


def _weights(name: str, value: Any) -> tuple[float, ...]:
    """The weights of the three terms.

    Raises:
        TypeError: no numbers.
        ValueError: another number of them, or one that is negative or not finite.
    """
    try:
        weights = tuple(value)
    except TypeError:
        raise TypeError(
            f"{name}: expected 3 weights (prediction loss, variance, covariance), got {value!r}; "
            "VICREG_WEIGHTS are the usual ones"
        ) from None
    if len(weights) != 3:
        raise ValueError(
            f"{name}: expected 3 weights (prediction loss, variance, covariance), got "
            f"{len(weights)}; VICREG_WEIGHTS are the usual ones"
        )
    for i, weight in enumerate(weights):
        check_number(f"{name}[{i}]", weight, zero=True)
    return weights


def _check_pairs(tokens: Tensor, words: Tensor) -> None:
    """Raises ValueError unless there is a text for every image."""
    if len(words) != len(tokens):
        raise ValueError(f"words: expected {len(tokens)} texts, as images, got {len(words)}")


@dataclass
class _HiddenImages:
    """What the masked-image objective knows of a batch of images."""

    tokens: Tensor  # [B, N, D] of whole images
    context_tokens: Tensor  # [B, Kc, D]
    context: Tensor  # [B, Kc]
    context_mask: Tensor | None  # [B, Kc]
    targets: Tensor  # [B, U] union of the target blocks
    target_mask: Tensor  # [B, U]
    weight: Tensor | float  # of the mean over target tokens, where they are a part of a batch's

    def mean(self, energy: Tensor) -> Tensor:
        """Of the first images' energies, ``[<= B]``: over those that have targets."""
        return energy.sum() / self.target_mask[: len(energy)].any(1).sum().clamp(min=1)

    def first(self, count: int) -> _HiddenImages:
        """The first ``count`` images."""
        return _HiddenImages(
            self.tokens[:count],
            self.context_tokens[:count],
            self.context[:count],
            None if self.context_mask is None else self.context_mask[:count],
            self.targets[:count],
            self.target_mask[:count],
            self.weight,
        )


def _energy(prediction: Tensor, target: Tensor, target_mask: Tensor) -> Tensor:
    """Squared distance averaged over an image's target tokens, ``[B]`` float32."""
    distance = (prediction.float() - target.float()).square().sum(-1)
    return (distance * target_mask).sum(1) / target_mask.sum(1).clamp(min=1)


def _drop_frozen(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State dict hook: leave the frozen encoders out; they load from wherever they came."""
    frozen = tuple(f"{prefix}{name}." for name in _FROZEN_ENCODERS)
    for key in [key for key in state if key.startswith(frozen)]:
        del state[key]


def _keep_frozen(
    model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *strictness: Any
) -> None:
    """Load hook: a frozen encoder that the state dict does not hold stays as it is."""
    for name in _FROZEN_ENCODERS:
        module = getattr(model, name)
        if isinstance(module, nn.Module) and not any(
            k.startswith(f"{prefix}{name}.") for k in state
        ):
            state.update(module.state_dict(prefix=f"{prefix}{name}."))
