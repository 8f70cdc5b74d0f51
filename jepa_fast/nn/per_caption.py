"""TC-JEPA's per-caption reading: ``pool_n LayerNorm(MLP(y_n))``, captions a few at a time.

Written out, every ``y_n``, its MLP's hidden layer and what follows are kept for the backward pass:
some ``(3 + 2 * mlp_ratio) * C * d`` numbers a token. Here the forward pass keeps its inputs and
what the pool needs, such as the winning caption of every feature, and the backward pass computes
each caption once more. To pay for that, the hidden layer is not made from ``y_n = x + A_n V_n``
but as ``x W_1^T + A_n (V_n W_1^T)``: its first term is the same for all captions, and its second
one multiplies as many numbers as a caption has words, not d. (With words times heads beyond d there
is nothing to gain, and ``A_n V_n`` comes first.)

Both passes are operators, opaque to torch.compile, so that the backward pass can have autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast.nn.attention import Mlp
from jepa_fast.nn.linear import has_hooks, is_what_its_weights_say, linear
from jepa_fast.nn.precision import widened, without_autocast
from jepa_fast.ops._autograd import OperatorFunction, applied, differentiable_once, recording
from jepa_fast.ops._checks import check_choice, check_tensor
from jepa_fast.ops.text_cross_attention.api import (
    check_similarity,
    check_values,
    check_words,
    checked_scale,
)
from jepa_fast.ops.text_cross_attention.reference import (
    by_head,
    by_image,
    by_row,
    cosines,
    dot_products,
    pair_weights,
    score_scale,
    similarities,
    valid_words,
    weighted,
)

CHUNK_ROWS = {"cpu": 4096, "cuda": 65536}
"""By the device's type: how many rows, of a token and a caption each, the MLP gets at once."""

AT_ONCE = 2**21
"""Bytes that all captions at once may keep for the backward pass: too few to be missed, and faster
so, by up to 2 times. (The times meet at about 64 MiB.)"""

_BYTE = 256  # captions that a uint8 tells apart


def need_no_call(mlp: Mlp, norm: nn.LayerNorm) -> bool:
    """Whether the weights say all: no adapter (LoRA), no wrapper, and no hook to be run."""
    return (
        type(mlp) is Mlp
        and type(norm).forward is nn.LayerNorm.forward
        and is_what_its_weights_say(mlp.fc1)
        and is_what_its_weights_say(mlp.fc2)
        and not any(has_hooks(module) for module in (mlp, mlp.fc1, mlp.fc2, norm))
    )


def is_worthwhile(tokens: Tensor, captions: int, mlp: Mlp) -> bool:
    """Whether all captions at once would keep more than ``AT_ONCE``: ``[R, T, d]`` tokens for each.

    Of a caption y_n, the hidden layer before and after its GELU, the MLP's output and LayerNorm's.
    """
    numbers = 3 * mlp.fc1.in_features + 2 * mlp.fc1.out_features
    rows = tokens.shape[0] * tokens.shape[1] * captions
    return rows * numbers * tokens.element_size() > AT_ONCE


