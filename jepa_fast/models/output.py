"""What every model returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.export import register_dataclass


@dataclass
class JepaOutput:
    """Result of one forward pass of a model.

    Attributes:
        loss: scalar float32 (float64 of a float64 model), to call ``backward`` on.
        metrics: 0-dim tensors by name, detached, on the model's device; making them waits for
            nothing, so read them (``.item()``) only when they are wanted. They are of the tokens
            that count, like the loss.
        prediction: what was predicted, ``[M * B, Kt, D]``, block-major, detached. From
            ``ProbIJepa``: what conditions its head, ``[M * B, Kt, d]``, d the predictor's width.
            With packed masks, only where ``masks.target_mask`` is True does a token count: those of
            images in other packs mean nothing, and left over slots repeat others.
        target: what it is compared with, ``[M * B, Kt, D]``, without gradient.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    prediction: Tensor
    target: Tensor


# As a tree of tensors, in which DistributedDataParallel finds the loss (with static_graph=True it
# would average no gradients at the first step), and which torch.export takes for a result.
register_dataclass(JepaOutput)
