"""The public functions `patch_word_consistency` and `patch_word_similarity`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from jepa_fast.ops._autocast import without_autocast
from jepa_fast.ops._autograd import OperatorFunction, applied, differentiable_once
from jepa_fast.ops._checks import check_dense, check_tensor
from jepa_fast.ops.patch_word_consistency import contract, reference
from jepa_fast.ops.text_cross_attention.api import check_similarity, check_words


class _PatchWordConsistency(OperatorFunction):
    # Autograd sees tensors among the arguments, not lists of them: queries, then keys, come last.
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        *options, backend = inputs[:7]
        layers = inputs[7:]
        count = len(layers) // 2
        return contract.FORWARD.call(layers[:count], layers[count:], *options, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options = inputs[3:7]
        ctx.save_for_backward(*inputs[:3], *inputs[7:])

    @staticmethod
    @differentiable_once("patch_word_consistency")
    def backward(ctx: Any, saved: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        masks, layers = saved[:3], saved[3:]
        count = len(layers) // 2
        grads = contract.BACKWARD.call(grad, layers[:count], layers[count:], *masks, *ctx.options)
        return *[None] * 7, *grads


def patch_word_consistency(
    q_layers: Sequence[Tensor] | Tensor,
    k_layers: Sequence[Tensor] | Tensor,
    word_mask: Tensor | None = None,
    caption_mask: Tensor | None = None,
    num_heads: int = 1,
    token_mask: Tensor | None = None,
    similarity: str = "relu",
    tau: float = 0.1,
    *,
    backend: str = "auto",
) -> Tensor:
    """How far each layer's patch-word similarities are from their mean over layers.

    The mean over layers and over pairs of token and caption of `sum_w |O^l[w] - mean_l O^l[w]|`,
    where `O^l[w] = relu(cos(q^l, k^l[w]))`, averaged over heads. Rows, masks, and what the masks
    leave out, are those of `text_cross_attention`.

    Args:
        q_layers: L tensors [R, T, d], the queries of each layer, R a multiple of B (block-major);
            or [L, R, T, d].
        k_layers: L tensors [B, C, S, d], the keys of each layer; or [L, B, C, S, d].
        word_mask: [B, C, S] bool, False at padding; None: every word is there.
        caption_mask: [B, C] bool, False at padding; None: every caption is there.
        num_heads: a divisor of d.
        token_mask: [R, T] bool, False at tokens that do not count; None: all do.
        similarity: `"relu"`, or `"softplus"` for `O = softplus(cos / tau)`.
        tau: positive and finite.
        backend: `"auto"` or one of `jepa_fast.ops.BACKENDS`.

    Returns:
        A scalar in float32 (float64 for float64 queries); 0 where no image has a caption.

    Raises:
        TypeError: a mask is not bool; the layers are not dense floating tensors of one dtype, or no
            list of them; `num_heads` is no integer, `tau` no number.
        ValueError: no layers, not as many queries as keys, a shape does not fit, an unknown name.
        BackendError: the requested backend cannot serve the call.

    Source: TC-JEPA, arXiv 2605.03245, the consistency regulariser.
    """
    op = "patch_word_consistency"
    q_layers, k_layers = _check_layers(
        op, q_layers, k_layers, word_mask, caption_mask, token_mask, num_heads
    )
    check_similarity(op, similarity, tau)
    return applied(
        _PatchWordConsistency,
        word_mask, caption_mask, token_mask, num_heads, similarity, tau, backend,
        *q_layers, *k_layers,
    )  # fmt: skip


def patch_word_similarity(
    q_layers: Sequence[Tensor] | Tensor,
    k_layers: Sequence[Tensor] | Tensor,
    word_mask: Tensor | None = None,
    caption_mask: Tensor | None = None,
    num_heads: int = 1,
    similarity: str = "relu",
    tau: float = 0.1,
) -> Tensor:
    """The similarities themselves, averaged over layers and heads: for pictures and grounding.

    Plain PyTorch that does hold [R, C, T, S] values; use it on a few images.

    Args: as for `patch_word_consistency`.

    Returns:
        [R, C, T, S] in float32 or wider, zero where there is no word.

    Raises:
        TypeError, ValueError: as `patch_word_consistency`.
    """
    op = "patch_word_similarity"
    q_layers, k_layers = _check_layers(
        op, q_layers, k_layers, word_mask, caption_mask, None, num_heads
    )
    check_similarity(op, similarity, tau)
    with without_autocast(q_layers[0]):
        return reference.patch_word_similarity(
            q_layers, k_layers, word_mask, caption_mask, num_heads, similarity, tau
        )


def _check_layers(
    op: str,
    q_layers: Sequence[Tensor] | Tensor,
    k_layers: Sequence[Tensor] | Tensor,
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    token_mask: Tensor | None,
    num_heads: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """A list of queries and one of keys, as long as each other."""
    q_layers = _list_of_layers(op, "q_layers", q_layers, 4, "[L, R, T, d]")
    k_layers = _list_of_layers(op, "k_layers", k_layers, 5, "[L, B, C, S, d]")
    if not q_layers or len(q_layers) != len(k_layers):
        raise ValueError(
            f"{op}: q_layers and k_layers must hold one tensor a layer, at least one, "
            f"got {len(q_layers)} and {len(k_layers)}"
        )
    masks = (word_mask, caption_mask, token_mask)
    check_words(op, "q_layers[0]", q_layers[0], "k_layers[0]", k_layers[0], *masks, num_heads)
    for name, layers in (("q_layers", q_layers), ("k_layers", k_layers)):
        for i, layer in enumerate(layers):
            check_tensor(op, f"{name}[{i}]", layer)
            check_dense(op, f"{name}[{i}]", layer)
            if layer.shape != layers[0].shape:
                raise ValueError(
                    f"{op}: {name}[{i}] must have the shape of {name}[0], "
                    f"{list(layers[0].shape)}, got {list(layer.shape)}"
                )
            if layer.dtype != q_layers[0].dtype:
                raise TypeError(
                    f"{op}: {name}[{i}] must have the dtype of q_layers[0], "
                    f"{q_layers[0].dtype}, got {layer.dtype}"
                )
    return q_layers, k_layers


def _list_of_layers(op: str, name: str, layers: object, dims: int, shape: str) -> list[Tensor]:
    """The layers' tensors; of one tensor with `dims` dimensions its slices."""
    if isinstance(layers, Tensor) and layers.ndim != dims:
        raise ValueError(
            f"{op}: {name} must be a list of tensors, one a layer, or a tensor {shape}, got shape "
            f"{list(layers.shape)}; of a single layer pass a list of it"
        )
    if not isinstance(layers, Iterable):
        raise TypeError(
            f"{op}: {name} must be a list of tensors, one a layer, got {type(layers).__name__}"
        )
    return list(layers)