def pool_per_caption(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tokens: Tensor,
    word_mask: Tensor,
    token_mask: Tensor | None,
    mlp: Mlp,
    norm: nn.LayerNorm,
    pool_query: Tensor | None,
    *,
    mlp_residual: bool,
    num_heads: int,
    scale: float | None,
    pool: str,
    similarity: str,
    tau: float,
) -> tuple[Tensor, Tensor]:
    """Text attention, MLP and LayerNorm of each caption on its own, and the pool over captions.

    ``y_n = tokens + softmax(scale * query keys_n^T) values_n`` as
    :func:`jepa_fast.ops.text_cross_attention` has it, ``z_n = norm(mlp(y_n))`` or, with
    ``mlp_residual``, ``norm(y_n + mlp(y_n))``; then the elementwise maximum of the z_n (ties: the
    lowest caption), their mean, or for ``"attention"`` their mean by ``softmax_n(z_n pool_query)``.
    Captions without words enter nothing; an image without captions has ``tokens`` for all y_n.

    The weights are read and the modules not called, so that hooks of theirs do not run. Results and
    gradients are the same from run to run; there are no second derivatives.

    Args:
        query, tokens: ``[R, T, d]``, row r of image ``r % B``.
        keys, values: ``[B, C, S, d]``.
        word_mask: ``[B, C, S]`` bool.
        token_mask: ``[R, T]`` bool, False at tokens that do not count in the sparsity; or None.
        mlp, norm: of width d. Under autocast they compute in its dtypes, as modules do.
        pool_query: ``[d]`` for ``pool="attention"``, else None.
        mlp_residual: add y_n to the MLP's output.
        num_heads, scale, similarity, tau: as in :func:`jepa_fast.ops.text_cross_attention`.
        pool: ``"max"``, ``"mean"`` or ``"attention"``.

    Returns:
        ``[R, T, d]`` in the dtype of ``norm(mlp(tokens))``, and the sparsity term, a scalar in
        float32 (float64 for float64 queries).

    Raises:
        TypeError: the dtypes of tokens and weights differ, and autocast does not settle it; or as
            :func:`jepa_fast.ops.text_cross_attention`.
        ValueError: as :func:`jepa_fast.ops.text_cross_attention`; the MLP, the LayerNorm or
            `pool_query` is of another width.
    """
    op = "pool_per_caption"
    check_tensor(op, "word_mask", word_mask)
    check_words(op, "query", query, "keys", keys, word_mask, None, token_mask, num_heads)
    check_values(op, ("query", query), ("keys", keys), ("values", values), ("tokens", tokens))
    check_choice(op, "pool", pool, _POOLS)
    check_similarity(op, similarity, tau)
    scale = checked_scale(op, scale)
    width = query.shape[2]
    for argument, found in (("mlp", mlp.fc1.in_features), ("norm", norm.normalized_shape[-1])):
        if found != width:
            raise ValueError(f"{op}: {argument} must be of the width {width} of query, got {found}")
    if pool == "attention":
        if pool_query is None:
            raise TypeError(f"{op}: pool_query must be a tensor for pool='attention', got None")
        if pool_query.shape != (width,):
            raise ValueError(
                f"{op}: pool_query must have shape [{width}], got {list(pool_query.shape)}"
            )
    elif pool_query is not None:
        raise ValueError(
            f"{op}: pool_query must be None for pool={pool!r}, which gives it no gradient, got "
            f"shape {list(pool_query.shape)}"
        )
    pooled, sparsity, _ = applied(
        _PerCaption,
        query, keys, values, tokens,
        mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, norm.weight, norm.bias,
        pool_query, word_mask, token_mask,
        norm.eps, mlp_residual, pool, *_dtypes(tokens, mlp.fc1.weight, mlp_residual),
        num_heads, scale, similarity, tau,
    )  # fmt: skip
    return pooled, sparsity


def _dtypes(tokens: Tensor, weight: Tensor, mlp_residual: bool) -> tuple[torch.dtype, torch.dtype]:
    """Of the MLP's products and of the result."""
    device, product = tokens.device.type, weight.dtype
    # Meta tensors have no autocast.
    if device != "meta" and torch.is_autocast_enabled(device) and product != torch.float64:
        product = torch.get_autocast_dtype(device)
    elif tokens.dtype != product:
        raise TypeError(
            f"tokens: expected the dtype of the MLP's weights, {product}, got {tokens.dtype}; "
            "convert one of them, or run under torch.autocast"
        )
    result = torch.promote_types(tokens.dtype, product) if mlp_residual else product
    # Autocast widens a LayerNorm on a GPU and leaves it as it is on a CPU.
    return product, F.layer_norm(tokens.new_empty((0, 1), dtype=result), (1,)).dtype


class _PerCaption(OperatorFunction):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.jepa_fast_nn.pool_per_caption.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pooled, _, kept = output
        ctx.mark_non_differentiable(kept)
        ctx.options = inputs[_TENSORS:]
        # Of the pools only "attention" needs its result.
        last = pooled if ctx.options[2] == "attention" else None
        ctx.save_for_backward(*inputs[:_TENSORS], kept, last)

    @staticmethod
    @differentiable_once("pool_per_caption", "use text_cross_attention's reference and the MLP")
    def backward(
        ctx: Any, saved: Any, grad: Tensor, grad_sparsity: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        *inputs, kept, pooled = saved
        grads = torch.ops.jepa_fast_nn.pool_per_caption_backward.default(
            grad, grad_sparsity, kept, pooled, *inputs, *ctx.options
        )
        to_pool_query = None if inputs[10] is None else grads[10]
        return *grads[:10], to_pool_query, *[None] * (2 + len(ctx.options))


# The operators

_TENSORS = 13  # of the arguments, the first ones
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, "
    "Tensor gamma, Tensor beta, Tensor? pool_query, Tensor word_mask, Tensor? token_mask, "
    "float eps, bool mlp_residual, str pool, ScalarType product, ScalarType result, "
    "int num_heads, float? scale, str similarity, float tau"
)
_LIBRARY = torch.library.Library("jepa_fast_nn", "DEF")  # lives as long as this object
_LIBRARY.define(f"pool_per_caption({_ARGUMENTS}) -> (Tensor pooled, Tensor sparsity, Tensor kept)")
_LIBRARY.define(
    "pool_per_caption_backward(Tensor grad, Tensor grad_sparsity, Tensor kept, Tensor? pooled, "
    f"{_ARGUMENTS}) -> Tensor[]"
)


