"""I-JEPA's networks written out from the paper, on state dicts with the public names.

One sequence at a time, one head at a time, with plain matrix products: an independent check of
jepa_fast.nn, not an implementation of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def block_oracle(x: Tensor, state: dict[str, Tensor], name: str, heads: int) -> Tensor:
    """One sequence [T, D] through a pre-LN block, head by head."""
    width = x.shape[-1] // heads
    q, k, v = linear(layer_norm(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv").chunk(3, -1)
    attended = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        attended.append(scores.softmax(-1) @ v[:, part])
    x = x + linear(torch.cat(attended, -1), state, f"{name}.attn.proj")
    hidden = linear(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(hidden, state, f"{name}.mlp.fc2")


def vit_oracle(image: Tensor, state: dict[str, Tensor], heads: int, keep: list[int]) -> Tensor:
    """I-JEPA's encoder on one image [3, H, W], from a state dict with the public names."""
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    p, q = weight.shape[2:]
    tokens = torch.stack(
        [
            (image[:, y : y + p, x : x + q] * weight).sum((1, 2, 3)) + bias
            for y in range(0, image.shape[1], p)
            for x in range(0, image.shape[2], q)
        ]
    )
    tokens = (tokens + state["pos_embed"][0])[keep]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for i in range(depth):
        tokens = block_oracle(tokens, state, f"blocks.{i}", heads)
    return layer_norm(tokens, state, "norm")


def predictor_oracle(
    context: Tensor, state: dict[str, Tensor], heads: int, keep: list[int], targets: list[int]
) -> Tensor:
    """The predictor on one image's context tokens [Kc, D] and one target block: [Kt, D]."""
    position = state["predictor_pos_embed"][0]
    tokens = linear(context, state, "predictor_embed") + position[keep]
    tokens = torch.cat([tokens, state["mask_token"][0] + position[targets]])
    depth = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("predictor_blocks."))
    for i in range(depth):
        tokens = block_oracle(tokens, state, f"predictor_blocks.{i}", heads)
    return linear(layer_norm(tokens, state, "predictor_norm"), state, "predictor_proj")[len(keep) :]
