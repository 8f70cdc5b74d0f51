"""DTensors, as FSDP2 makes parameters, for operators that work element by element.

Every rank updates its own shard, so that nothing has to be communicated and DTensor's dispatch has
no say. `torch.distributed.tensor` is imported by whoever has a DTensor, never here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def dtensor_type() -> Any:
    """The class, or None while nobody in this process can have a DTensor."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def to_local(op: str, lists: Mapping[str, Sequence[Any]]) -> tuple[list[list[Any]], list[Tensor]]:
    """The lists with this rank's shard in the place of every DTensor, and the DTensors.

    Args:
        op: the operator's name, for messages.
        lists: by argument name; the i-th entries of all belong together, as far as they go.

    Raises:
        ValueError: entries that belong together are not all DTensors, of one mesh and the same
            placements, or are sums that wait for their other parts.
    """
    kind = dtensor_type()
    if kind is None or not any(isinstance(x, kind) for each in lists.values() for x in each):
        return [list(each) for each in lists.values()], []
    found: list[Any] = []
    for i in range(max(map(len, lists.values()))):
        named = [(f"{name}[{i}]", each[i]) for name, each in lists.items() if i < len(each)]
        if any(isinstance(x, kind) for _, x in named):
            _check_placements(op, named, kind)
            found += [x for _, x in named]
    local = [[x.to_local() if isinstance(x, kind) else x for x in each] for each in lists.values()]
    return local, found


def _check_placements(op: str, named: list[tuple[str, Any]], kind: Any) -> None:
    shards = [pair for pair in named if isinstance(pair[1], kind)]
    others = [pair for pair in named if not isinstance(pair[1], kind)]
    first_name, first = shards[0]
    if others:
        raise ValueError(
            f"{op}: {first_name} is a DTensor and {others[0][0]} is none; pass both or neither, "
            f"for example {first_name}.to_local() where {others[0][0]} is this rank's shard"
        )
    for name, x in shards:
        if (x.device_mesh, x.placements) != (first.device_mesh, first.placements):
            raise ValueError(
                f"{op}: {first_name} and {name} must be placed alike, got {first.placements} on "
                f"{first.device_mesh} and {x.placements} on {x.device_mesh}; redistribute() one"
            )
        if any(placement.is_partial() for placement in x.placements):
            raise ValueError(
                f"{op}: {name} is a sum whose parts lie on several ranks, {x.placements}; "
                f"redistribute() it to Replicate() or Shard() first"
            )