@torch.library.impl(_LIBRARY, "pool_per_caption", "CompositeExplicitAutograd")
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call.of(arguments)
    with torch.no_grad(), without_autocast(call.x):
        parts = call.parts(*arguments[:10])
        pool = _POOLS[call.pool]
        state = pool.start(parts[_X], call.captions)
        sparsity = parts[_Q].new_zeros(())
        for some in call.chunks():
            z, found = call.chunk(some, *call.taken(some, parts))
            sparsity = sparsity + found
            for n, of_caption in enumerate(z.unbind(1), start=some.start):
                state = pool.add(state, n, of_caption, call.present[:, n], call.pool_query)
        pooled, kept = pool.end(state, call.present)
        return call.by_row(pooled).to(call.result).contiguous(), sparsity, kept.contiguous()


@torch.library.impl(_LIBRARY, "pool_per_caption_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor, grad_sparsity: Tensor, kept: Tensor, pooled: Tensor | None, *arguments: Any
) -> list[Tensor]:
    call = _Call.of(arguments)
    with without_autocast(call.x):
        inputs = [tensor.detach().requires_grad_() for tensor in arguments[:10]]
        with recording():
            parts = call.parts(*inputs)
        sums = [torch.zeros_like(part, dtype=widened(part[:0]).dtype) for part in parts]
        to_pool_query = grad.new_zeros(0)
        if call.pool_query is not None:
            to_pool_query = torch.zeros_like(widened(call.pool_query))
        grad = call.by_image(grad)
        pooled = None if pooled is None else call.by_image(pooled)
        for some in call.chunks():
            leaves = [part.detach().requires_grad_() for part in call.taken(some, parts)]
            with recording():
                z, found = call.chunk(some, *leaves)
            to_z, more = _POOLS[call.pool].back(
                grad, z.detach(), some, call.present, kept, pooled, call.pool_query
            )
            to_pool_query += more
            grads = torch.autograd.grad(
                [z, found], leaves, [to_z, grad_sparsity], allow_unused=True
            )
            for total, g in zip(call.taken(some, sums), grads, strict=True):
                if g is not None:
                    total += g
        sums = [total.to(part.dtype) for total, part in zip(sums, parts, strict=True)]
        grads = torch.autograd.grad(parts, inputs, sums)
        if call.pool_query is not None:
            to_pool_query = to_pool_query.to(call.pool_query.dtype)
        return [*(g.contiguous() for g in grads), to_pool_query]


