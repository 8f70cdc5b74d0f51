"""Schemas, fakes and backends of `patch_word_consistency`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops._autograd import recomputed_gradients
from jepa_fast.ops._checks import FLOAT32_KERNEL_DTYPES, no_wrong_products
from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.patch_word_consistency import reference


def _fake(q_layers: Sequence[Tensor], k_layers: Sequence[Tensor], *options: Any) -> Tensor:
    dtype = torch.promote_types(q_layers[0].dtype, torch.float32)
    return q_layers[0].new_empty((), dtype=dtype)


def _fake_backward(
    grad: Tensor, q_layers: Sequence[Tensor], k_layers: Sequence[Tensor], *options: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (*q_layers, *k_layers)]


def reference_backward(
    grad: Tensor, q_layers: Sequence[Tensor], k_layers: Sequence[Tensor], *options: Any
) -> list[Tensor]:
    """Gradients of all queries, then of all keys."""

    def function(*layers: Tensor) -> Tensor:
        count = len(layers) // 2
        return reference.patch_word_consistency(layers[:count], layers[count:], *options)

    layers = (*q_layers, *k_layers)
    grads = recomputed_gradients(function, layers, [True] * len(layers), [grad])
    return [x.contiguous() for x in grads]


def _unsupported_triton(
    q_layers: Sequence[Tensor],
    k_layers: Sequence[Tensor],
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    token_mask: Tensor | None,
    num_heads: int,
    *options: Any,
) -> list[str]:
    reasons = no_wrong_products(q_layers[0])
    if q_layers[0].dtype not in FLOAT32_KERNEL_DTYPES:
        reasons.append(f"takes float32, bfloat16 and float16 layers, got {q_layers[0].dtype}")
    if len(q_layers) > _MOST_LAYERS:
        reasons.append(f"takes at most {_MOST_LAYERS} layers, got {len(q_layers)}")
    head_dim = q_layers[0].shape[2] // num_heads
    if head_dim > _WIDEST_HEAD:
        reasons.append(f"takes heads of width {_WIDEST_HEAD} at most, got {head_dim}")
    return reasons


def _unsupported_triton_backward(grad: Tensor, *arguments: Any) -> list[str]:
    return _unsupported_triton(*arguments)


def _unsupported_cpu(q_layers: Sequence[Tensor], *arguments: Any) -> list[str]:
    dtype = q_layers[0].dtype
    return [] if dtype in FLOAT32_KERNEL_DTYPES else [f"computes in float32, got {dtype} layers"]


def _unsupported_cpu_backward(grad: Tensor, *arguments: Any) -> list[str]:
    return _unsupported_cpu(*arguments)


_FOLDER = "jepa_fast.ops.patch_word_consistency"
_MOST_LAYERS = 24  # whose signs fit into the bits that Triton's kernels keep of a pair
_WIDEST_HEAD = 512

_OPTIONS = (
    "Tensor[] q_layers, Tensor[] k_layers, Tensor? word_mask, Tensor? caption_mask, "
    "Tensor? token_mask, int num_heads, str similarity, float tau, str backend"
)

FORWARD = Operator(
    f"patch_word_consistency({_OPTIONS}) -> Tensor",
    fake=_fake,
    backends={
        "triton": Backend(f"{_FOLDER}.triton:patch_word_consistency", _unsupported_triton),
        "cpu": Backend(f"{_FOLDER}.native:patch_word_consistency", _unsupported_cpu),
        "reference": Backend(f"{_FOLDER}.reference:patch_word_consistency"),
    },
)
BACKWARD = Operator(
    f"patch_word_consistency_backward(Tensor grad, {_OPTIONS}) -> Tensor[]",
    fake=_fake_backward,
    backends={
        "triton": Backend(
            f"{_FOLDER}.triton:patch_word_consistency_backward", _unsupported_triton_backward
        ),
        "cpu": Backend(
            f"{_FOLDER}.native:patch_word_consistency_backward", _unsupported_cpu_backward
        ),
        "reference": Backend(f"{__name__}:reference_backward"),
    },
)
