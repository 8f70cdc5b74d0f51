"""Text conditioners of TC-JEPA's predictor (arXiv 2605.03245), and its caption-level baselines.

Sizes: B images, R = M * B rows of predictor tokens (block-major: row r belongs to image ``r % B``),
T tokens a row, C captions of S words, text width Dt, predictor width d.

Every conditioner is used in the same way. Once a forward pass, ``c = conditioner(captions)`` does
what depends on the words alone; after every predictor block, ``tokens = c(layer, tokens)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from jepa_fast import ops
from jepa_fast._arguments import check_choice, check_count, check_number, flag, integer
from jepa_fast.nn.attention import Mlp, check_heads
from jepa_fast.nn.initialisation import init_transformer
from jepa_fast.nn.linear import Linear
from jepa_fast.nn.per_caption import is_worthwhile, need_no_call, pool_per_caption
from jepa_fast.nn.ranks import share_of_batch
from jepa_fast.nn.words import (
    check_dense_words,
    check_word_mask,
    is_text_batch,
    outside_inference,
    word_vectors,
)
from jepa_fast.ops.text_cross_attention.api import SIMILARITIES

POOLS = ("max", "mean", "attention")
_LOOKED_AT = 2  # captions of an image, for numbers to look at


@dataclass(frozen=True)
class Captions:
    """The captions of a batch. Build it with :meth:`of`, which checks them.

    Attributes:
        words: ``[B, C, S, Dt]``, zero where there is no word.
        word_mask: ``[B, C, S]`` bool, True at every word of every caption that is there.
    """

    words: Tensor
    word_mask: Tensor

    @classmethod
    def of(
        cls,
        words: Tensor,
        word_mask: Tensor | None = None,
        caption_mask: Tensor | None = None,
        *,
        images: int,
        text_dim: int,
        scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Captions:
        """Captions from what a text encoder gives.

        Args:
            words: ``[B, C, S, Dt]`` floating, in any dtype; float8_e4m3fn with a scale.
            word_mask: ``[B, C, S]`` bool, False at padding; None: every word is there.
            caption_mask: ``[B, C]`` bool, False at padding; None: every caption is there.
            images, text_dim: B and Dt, which the words must have.
            scale: ``[B, C, S]``, what float8 words are multiplied by, as from
                :func:`jepa_fast.nn.words.quantize_words`; None for words in other dtypes.
            dtype: what reads the words, whose dtype they get. Under autocast they keep theirs, but
                for float8 words, which get autocast's, unless either is float64, which autocast
                leaves as it is. None: float8 becomes float32.

        Raises:
            TypeError: the words are no dense floating tensor, in float8 without a scale or have a
                scale in another dtype; or a mask is not bool.
            ValueError: a shape does not fit, or a mask is not on the words' device.
        """
        if not isinstance(words, Tensor):
            fix = "a text encoder makes it, see jepa_fast.interop"
            if is_text_batch(words):
                fix = "pass its .words, .word_mask and .caption_mask"
            raise TypeError(
                f"words: expected a tensor [{images}, C, S, {text_dim}], got "
                f"{type(words).__name__}; {fix}"
            )
        check_dense_words(words)
        fits = words.ndim == 4 and words.shape[0] == images and words.shape[3] == text_dim
        if not fits or 0 in words.shape[1:3]:
            fix = {
                2: "pooled texts are captions of one word: pass words[:, None, None]",
                3: "for one caption an image pass words[:, None]",
            }.get(words.ndim, "pad with masked ones, and give the model the text encoder's width")
            raise ValueError(
                f"words: expected [{images}, C, S, {text_dim}] (images, captions, words, text_dim) "
                f"with at least one caption and one word, got {list(words.shape)}; {fix}"
            )
        device = words.device.type
        # Autocast takes words in any dtype but float64, which it leaves alone, as it does weights.
        doubles = torch.float64 in (dtype, words.dtype)
        if device != "meta" and torch.is_autocast_enabled(device) and not doubles:
            dtype = None if scale is None else torch.get_autocast_dtype(device)
        words = word_vectors(words, scale, dtype)
        for name, mask, shape in (
            ("word_mask", word_mask, words.shape[:3]),
            ("caption_mask", caption_mask, words.shape[:2]),
        ):
            check_word_mask(name, mask, shape, words.device)
        if caption_mask is not None:
            there = caption_mask[..., None].expand(words.shape[:3])
            word_mask = there if word_mask is None else word_mask & there
        if word_mask is None:
            there = torch.ones(words.shape[:3], dtype=torch.bool, device=words.device)
            return cls(outside_inference(words), there)
        word_mask = outside_inference(word_mask)
        # Padding may hold anything, also what is not finite, which factors of 0 would not undo.
        return cls(words.masked_fill(~word_mask[..., None], 0), word_mask)

    def caption_vectors(self) -> tuple[Tensor, Tensor]:
        """The mean word of each caption ``[B, C, Dt]``, zero without words; ``[B, C]`` bool."""
        return _masked_mean(self.words, self.word_mask), self.word_mask.any(2)

    def image_vectors(self) -> Tensor:
        """The mean of each image's caption vectors, ``[B, Dt]``, zero without captions."""
        return _masked_mean(*self.caption_vectors())


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over S of ``x [..., S, D]`` where ``mask [..., S]``; zero where there is none."""
    wide = torch.promote_types(x.dtype, torch.float32)
    share = mask.to(wide) / mask.sum(-1, keepdim=True).clamp_min(1)
    return (share.to(x.dtype)[..., None, :] @ x)[..., 0, :]


class Conditioning:
    """What one forward pass does with the text. The base class does nothing.

    Attributes:
        appended: words to append to the predictor's sequences, ``[B, E, d]``, and which of them
            exist, ``[B, E]`` bool; or None.
    """

    appended: tuple[Tensor, Tensor] | None = None

    def __call__(self, layer: int, tokens: Tensor) -> Tensor:
        """Tokens ``[R, T, d]`` as predictor block ``layer`` left them, to those with text."""
        return tokens


class WordConditioner(nn.Module):
    """TC-JEPA's conditioner: every token attends to the words of each caption, then pools them.

    After predictor block l, for each caption n on its own::

        y_n = x + softmax(scale * Q K_n^T) V_n,    Q = W_Q x,  K_n = W_K t_n,  V_n = W_V t_n
        x   = LayerNorm(MLP(pool_n y_n))           or, with per_caption, pool_n LayerNorm(MLP(y_n))

    Without captions ``y = x`` takes the place of all y_n. The keys and values of all layers depend
    on the words alone: one GEMM makes them, and the M sequences of an image share them.

    With ``per_caption``, where much would be kept for the backward pass, captions go through a few
    at a time and are computed once more in it: :func:`jepa_fast.nn.per_caption.pool_per_caption`,
    unless the MLP or LayerNorm has hooks or an adapter (LoRA): then all at once.

    W_Q, W_K and W_V start with standard deviation ``1 / sqrt(inputs)`` (the paper does not say):
    with I-JEPA's 0.02 the attention of a narrow predictor is uniform, and stays so for a long time.

    Args:
        dim: predictor width d.
        depth: predictor blocks.
        text_dim: width Dt of the words.
        num_heads: a divisor of ``dim``.
        scale: of the scores; None: one over the square root of a head's width.
        pool: ``"max"``, ``"mean"``, or ``"attention"`` (a softmax over captions of the product of
            ``y_n`` with a learned vector, zero at first).
        per_caption: MLP and LayerNorm before the pool, once a caption.
        mlp_ratio: hidden width of the MLP over ``dim``.
        mlp_residual: add the MLP's input to its output before the LayerNorm.
        similarity: ``"relu"`` for O = relu(cos), ``"softplus"`` for O = softplus(cos / tau).
        tau: positive.
        after: the predictor blocks that are followed by text attention, from 0; None: all.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an unknown name, a number out of range, or sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        text_dim: int,
        *,
        num_heads: int = 1,
        scale: float | None = None,
        pool: str = "max",
        per_caption: bool = False,
        mlp_ratio: float = 4.0,
        mlp_residual: bool = False,
        similarity: str = "relu",
        tau: float = 0.1,
        after: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.after = check_word_options(
            dim,
            depth,
            text_dim,
            num_heads=num_heads,
            scale=scale,
            pool=pool,
            per_caption=per_caption,
            mlp_ratio=mlp_ratio,
            mlp_residual=mlp_residual,
            similarity=similarity,
            tau=tau,
            after=after,
        )
        self.num_heads = num_heads
        self.scale = scale
        self.pool = pool
        self.per_caption = per_caption
        self.similarity = similarity
        self.tau = tau
        self.keys_values = Linear(text_dim, len(self.after) * 2 * dim, bias=False)
        self.layers = nn.ModuleList(
            _WordLayer(dim, int(dim * mlp_ratio), mlp_residual, pool) for _ in self.after
        )
        init_transformer(self, ())
        for linear in self.modules():
            if isinstance(linear, nn.Linear) and linear.bias is None:
                nn.init.trunc_normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, captions: Captions, token_mask: Tensor | None = None) -> WordConditioning:
        """Prepare a forward pass.

        Args:
            captions: of the B images.
            token_mask: ``[R, T]`` bool, False at tokens that do not count in the regularisers.

        Raises:
            TypeError, ValueError: an option that has been set to one that does not serve.
        """
        flag("per_caption", self.per_caption)
        check_choice("pool", self.pool, POOLS)
        is_learned = self.layers[0].pool_query is not None
        if is_learned != (self.pool == "attention"):
            expected = "'attention'" if is_learned else "'max' or 'mean'"
            raise ValueError(
                f"pool: expected {expected}, got {self.pool!r}; 'attention' has a parameter, so "
                "give the pool to the constructor"
            )
        projected = self.keys_values(captions.words).unflatten(-1, (2 * len(self.layers), -1))
        keys_values = projected.unbind(-2)
        return WordConditioning(
            self,
            keys_values[::2],
            keys_values[1::2],
            captions.word_mask,
            token_mask,
            share_of_batch(lambda: _count_pairs(captions.word_mask, token_mask)),
        )


