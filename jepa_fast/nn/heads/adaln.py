"""The network of the diffusion and flow-matching heads: an MLP modulated by time and condition."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast.nn.constants import ConstantBuffers
from jepa_fast.nn.linear import Linear

_MODULATIONS = 1 << 24
"""Numbers that a sampler computes ahead: 64 MiB of float32."""


class AdaLNMlp(nn.Module):
    """Residual MLP blocks whose LayerNorms are scaled and shifted by (time, condition).

    The last layer and all gates start at zero: the untrained network says 0, whatever its input.

    Args:
        target_dim: D.
        condition_dim: d.
        hidden_dim: width inside.
        depth: number of blocks.

    Source: AdaLN-Zero, arXiv 2212.09748; as a per-token head, arXiv 2406.11838.
    """

    def __init__(self, target_dim: int, condition_dim: int, hidden_dim: int, depth: int) -> None:
        super().__init__()
        self.input = Linear(target_dim, hidden_dim)
        self.condition = Linear(condition_dim, hidden_dim)
        self.time = TimeEmbedding(hidden_dim)
        self.blocks = nn.ModuleList(AdaLNBlock(hidden_dim) for _ in range(depth))
        self.modulation = _zero(Linear(hidden_dim, 2 * hidden_dim))
        self.output = _zero(Linear(hidden_dim, target_dim))

    def forward(self, z: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """[..., T, D] from z [..., T, D], time in [0, 1] and `self.condition(...)` [T, hidden_dim].

        time has any shape that broadcasts with [..., T]. Taking the condition projected lets a
        sampler project it once for all its steps.
        """
        return self._modulated(z, self._modulations(condition + self.time(time)))

    def at(self, times: Tensor, condition: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """For each of `times` [S], what `forward` makes of z with that time and the condition.

        For a sampler. What modulates the layers depends on time and condition alone, so that of as
        many times as fit into 64 MiB is computed together: for a few tokens reading the weights is
        most of it.
        """
        together = max(1, _MODULATIONS // max(condition.numel() * (3 * len(self.blocks) + 2), 1))
        for some in self.time(times).split(together):
            modulations = self._modulations(condition + some[:, None])
            for one_time in zip(*modulations, strict=True):
                yield functools.partial(self._modulated, modulations=one_time)

    def _modulations(self, given: Tensor) -> list[Tensor]:
        """Of every block and of the output, from condition plus time [..., T, hidden_dim]."""
        given = F.silu(given)
        blocks: Any = self.blocks
        return [*(block.modulation(given) for block in blocks), self.modulation(given)]

    def _modulated(self, z: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        *of_blocks, of_output = modulations
        h = self.input(z.to(self.input.weight.dtype))
        for block, modulation in zip(self.blocks, of_blocks, strict=True):
            h = block(h, modulation)
        shift, scale = of_output.chunk(2, -1)
        return self.output(_modulate(h, shift, scale))


class AdaLNBlock(nn.Module):
    """`h + gate * MLP(LayerNorm(h) * (1 + scale) + shift)`, given shift, scale and gate as one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = _zero(Linear(width, 3 * width))
        self.fc1 = Linear(width, width)
        self.fc2 = Linear(width, width)

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        shift, scale, gate = modulation.chunk(3, -1)
        return h + gate * self.fc2(F.silu(self.fc1(_modulate(h, shift, scale))))


class TimeEmbedding(ConstantBuffers):
    """Sines and cosines of time at 128 frequencies, then a two-layer MLP."""

    frequencies: Tensor

    def __init__(self, width: int, num_frequencies: int = 128) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.register_constants()
        self.fc1 = Linear(2 * num_frequencies, width)
        self.fc2 = Linear(width, width)

    def constants(self) -> dict[str, Tensor]:
        # From 1000 down to 0.1 radians over the unit interval. Not `linspace`: transformers puts it
        # on the CPU while it loads a model, and `with torch.device("meta")` may miss it ever after.
        # In float32 also where torch's default dtype is a half one, as while transformers loads.
        share = torch.arange(self.num_frequencies, dtype=torch.float32) / (self.num_frequencies - 1)
        return {"frequencies": 1000 * torch.exp(-math.log(10_000) * share)}

    def forward(self, time: Tensor) -> Tensor:
        angle = time.unsqueeze(-1) * self.frequencies
        waves = torch.cat([angle.cos(), angle.sin()], -1).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(waves)))


def _modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
