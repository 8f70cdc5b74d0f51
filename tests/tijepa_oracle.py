"""TI-JEPA's networks written out from the paper, on state dicts with the public names.

One image at a time, one head at a time, padding left out instead of masked: an independent check
of jepa_fast.nn.crosser and jepa_fast.models.tijepa, not an implementation of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from vit_oracle import layer_norm, linear


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    width = q.shape[-1] // heads
    parts = [slice(h * width, (h + 1) * width) for h in range(heads)]
    weights = [(q[:, p] @ k[:, p].T / math.sqrt(width)).softmax(-1) for p in parts]
    return torch.cat([w @ v[:, p] for w, p in zip(weights, parts, strict=True)], -1)


def mlp(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    hidden = linear(x, state, f"{name}.fc1")
    return linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), state, f"{name}.fc2")


def cross_attention_oracle(
    x: Tensor, words: Tensor, state: dict[str, Tensor], name: str, heads: int
) -> Tensor:
    """Tokens [T, h] that query words [S, Dt]."""
    q, k, v = (
        linear(y, state, f"{name}.{part}")
        for y, part in ((x, "query"), (words, "key"), (words, "value"))
    )
    return linear(attend(q, k, v, heads), state, f"{name}.proj")


def crosser_oracle(tokens: Tensor, words: Tensor, state: dict[str, Tensor], heads: int) -> Tensor:
    """One image's tokens [T, D] and words [S, Dt], without padding; no words: S = 0."""
    x = layer_norm(linear(tokens, state, "vision_proj"), state, "vision_norm")
    for i in range(1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))):
        block = f"blocks.{i}"
        if f"{block}.attn.qkv.weight" in state:  # self_cross, post-norm
            q, k, v = linear(x, state, f"{block}.attn.qkv").chunk(3, -1)
            x = x + linear(attend(q, k, v, heads), state, f"{block}.attn.proj")
            x = layer_norm(x, state, f"{block}.norm_after_self_attn")
            if len(words):
                x = x + cross_attention_oracle(x, words, state, f"{block}.cross_attn", heads)
            x = layer_norm(x + mlp(x, state, f"{block}.mlp"), state, f"{block}.norm_after_mlp")
        else:  # cross, pre-norm, one LayerNorm for both
            if len(words):
                query, read = (layer_norm(y, state, f"{block}.norm1") for y in (x, words))
                x = x + cross_attention_oracle(query, read, state, f"{block}.cross_attn", heads)
            x = x + mlp(layer_norm(x, state, f"{block}.norm2"), state, f"{block}.mlp")
    return x