def check_word_options(
    dim: int,
    depth: int,
    text_dim: int,
    *,
    num_heads: int,
    scale: float | None,
    pool: str,
    per_caption: bool,
    mlp_ratio: float,
    mlp_residual: bool,
    similarity: str,
    tau: float,
    after: Sequence[int] | None,
    called: Mapping[str, str] | None = None,
) -> list[int]:
    """Refuse arguments that a :class:`WordConditioner` cannot have.

    Args:
        called: what the caller calls those arguments that it calls otherwise.

    Returns:
        The blocks that text attention follows, in order.

    Raises:
        TypeError, ValueError: as :class:`WordConditioner`.
    """

    def name(argument: str) -> str:
        return (called or {}).get(argument, argument)

    for argument, size in (("dim", dim), ("depth", depth), ("text_dim", text_dim)):
        check_count(name(argument), size)
    check_heads(num_heads, dim, name("num_heads"), name("dim"))
    if scale is not None:
        check_number(name("scale"), scale)
    check_choice(name("pool"), pool, POOLS)
    flag(name("per_caption"), per_caption)
    check_number(name("mlp_ratio"), mlp_ratio)
    if int(dim * mlp_ratio) < 1:
        raise ValueError(
            f"{name('mlp_ratio')}: expected at least 1 / {name('dim')}, 1 / {dim}, got {mlp_ratio}"
        )
    flag(name("mlp_residual"), mlp_residual)
    check_choice(name("similarity"), similarity, SIMILARITIES)
    check_number(name("tau"), tau)
    return _check_layers(after, depth, name("after"))


