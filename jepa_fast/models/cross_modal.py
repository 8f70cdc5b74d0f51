"""TI-JEPA's cross-modal objective: image and text, each encoded alone, predict each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast._arguments import check_choice, check_counts
from jepa_fast.models.collapse import collapse_metrics
from jepa_fast.models.ijepa import make_teacher, update_teachers
from jepa_fast.models.output import JepaOutput
from jepa_fast.models.vicreg import insured_loss
from jepa_fast.nn.cross_modal import CrossModalPredictor, ModalityEncoder, pairwise_energy, pool
from jepa_fast.nn.precision import widened
from jepa_fast.ranges import phase

Representation = Literal["pooled", "token"]

_DIRECTIONS = (("text", "image"), ("image", "text"))
_MAX_WORDS = 512


class _Tokens(NamedTuple):
    tokens: Tensor  # [B, K, width]
    mask: Tensor | None  # [B, K] bool


class CrossModal(nn.Module):
    """Encoders of both modalities, their EMA, and a predictor for each direction.

    With ``z = f(x)`` for the trained encoders and ``z' = f'(x)`` for their EMA, the energy of a
    pair in one direction is ``||g(z_source) - z'_goal||^2``, averaged over the goal's tokens;
    there are no negatives.

    Args:
        image_dim: width of the frozen image encoder's tokens.
        text_dim: width of the words.
        grid: (H, W) patches.
        width: of the representations.
        depth: blocks of each modality's encoder.
        num_heads: their attention heads.
        representation: ``"pooled"``, the mean token, or ``"token"``, every token (of at most 512
            words).
        predictor_dim: width of the predictors.
        predictor_depth: their blocks.
        predictor_heads: their attention heads.
        loss: see :func:`~jepa_fast.ops.latent_loss`; ``"l2"`` is the energy over the width.
        normalize_target: LayerNorm (no affine, eps 1e-5) on the targets.
        vicreg: see :func:`~jepa_fast.models.vicreg.insured_loss`.
        init: see :func:`~jepa_fast.nn.initialisation.init_transformer`.

    Raises:
        TypeError: a size that is no integer.
        ValueError: unknown names, or sizes that do not divide or are not positive.
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        grid: tuple[int, int],
        width: int,
        depth: int,
        num_heads: int,
        representation: str = "pooled",
        predictor_dim: int = 384,
        predictor_depth: int = 12,
        predictor_heads: int = 12,
        loss: str = "l2",
        normalize_target: bool = True,
        vicreg: Sequence[float] | None = None,
        init: str = "released",
    ) -> None:
        super().__init__()
        check_choice("representation", representation, get_args(Representation))
        check_counts(
            image_dim=image_dim,
            text_dim=text_dim,
            width=width,
            depth=depth,
            predictor_dim=predictor_dim,
            predictor_depth=predictor_depth,
        )
        self.representation = representation
        self.loss = loss
        self.normalize_target = normalize_target
        self.vicreg = vicreg
        self.context_encoder: Any = nn.ModuleDict(
            {
                "image": ModalityEncoder(image_dim, width, depth, num_heads, init),
                "text": ModalityEncoder(text_dim, width, depth, num_heads, init),
            }
        )
        self.target_encoder = make_teacher(self.context_encoder)
        grids = {"image": grid, "text": (1, _MAX_WORDS)} if representation == "token" else {}
        self.predictor = nn.ModuleDict(
            {
                f"{source}_to_{goal}": CrossModalPredictor(
                    width, grids.get(goal), predictor_dim, predictor_depth, predictor_heads, init
                )
                for source, goal in _DIRECTIONS
            }
        )

    def forward(self, image: Tensor, words: Tensor, word_mask: Tensor | None) -> JepaOutput:
        """One training step's loss, the mean of both directions.

        Args:
            image: ``[B, N, image_dim]`` tokens of whole images.
            words: ``[B, S, text_dim]``.
            word_mask: ``[B, S]`` bool, False at padding; pairs without any word do not count.

        Returns:
            See :meth:`jepa_fast.models.tijepa.TIJepa.forward`.
        """
        context = self._contexts(image, words, word_mask)
        with torch.no_grad():
            target = self._targets(image, words, word_mask)
        written = None if word_mask is None else word_mask.any(1)

        predictions = self._predictions(context, target)
        losses, parts, seen, wanted = [], [], [], []
        for goal, prediction in predictions.items():
            teacher, mask = target[goal]
            if goal == "image" and written is not None:
                mask = written[:, None].expand(teacher.shape[:2])
            slot = torch.arange(teacher.shape[1], device=teacher.device).expand(len(teacher), -1)
            with phase("loss"):
                loss, part = insured_loss(
                    prediction, teacher, slot, mask, self.loss, False, self.vicreg
                )
            losses.append(loss)
            parts.append(part)
            if mask is not None:  # padding repeats what is real
                slot = slot % mask.sum(1, keepdim=True).clamp(min=1)
            seen.append(prediction.detach().take_along_dim(slot[..., None], 1))
            wanted.append(teacher.take_along_dim(slot[..., None], 1))

        with phase("metrics"):
            metrics = {
                name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]
            }
            metrics |= collapse_metrics(
                torch.cat([tokens.flatten(0, 1) for tokens in seen]),
                torch.cat([tokens.flatten(0, 1) for tokens in wanted]),
            )
            if len(image) >= 2:
                with torch.no_grad():
                    metrics |= _energy_metrics(self._energy(predictions, target), written)
        return JepaOutput(torch.stack(losses).mean(), metrics, seen[0], wanted[0])

    @torch.no_grad()
    def energy(self, image: Tensor, words: Tensor, word_mask: Tensor | None) -> Tensor:
        """Energy of ``Bi`` images with ``Bt`` texts, ``[Bi, Bt]`` float32, the mean of both
        directions; infinite for a text without any word. Arguments as in :meth:`forward`.
        """
        context = self._contexts(image, words, word_mask)
        target = self._targets(image, words, word_mask)
        energy = self._energy(self._predictions(context, target), target)
        return energy if word_mask is None else energy.where(word_mask.any(1), torch.inf)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """The EMA encoder's image tokens ``[B, N, width]``."""
        with phase("target encoder"):
            return self.target_encoder["image"](image)

    @torch.no_grad()
    def update_target(self, momentum: float | Tensor) -> None:
        """Target = ``momentum * target + (1 - momentum) * context``."""
        update_teachers(self, momentum)

    def teachers(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Every teacher, with the network whose moving average it is."""
        yield self.target_encoder, self.context_encoder

    def train(self, mode: bool = True) -> CrossModal:
        """Set the training mode; the target encoder stays in evaluation mode."""
        super().train(mode)
        self.target_encoder.eval()
        return self

    def _represent(
        self, encoder: Any, image: Tensor, words: Tensor, word_mask: Tensor | None
    ) -> dict[str, _Tokens]:
        seen, read = encoder["image"](image), encoder["text"](words, word_mask)
        if self.representation == "token":
            return {"image": _Tokens(seen, None), "text": _Tokens(read, word_mask)}
        written = None if word_mask is None else word_mask.any(1, keepdim=True)
        return {"image": _Tokens(pool(seen), None), "text": _Tokens(pool(read, word_mask), written)}

    def _contexts(
        self, image: Tensor, words: Tensor, word_mask: Tensor | None
    ) -> dict[str, _Tokens]:
        with phase("context encoder"):
            return self._represent(self.context_encoder, image, words, word_mask)

    def _targets(
        self, image: Tensor, words: Tensor, word_mask: Tensor | None
    ) -> dict[str, _Tokens]:
        with phase("target encoder"):
            targets = self._represent(self.target_encoder, image, words, word_mask)
        if not self.normalize_target:
            return targets
        # As in latent_loss: under autocast half-precision targets would be rounded once more.
        return {
            name: _Tokens(F.layer_norm(widened(tokens), tokens.shape[-1:]), mask)
            for name, (tokens, mask) in targets.items()
        }

    def _predictions(
        self, context: dict[str, _Tokens], target: dict[str, _Tokens]
    ) -> dict[str, Tensor]:
        """By goal: its representation ``[B, K, width]`` as predicted from the other modality."""
        with phase("predictor"):
            return {
                goal: self.predictor[f"{source}_to_{goal}"](
                    *context[source], target[goal].tokens.shape[1]
                )
                for source, goal in _DIRECTIONS
            }

    def _energy(self, predictions: dict[str, Tensor], target: dict[str, _Tokens]) -> Tensor:
        """``[Bi, Bt]``."""
        to_image = pairwise_energy(predictions["image"], *target["image"])  # [Bt, Bi]
        to_text = pairwise_energy(predictions["text"], *target["text"])  # [Bi, Bt]
        return (to_image.T + to_text) / 2


def _energy_metrics(energy: Tensor, written: Tensor | None) -> dict[str, Tensor]:
    """Mean energy of matched and of all other pairs, and how far apart they are.

    Args:
        energy: ``[B, B]``.
        written: ``[B]`` bool, False for a text without words, which does not count.
    """
    counts = torch.ones_like(energy) if written is None else written.float().expand_as(energy)
    same = torch.eye(len(energy), dtype=torch.bool, device=energy.device)
    means = [
        (energy * counts).where(pairs, 0.0).sum() / counts.where(pairs, 0.0).sum().clamp(min=1)
        for pairs in (same, ~same)
    ]
    return energy_spread(*means)


def energy_spread(matched: Tensor, shuffled: Tensor) -> dict[str, Tensor]:
    """The metrics that tell whether pairs are told apart: the spread grows from zero."""
    return {
        "energy_matched": matched,
        "energy_shuffled": shuffled,
        "energy_spread": shuffled - matched,
    }
