"""Which parameters are decayed."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: biases and 1-D parameters are not decayed (I-JEPA's recipe).

    The mask token is stored as ``[1, 1, d]`` and therefore *is* decayed, as in the released runs.

    Args:
        model: its parameters with ``requires_grad`` are grouped, each once, in their own order.
        weight_decay: of the decayed group.

    Returns:
        Two groups with keys ``params``, ``names``, ``weight_decay`` and ``decayed``; a schedule of
        the weight decay should touch only the groups with ``decayed`` True. A group without
        parameters is left out.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for decayed in (True, False):
        members = [
            (name, p)
            for name, p in trainable
            if (p.ndim > 1 and not name.endswith("bias")) is decayed
        ]
        if members:
            groups.append(
                {
                    "params": [p for _, p in members],
                    "names": [name for name, _ in members],
                    "weight_decay": weight_decay if decayed else 0.0,
                    "decayed": decayed,
                }
            )
    return groups