def _check_layers(after: Sequence[int] | None, depth: int, argument: str) -> list[int]:
    if after is None:
        return list(range(depth))
    if not isinstance(after, Iterable) or isinstance(after, str):
        raise TypeError(
            f"{argument}: expected a list of blocks, got {after!r}; for one block pass [{after}]"
        )
    after = list(after)
    if not all(isinstance(each, Integral) for each in after):
        raise TypeError(f"{argument}: expected a list of integers, got {after}")
    found = sorted(after)
    if not found or found[0] < 0 or found[-1] >= depth or len(set(found)) < len(found):
        raise ValueError(
            f"{argument}: expected different blocks from 0 to {depth - 1}, at least one, "
            f"got {after}"
        )
    return found


def _count_pairs(word_mask: Tensor, token_mask: Tensor | None) -> Tensor:
    """How many pairs of a caption and a token of its image there are, up to a factor."""
    captions = word_mask.any(2).sum(1)  # [B]
    if token_mask is not None:
        captions = captions * token_mask.sum(1).reshape(-1, max(len(captions), 1)).sum(0)
    return captions.sum()


class MeanWordConditioner(WordConditioner):
    """Baseline: tokens attend to whole captions, each the mean of its words."""

    def forward(self, captions: Captions, token_mask: Tensor | None = None) -> WordConditioning:
        """As :meth:`WordConditioner.forward`."""
        vectors, present = captions.caption_vectors()
        return super().forward(Captions(vectors[:, None], present[:, None]), token_mask)


