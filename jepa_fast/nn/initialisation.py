"""Weight initialisation of the transformers: the released recipe, and the depth-rescaled option."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

from torch import Tensor, nn

from jepa_fast._arguments import check_choice
from jepa_fast.nn.attention import Block

InitScheme = Literal["released", "rescaled", "fan_in"]


def init_mask_token(token: Tensor, std: float = 0.02) -> None:
    """Fill a mask token in place from a truncated normal of standard deviation ``std``."""
    nn.init.trunc_normal_(token, std=std)


def init_transformer(
    module: nn.Module, blocks: Iterable[nn.Module], scheme: str = "released", std: float = 0.02
) -> None:
    """Initialise every Linear, Conv2d and LayerNorm below ``module`` in place.

    Weights are truncated normal with standard deviation ``std``, biases zero, LayerNorm is the
    identity. ``"released"`` stops there: it is what the public I-JEPA runs used, since their
    training script overwrites the rescaling that their constructors do. ``"rescaled"`` then
    divides both output projections of block ``i`` (counted from 1) by ``sqrt(2 i)``.
    ``"fan_in"`` takes ``1 / sqrt(inputs)`` in place of ``std``, for narrow models: at width 64 and
    0.02 the position embedding drowns what a patch shows, and training starts by collapsing.

    Args:
        module: the network; modules of other kinds are left as they are.
        blocks: its residual blocks, from first to last.
        scheme: ``"released"``, ``"rescaled"`` or ``"fan_in"``.
        std: standard deviation of the weights, but under ``"fan_in"``.

    Raises:
        ValueError: ``scheme`` is unknown.
    """
    check_choice("init", scheme, get_args(InitScheme))
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Conv2d)):
            inputs = child.weight[0].numel()
            width = inputs**-0.5 if scheme == "fan_in" else std
            nn.init.trunc_normal_(child.weight, std=width)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm):
            child.reset_parameters()
    if scheme == "rescaled":
        for depth, block in enumerate(blocks, start=1):
            if isinstance(block, Block):
                for projection in (block.attn.proj, block.mlp.fc2):
                    projection.weight.data.div_(math.sqrt(2.0 * depth))
