"""Schemas, fakes and backends of `text_cross_attention`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops._checks import FLOAT32_KERNEL_DTYPES, no_wrong_products, only_kernel_dtypes
from jepa_fast.ops._registry import Backend, Operator
from jepa_fast.ops.text_cross_attention import reference

_FOLDER = "jepa_fast.ops.text_cross_attention"


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor,
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    token_mask: Tensor | None,
    num_heads: int,
    scale: float | None,
    pool: str,
    similarity: str,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.empty_outputs(q, k, residual, pool)


def _fake_backward(
    grad_features: Tensor,
    grad_sparsity: Tensor,
    winner: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_MOST_WORDS = 128  # of a caption, whose words the Triton kernels take at once
_WIDEST_HEAD = 512
# The most bytes of shared memory that a block takes on chips without wgmma, those with it having
# room for all, by the most numbers of a head and words of a caption; see the audit.
_SHARED_MEMORY = {(64, 64): 39_424, (64, 128): 59_392, (128, 64): 64_000, (128, 128): 78_848}
# For so much of a wider head; where the forward pass loads ahead, and where it does not. For three
# of these, and fewer, that is as much.
_CHUNK, _LOADING_AHEAD, _WAITING = 128, 43_264, 16_384


def _cpu_unsupported(q: Tensor, k: Tensor, v: Tensor, residual: Tensor, *options: Any) -> list[str]:
    known = q.dtype in FLOAT32_KERNEL_DTYPES
    reasons = [] if known else [f"computes in float32, got {q.dtype} queries"]
    return reasons + only_kernel_dtypes(residual)


def _cpu_unsupported_backward(
    grad_features: Tensor, grad_sparsity: Tensor, winner: Tensor, q: Tensor, *rest: Any
) -> list[str]:
    return _cpu_unsupported(q, q, q, grad_features)


def _triton_unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor,
    word_mask: Tensor | None,
    caption_mask: Tensor | None,
    token_mask: Tensor | None,
    num_heads: int,
    *options: Any,
) -> list[str]:
    # The kernels' products are the tensor cores'. In float32 they would be slower than PyTorch's:
    # only the interpreter takes it, for the tests.
    on_gpu = q.device.type == "cuda"
    reasons = []
    if q.dtype not in FLOAT32_KERNEL_DTYPES - ({torch.float32} if on_gpu else set()):
        reasons.append(f"takes q, k and v in bfloat16 and float16, got {q.dtype}")
    reasons += no_wrong_products(q)
    if residual.dtype not in FLOAT32_KERNEL_DTYPES:
        reasons.append(f"takes features in float32, bfloat16 and float16, got {residual.dtype}")
    if k.shape[2] > _MOST_WORDS:
        reasons.append(f"takes captions of at most {_MOST_WORDS} words, got {k.shape[2]}")
    width = q.shape[2] // num_heads
    if width > _WIDEST_HEAD:
        reasons.append(f"takes heads of width {_WIDEST_HEAD} or less, got {width}")
    elif on_gpu and generation(q.device) < 8:
        reasons.append(
            f"takes GPUs of compute capability 8.0 and more, got {generation(q.device)}.x: what "
            f"shared memory its kernels need there is not known"
        )
    elif on_gpu:
        takes, there = shared_memory(width, k.shape[2]), room(q.device)
        if takes > there:
            reasons.append(
                f"takes {takes} bytes of shared memory for heads of width {width}, the GPU has "
                f"{there}"
            )
    return reasons


def shared_memory(width: int, words: int, *, loading_ahead: bool = False) -> int:
    """The most bytes that a block of any of the Triton kernels takes on chips without wgmma.

    `loading_ahead`: where the forward pass of heads wider than 128 loads words before it needs
    them, as it does where there is room.
    """
    for (widest, most), takes in _SHARED_MEMORY.items():
        if width <= widest and words <= most:
            return takes
    chunks = -(-width // _CHUNK)
    return chunks * _LOADING_AHEAD if loading_ahead else max(3, chunks) * _WAITING


@functools.cache
def generation(device: torch.device) -> int:
    """The first number of a GPU's compute capability."""
    return torch.cuda.get_device_capability(device)[0]


@functools.cache
def room(device: torch.device) -> int:
    """The most shared memory that a block can have on a GPU, in bytes."""
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks the attribute
    return int(properties.shared_memory_per_block_optin)


def _triton_unsupported_backward(
    grad_features: Tensor,
    grad_sparsity: Tensor,
    winner: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *options: Any,
) -> list[str]:
    return _triton_unsupported(q, k, v, grad_features, *options)


# The default scale is worked out inside: outside, torch.compile would guard it and so the width.
_OPTIONS = (
    "Tensor? word_mask, Tensor? caption_mask, Tensor? token_mask, int num_heads, float? scale, "
    "str pool, str similarity, float tau, str backend"
)

FORWARD = Operator(
    f"text_cross_attention(Tensor q, Tensor k, Tensor v, Tensor residual, {_OPTIONS}) "
    "-> (Tensor features, Tensor sparsity, Tensor winner)",
    fake=_fake,
    backends={
        "triton": Backend(f"{_FOLDER}.triton:text_cross_attention", _triton_unsupported),
        "cpu": Backend(f"{_FOLDER}.native:text_cross_attention", _cpu_unsupported),
        "reference": Backend(f"{_FOLDER}.reference:text_cross_attention"),
    },
)
BACKWARD = Operator(
    "text_cross_attention_backward(Tensor grad_features, Tensor grad_sparsity, Tensor winner, "
    f"Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    backends={
        "triton": Backend(
            f"{_FOLDER}.triton_backward:text_cross_attention_backward",
            _triton_unsupported_backward,
        ),
        "cpu": Backend(
            f"{_FOLDER}.native:text_cross_attention_backward", _cpu_unsupported_backward
        ),
        "reference": Backend(f"{_FOLDER}.reference:text_cross_attention_backward"),
    },
)
