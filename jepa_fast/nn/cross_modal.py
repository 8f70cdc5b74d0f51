"""Parts of TI-JEPA's cross-modal objective: an encoder for one modality, a predictor of another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jepa_fast.nn.attention import Block, check_heads
from jepa_fast.nn.constants import ConstantBuffers
from jepa_fast.nn.initialisation import init_mask_token, init_transformer
from jepa_fast.nn.linear import Linear
from jepa_fast.nn.position import sincos_position_embedding
from jepa_fast.nn.precision import without_autocast


class ModalityEncoder(nn.Module):
    """A transformer on top of a frozen encoder's tokens, which never sees the other modality.

    Args:
        in_dim: width of the frozen encoder's tokens.
        width: width inside and of the output.
        depth: number of pre-LN blocks.
        num_heads: attention heads; must divide ``width``.
        init: see :func:`~jepa_fast.nn.initialisation.init_transformer`.

    Raises:
        ValueError: sizes that do not divide, or an unknown ``init``.
    """

    def __init__(
        self, in_dim: int, width: int, depth: int, num_heads: int, init: str = "released"
    ) -> None:
        super().__init__()
        self.proj = Linear(in_dim, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        init_transformer(self, self.blocks, init)

    def forward(self, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Encode.

        Args:
            tokens: ``[B, T, in_dim]``.
            token_mask: ``[B, T]`` bool, False at padding: no other token attends to it, and its own
                output is unspecified but finite.

        Returns:
            ``[B, T, width]``.
        """
        if token_mask is not None:
            token_mask = _or_all(token_mask)
        x = self.proj(tokens)
        for block in self.blocks:
            x = block(x, token_mask)
        return self.norm(x)


class CrossModalPredictor(ConstantBuffers):
    """A narrow transformer over one modality's tokens and one query a token of the other.

    A query is a learned vector plus the position of the token that it asks for. No token attends to
    queries, so that the answer does not depend on what else is asked (padding, for instance).

    Args:
        embed_dim: width of the tokens, in and out.
        grid: ``(H, W)`` of the P tokens of the other modality, which have fixed embeddings of their
            positions there; None: there is one token to predict, which has no position.
        predictor_dim: width inside, a multiple of ``num_heads``.
        depth: number of pre-LN blocks.
        num_heads: attention heads.
        init: see :func:`~jepa_fast.nn.initialisation.init_transformer`.

    Raises:
        ValueError: sizes that do not divide, or an unknown ``init``.
    """

    positions: Tensor

    def __init__(
        self,
        embed_dim: int,
        grid: tuple[int, int] | None,
        predictor_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        init: str = "released",
    ) -> None:
        super().__init__()
        check_heads(num_heads, predictor_dim, "predictor_heads", "predictor_dim")
        self.predictor_embed = Linear(embed_dim, predictor_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_dim))
        self.grid = grid
        self.register_constants()
        self.predictor_blocks = nn.ModuleList(Block(predictor_dim, num_heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(predictor_dim, eps=1e-6)
        self.predictor_proj = Linear(predictor_dim, embed_dim)
        init_transformer(self, self.predictor_blocks, init)
        init_mask_token(self.mask_token)

    def constants(self) -> dict[str, Tensor]:
        width = self.mask_token.shape[-1]
        if self.grid is None:
            return {"positions": torch.zeros(1, width)}
        return {"positions": sincos_position_embedding(width, self.grid)}

    def forward(self, source: Tensor, source_mask: Tensor | None, count: int) -> Tensor:
        """Predict the first ``count`` tokens of the other modality.

        Args:
            source: ``[B, T, embed_dim]``.
            source_mask: ``[B, T]`` bool, False at padding.
            count: ``K``, at most ``P``.

        Returns:
            ``[B, K, embed_dim]``.

        Raises:
            ValueError: ``count`` is above ``P``.
        """
        batch, length = source.shape[:2]
        if count > len(self.positions):
            raise ValueError(
                f"words: expected at most {len(self.positions)} a text, got {count}; "
                "cut the captions"
            )
        x = self.predictor_embed(source)
        queries = (self.mask_token + self.positions[:count]).expand(batch, -1, -1)
        x = torch.cat([x, queries.to(x.dtype)], dim=1)
        if source_mask is None:
            source_mask = torch.ones(batch, length, dtype=torch.bool, device=x.device)
        asked = source_mask.new_zeros(batch, count)
        key_mask = torch.cat([_or_all(source_mask), asked], dim=1)
        *blocks, last = self.predictor_blocks
        for block in blocks:
            x = block(x, key_mask)
        x = last(x, key_mask, skip=length)  # nobody reads the source's tokens any more
        return self.predictor_proj(self.predictor_norm(x))


def _or_all(mask: Tensor) -> Tensor:
    """``[B, T]``; True throughout where nothing is: a softmax over nothing would be NaN."""
    return mask | ~mask.any(dim=1, keepdim=True)


def pool(tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Mean of the real tokens, ``[B, T, D]`` to ``[B, 1, D]``; zero where there is none."""
    if token_mask is None:
        return tokens.mean(dim=1, keepdim=True)
    total = tokens.where(token_mask[..., None], 0.0).sum(dim=1, keepdim=True)
    return total / token_mask.sum(dim=1).clamp(min=1)[:, None, None]


def pairwise_energy(prediction: Tensor, target: Tensor, target_mask: Tensor | None) -> Tensor:
    """Mean over tokens of the squared distance, for every prediction with every target.

    Args:
        prediction: ``[A, K, D]``.
        target: ``[B, K, D]``.
        target_mask: ``[B, K]`` bool, False where a target token does not count.

    Returns:
        ``[A, B]`` float32; ``[a, b]`` is the mean over real ``k`` of
        ``||prediction[a, k] - target[b, k]||^2``, 0 where no token is real.
    """
    # Written out with matrix products: the [A, B, K, D] differences would not fit. They must not
    # run in half precision, since the distances are differences of large numbers.
    with without_autocast(prediction):
        p, z = prediction.float(), target.float()
        # Distances do not change when both ends move. Near the origin their squares stay small.
        centre = z.detach().mean(0)  # [K, D]
        p, z = p - centre, z - centre
        weight = z.new_ones(z.shape[:2]) if target_mask is None else target_mask.float()
        weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)  # [B, K]
        weighted = z * weight[..., None]
        cross = p.flatten(1) @ weighted.flatten(1).T
        own = p.square().sum(-1) @ weight.T + (weighted * z).sum((1, 2))
        return (own - 2 * cross).clamp(min=0)