class _WordLayer(nn.Module):
    """What follows one predictor block."""

    def __init__(self, dim: int, hidden_dim: int, mlp_residual: bool, pool: str) -> None:
        super().__init__()
        self.query = Linear(dim, dim, bias=False)
        self.mlp = Mlp(dim, hidden_dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_residual = mlp_residual
        self.pool_query = nn.Parameter(torch.zeros(dim)) if pool == "attention" else None

    def forward(
        self,
        tokens: Tensor,
        keys: Tensor,
        values: Tensor,
        word_mask: Tensor,
        token_mask: Tensor | None,
        *,
        per_caption: bool,
        pool: str,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens with text, their queries and the sparsity: all that uses the layer's weights is in
        this one call, so that FSDP can shard and gather it by itself.
        """
        query = self.query(tokens)
        arguments = (query, keys, values, tokens, word_mask)
        if (
            per_caption
            and is_worthwhile(tokens, word_mask.shape[1], self.mlp)
            and need_no_call(self.mlp, self.norm)
        ):
            y, sparsity = pool_per_caption(
                *arguments,
                token_mask,
                self.mlp,
                self.norm,
                self.pool_query,
                mlp_residual=self.mlp_residual,
                pool=pool,
                **options,
            )
            return y, query, sparsity
        pool_here = per_caption or pool == "attention"
        y, sparsity = ops.text_cross_attention(
            *arguments, pool="none" if pool_here else pool, token_mask=token_mask, **options
        )
        if per_caption:
            y = self._normed(y)
        if pool_here:
            y = self._pooled(y, word_mask, pool)
        if not per_caption:
            y = self._normed(y)
        return y, query, sparsity

    def _normed(self, y: Tensor) -> Tensor:
        return self.norm(y + self.mlp(y) if self.mlp_residual else self.mlp(y))

    def _pooled(self, y: Tensor, word_mask: Tensor, pool: str) -> Tensor:
        """``[R, C, T, d]`` over the captions that are there, to ``[R, T, d]``."""
        present = word_mask.any(2)
        # Without captions every y_n is the same, and so is any pool over them.
        present = present | ~present.any(1, keepdim=True)
        present = present.repeat(y.shape[0] // max(present.shape[0], 1), 1)[:, :, None, None]
        if pool == "max":
            y = y.masked_fill(~present, -torch.inf)
            if torch.compiler.is_compiling():  # the loop would be compiled anew for every C
                return y.max(1).values
            # Not amax, whose gradient is shared out where captions tie: the lowest wins. On a CPU
            # max takes several times as long.
            highest, *others = y.unbind(1)
            for other in others:
                highest = torch.where((other > highest) | other.isnan(), other, highest)
            return highest
        if self.pool_query is None:
            weights = present.to(y.dtype) / present.sum(1, keepdim=True)
        else:
            scores = (y * self.pool_query).sum(-1, keepdim=True)
            weights = scores.masked_fill(~present, -torch.inf).softmax(1)
        return (y * weights.to(y.dtype)).sum(1)


@dataclass
class WordConditioning(Conditioning):
    """One forward pass of a :class:`WordConditioner`.

    Attributes:
        keys, values: a tensor ``[B, C, S, d]`` for each block that text attention follows.
        word_mask: ``[B, C, S]`` bool.
        token_mask: ``[R, T]`` bool or None.
        share: what the regularisers, means over pairs of caption and token, are multiplied by.
        queries: by layer, ``[R, T, d]`` of those that have been called; of two calls the last.
        sparsities: by layer, a scalar of each of these.
    """

    conditioner: WordConditioner
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    word_mask: Tensor
    token_mask: Tensor | None
    share: Tensor | float
    queries: dict[int, Tensor] = field(default_factory=dict)
    sparsities: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, layer: int, tokens: Tensor) -> Tensor:
        """As :meth:`Conditioning.__call__`."""
        c = self.conditioner
        if layer not in c.after:
            return tokens
        layer = c.after.index(layer)
        width = self.keys[layer].shape[-1]
        if tokens.ndim != 3 or tokens.shape[2] != width:
            raise ValueError(f"tokens: expected [R, T, {width}], got {list(tokens.shape)}")
        y, self.queries[layer], self.sparsities[layer] = c.layers[layer](
            tokens,
            self.keys[layer],
            self.values[layer],
            self.word_mask,
            self.token_mask,
            per_caption=c.per_caption,
            pool=c.pool,
            num_heads=c.num_heads,
            scale=c.scale,
            similarity=c.similarity,
            tau=c.tau,
        )
        return y

    def sparsity(self) -> Tensor:
        """Mean over captions, tokens and layers of ``sum_w O``.

        Raises:
            ValueError: no layer has been called, here as in what follows.
        """
        layers = self._called("sparsity")
        return torch.stack([self.sparsities[i] for i in layers]).mean() * self.share

    def consistency(self) -> Tensor:
        """Mean over captions, tokens and layers of ``sum_w |O^l - mean_l O^l|``."""
        layers = self._called("consistency")
        c = self.conditioner
        consistency = ops.patch_word_consistency(
            [self.queries[i] for i in layers],
            [self.keys[i] for i in layers],
            self.word_mask,
            num_heads=c.num_heads,
            token_mask=self.token_mask,
            similarity=c.similarity,
            tau=c.tau,
        )
        return consistency * self.share

    def similarity_map(self) -> Tensor:
        """``mean_l O^l``, ``[R, C, T, S]`` in float32 or wider."""
        layers = self._called("similarity_map")
        c = self.conditioner
        return ops.patch_word_similarity(
            [self.queries[i] for i in layers],
            [self.keys[i] for i in layers],
            self.word_mask,
            num_heads=c.num_heads,
            similarity=c.similarity,
            tau=c.tau,
        )

    def statistics(self, images: int) -> tuple[Tensor, Tensor]:
        """Share of positive cosines and relative attention entropy, means over layers.

        Looks at the first ``images`` images, at the first sequence and two captions of each; see
        :func:`jepa_fast.ops.attention_statistics`.
        """
        layers = self._called("statistics")
        images = min(integer("images", images, least=1), self.word_mask.shape[0])
        found = [
            ops.attention_statistics(
                self.queries[i][:images],
                self.keys[i][:images, :_LOOKED_AT],
                self.word_mask[:images, :_LOOKED_AT],
                num_heads=self.conditioner.num_heads,
                scale=self.conditioner.scale,
                token_mask=None if self.token_mask is None else self.token_mask[:images],
            )
            for i in layers
        ]
        positive, entropy = zip(*found, strict=True)
        return torch.stack(positive).mean(), torch.stack(entropy).mean()

    def _called(self, what: str) -> list[int]:
        if not self.queries:
            raise ValueError(
                f"{what}: expected layers that have been called, got none; ask after the forward "
                "pass"
            )
        return sorted(self.queries)


class AdaLNConditioner(nn.Module):
    """Baseline: LayerNorm after every block, with shift and scale from the mean caption.

    The shift starts at zero and the scale at one.

    Args:
        dim: predictor width d.
        depth: predictor blocks.
        text_dim: width Dt of the words.
    """

    def __init__(self, dim: int, depth: int, text_dim: int) -> None:
        super().__init__()
        check_count("text_dim", text_dim)
        self.depth = depth
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = Linear(text_dim, depth * 2 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, captions: Captions, token_mask: Tensor | None = None) -> Conditioning:
        """As :meth:`WordConditioner.forward`."""
        modulation = self.modulation(captions.image_vectors()).unflatten(-1, (2 * self.depth, -1))
        shift_scale = modulation.unbind(1)
        return _AdaLNConditioning(self.norm, shift_scale[::2], shift_scale[1::2])


@dataclass
class _AdaLNConditioning(Conditioning):
    norm: nn.LayerNorm
    shifts: Sequence[Tensor]
    scales: Sequence[Tensor]

    def __call__(self, layer: int, tokens: Tensor) -> Tensor:
        shift, scale = (_to_rows(x[layer], tokens) for x in (self.shifts, self.scales))
        return self.norm(tokens) * (1 + scale) + shift


class FeatureConditioner(nn.Module):
    """Baseline: the mean caption is concatenated to every token's features and projected back.

    ``x = x + W [x; W_c c]`` after every block.

    Args:
        dim: predictor width d.
        depth: predictor blocks.
        text_dim: width Dt of the words.
    """

    def __init__(self, dim: int, depth: int, text_dim: int) -> None:
        super().__init__()
        check_count("text_dim", text_dim)
        self.caption = Linear(text_dim, dim)
        self.layers = nn.ModuleList(Linear(2 * dim, dim) for _ in range(depth))
        init_transformer(self, ())

    def forward(self, captions: Captions, token_mask: Tensor | None = None) -> Conditioning:
        """As :meth:`WordConditioner.forward`."""
        return _FeatureConditioning(self.layers, self.caption(captions.image_vectors()))


@dataclass
class _FeatureConditioning(Conditioning):
    layers: nn.ModuleList
    caption: Tensor

    def __call__(self, layer: int, tokens: Tensor) -> Tensor:
        caption = _to_rows(self.caption, tokens).expand(tokens.shape)
        return tokens + self.layers[layer](torch.cat([tokens, caption], -1))


class WordAppender(nn.Module):
    """Baseline: all words of all captions join the predictor's sequences as tokens.

    Args:
        dim: predictor width d.
        depth: predictor blocks (unused: the blocks' own attention does the work).
        text_dim: width Dt of the words.
    """

    def __init__(self, dim: int, depth: int, text_dim: int) -> None:
        super().__init__()
        check_count("text_dim", text_dim)
        self.embed = Linear(text_dim, dim)
        init_transformer(self, ())

    def forward(self, captions: Captions, token_mask: Tensor | None = None) -> Conditioning:
        """As :meth:`WordConditioner.forward`."""
        conditioning = Conditioning()
        words = self.embed(captions.words).flatten(1, 2)
        conditioning.appended = words, captions.word_mask.flatten(1, 2)
        return conditioning


def _to_rows(x: Tensor, tokens: Tensor) -> Tensor:
    """A vector an image ``[B, d]``, as ``[R, 1, d]`` for block-major tokens ``[R, T, d]``."""
    return x.repeat(tokens.shape[0] // max(x.shape[0], 1), 1)[:, None]


CONDITIONERS: dict[str, type[nn.Module]] = {
    "words": WordConditioner,
    "mean_words": MeanWordConditioner,
    "adaln": AdaLNConditioner,
    "feature": FeatureConditioner,
    "append": WordAppender,
}
"""Conditioners by name: TC-JEPA's, then the caption-level baselines."""