@torch.library.register_fake("jepa_fast_nn::pool_per_caption", lib=_LIBRARY)
def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call.of(arguments)
    q, x = arguments[0], call.x
    rows = x.new_empty((call.batch, x.shape[0] // max(call.batch, 1) * x.shape[1], x.shape[2]))
    _, kept = _POOLS[call.pool].end(
        _POOLS[call.pool].start(widened(rows), call.captions), call.present
    )
    sparsity = q.new_empty((), dtype=torch.promote_types(q.dtype, torch.float32))
    return x.new_empty(x.shape, dtype=call.result), sparsity, torch.empty_like(kept)


@torch.library.register_fake("jepa_fast_nn::pool_per_caption_backward", lib=_LIBRARY)
def _fake_backward(
    grad: Tensor, grad_sparsity: Tensor, kept: Tensor, pooled: Tensor | None, *arguments: Any
) -> list[Tensor]:
    pool_query = arguments[10]
    last = grad.new_empty(0) if pool_query is None else pool_query.new_empty(pool_query.shape)
    return [*(tensor.new_empty(tensor.shape) for tensor in arguments[:10]), last]


# What they compute. By image the rows of its M sequences lie side by side, as P = M * T tokens.

_Q, _K, _V, _X = range(4)  # among the parts


@dataclass(frozen=True)
class _Call:
    """The arguments of an operator that take no gradient, and the work of both passes."""

    x: Tensor
    captions: int
    batch: int
    pool_query: Tensor | None
    present: Tensor
    valid: Tensor
    weight: Tensor
    eps: float
    mlp_residual: bool
    pool: str
    product: torch.dtype
    result: torch.dtype
    num_heads: int
    scale: float
    similarity: str
    tau: float

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> _Call:
        q, k, _, x = arguments[:4]
        pool_query, word_mask, token_mask = arguments[10:_TENSORS]
        eps, mlp_residual, pool, product, result, num_heads, scale, *similarity = arguments[
            _TENSORS:
        ]
        batch, captions = k.shape[:2]
        valid = valid_words(k, word_mask, None)
        has_words = valid.any(3, keepdim=True)
        tokens = x.shape[0] // max(batch, 1) * x.shape[1]
        weight = pair_weights(has_words, token_mask, batch, tokens, widened(q[:0]).dtype)
        # Of an image without captions all y_n are x: one of them is enough.
        there = has_words[:, 0, :, :, :]  # [B, C, 1, 1]
        none = ~there.any(1, keepdim=True)
        present = torch.cat([there[:, :1] | none, there[:, 1:]], 1)
        return cls(
            x, captions, batch, pool_query, present, valid, weight, eps, mlp_residual, pool,
            product, result, num_heads, score_scale(scale, q, num_heads), *similarity,
        )  # fmt: skip

    def chunks(self) -> Iterator[slice]:
        """The captions, as many at a time as make the rows, or one."""
        rows = CHUNK_ROWS.get(self.x.device.type, CHUNK_ROWS["cuda"])
        size = max(rows // max(self.x.shape[0] * self.x.shape[1], 1), 1)
        for n in range(0, self.captions, size):
            yield slice(n, min(n + size, self.captions))

    def by_image(self, x: Tensor) -> Tensor:
        """``[R, T, d]`` to ``[B, P, d]`` in float32 or wider."""
        return by_image(x, self.batch, 1)[:, 0]

    def by_row(self, x: Tensor) -> Tensor:
        """The way back."""
        return by_row(x[:, None], *self.x.shape[:2])

    def parts(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor,
        w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gamma: Tensor, beta: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        """What all captions share, and words by head, in the dtypes that they are used in."""
        x = self.by_image(x)
        w1, b1, w2, b2 = (weight.to(self.product) for weight in (w1, b1, w2, b2))
        return [
            by_image(q, self.batch, self.num_heads) * self.scale,
            by_head(k, self.num_heads, self.valid),
            by_head(v, self.num_heads, self.valid),
            x,
            linear(x.to(self.product), w1, b1),
            w1, w2, b2, widened(gamma), widened(beta),
        ]  # fmt: skip

    def taken(self, some: slice, parts: Sequence[Tensor]) -> list[Tensor]:
        """The parts for some captions."""
        return [part[:, :, some] if i in (_K, _V) else part for i, part in enumerate(parts)]

    def chunk(
        self, some: slice, q: Tensor, k: Tensor, v: Tensor, x: Tensor, shared: Tensor,
        w1: Tensor, w2: Tensor, b2: Tensor, gamma: Tensor, beta: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """z_n of some captions, ``[B, n, P, d]``, and their part of the sparsity."""
        valid = self.valid[:, :, some]
        scores = dot_products(q, k)  # [B, h, n, S, P]
        cosine = cosines(scores, q, k)
        sparsity = similarities(cosine, valid, self.similarity, self.tau).sum(3)
        sparsity = weighted(sparsity, self.weight[:, :, some]) / self.num_heads

        # Uniform where there is no word, and the values zero.
        attention = scores.masked_fill(~valid, torch.finfo(scores.dtype).min / 2).softmax(3)
        heads, words, width = k.shape[1], k.shape[3], x.shape[2]
        by_words = heads * words < width
        if by_words:
            of_head = w1.unflatten(1, (heads, -1))
            projected = torch.einsum("bhnse,fhe->bnhsf", v.to(self.product), of_head).flatten(2, 3)
            attended = attention.movedim(1, 2).flatten(2, 3).transpose(2, 3).to(self.product)
            hidden = torch.baddbmm(
                shared[:, None].expand(-1, k.shape[2], -1, -1).flatten(0, 1),
                attended.flatten(0, 1),
                projected.flatten(0, 1),
            ).unflatten(0, k.shape[:3:2])
        if self.mlp_residual or not by_words:
            o = (attention.transpose(3, 4) @ v).movedim(1, 3).flatten(3)  # [B, n, P, d]
        if not by_words:
            hidden = shared[:, None] + linear(o.to(self.product), w1)
        out = linear(F.gelu(hidden), w2, b2)
        if self.mlp_residual:
            out = x[:, None] + o + out
        return F.layer_norm(widened(out), (width,), gamma, beta, self.eps), sparsity


# Pools. A state grows by a caption at a time, z [B, P, d] and present [B, 1, 1]; it ends as the
# result, and what the backward pass needs besides. `back` gives the gradients of some captions' z
# [B, n, P, d], and of the pool's query.

_State = tuple[Tensor, ...]


class _Max:
    @staticmethod
    def start(x: Tensor, captions: int) -> _State:
        index = torch.uint8 if captions <= _BYTE else torch.int32
        return torch.full_like(x, -torch.inf), torch.zeros_like(x, dtype=index)

    @staticmethod
    def add(state: _State, n: int, z: Tensor, present: Tensor, pool_query: Tensor | None) -> _State:
        highest, winner = state
        wins = ((z > highest) | z.isnan()) & present
        return torch.where(wins, z, highest), winner.masked_fill(wins, n)

    @staticmethod
    def end(state: _State, present: Tensor) -> _State:
        return state

    @staticmethod
    def back(
        grad: Tensor, z: Tensor, some: slice, present: Tensor, winner: Tensor, *_: Tensor | None
    ) -> tuple[Tensor, float]:
        won = [grad.masked_fill(winner != n, 0) for n in range(some.start, some.stop)]
        return torch.stack(won, 1), 0.0


class _Mean:
    @staticmethod
    def start(x: Tensor, captions: int) -> _State:
        return (torch.zeros_like(x),)

    @staticmethod
    def add(state: _State, n: int, z: Tensor, present: Tensor, pool_query: Tensor | None) -> _State:
        return (state[0] + z * present,)

    @staticmethod
    def end(state: _State, present: Tensor) -> _State:
        return state[0] / present.sum(1), state[0].new_empty(0)

    @staticmethod
    def back(
        grad: Tensor, z: Tensor, some: slice, present: Tensor, *_: Tensor | None
    ) -> tuple[Tensor, float]:
        return (grad / present.sum(1))[:, None] * present[:, some], 0.0


class _Attention:
    """A softmax as it goes along: the sums are of exponentials over the highest so far."""

    @staticmethod
    def start(x: Tensor, captions: int) -> _State:
        total = torch.zeros_like(x[:, :, :1])
        # Finite, for differences that are numbers; the first score takes its weight away.
        return torch.zeros_like(x), torch.full_like(total, torch.finfo(x.dtype).min / 2), total

    @staticmethod
    def add(state: _State, n: int, z: Tensor, present: Tensor, pool_query: Tensor) -> _State:
        pooled, highest, total = state
        score = (z * pool_query).sum(-1, keepdim=True)
        score = score.masked_fill(~present, torch.finfo(z.dtype).min / 2)
        before, highest = highest, torch.maximum(highest, score)
        keep, weight = (before - highest).exp(), (score - highest).exp()
        return pooled * keep + z * weight, highest, total * keep + weight

    @staticmethod
    def end(state: _State, present: Tensor) -> _State:
        pooled, highest, total = state
        return pooled / total, highest + total.log()

    @staticmethod
    def back(
        grad: Tensor,
        z: Tensor,
        some: slice,
        present: Tensor,
        log_total: Tensor,
        pooled: Tensor,
        pool_query: Tensor,
    ) -> tuple[Tensor, Tensor]:
        score = (z * pool_query).sum(-1, keepdim=True)
        score = score.masked_fill(~present[:, some], -torch.inf)
        weight = (score - log_total[:, None]).exp()
        to_score = (grad[:, None] * (z - pooled[:, None])).sum(-1, keepdim=True) * weight
        # One alone has all the weight; `pooled` may be rounded to half precision, and z is not.
        to_score = to_score.masked_fill(present.sum(1, keepdim=True) == 1, 0)
        to_z = weight * grad[:, None] + to_score * pool_query
        return to_z, (to_score * z).sum((0, 1, 2))


_POOLS: dict[str, Any] = {"max": _Max, "mean": _Mean, "attention": _Attention}
