"""gather_packed on the tokens of whole batches, against indexing, compiled, and index_select."""

from __future__ import annotations

from cases import VIT_L, VIT_S, gather_packed_cost
from plain import Other, backend_of, drawn_patches, operator_race, values
from torch import Tensor

from jepa_fast.perf import Case, Race, benchmark

_SMALL = {"T": 2048, "K": 864, "D": 384}
_CONTEXT_S = {"T": VIT_S["B"] * VIT_S["N"], "K": VIT_S["B"] * VIT_S["Kc"], "D": VIT_S["D"]}
_CONTEXT_L = {"T": VIT_L["B"] * VIT_L["N"], "K": VIT_L["B"] * VIT_L["Kc"], "D": VIT_L["D"]}


@benchmark(
    [
        Case("gather_packed", "small", _SMALL, quick=True),
        Case("gather_packed", "context-vit-s", _CONTEXT_S, devices=("cpu",)),
        Case("gather_packed", "context-vit-l", _CONTEXT_L, "bfloat16", ("cuda",)),
    ]
)
def bench_gather_packed(case: Case, device: str) -> Race:
    """Forward and backward."""
    rows = values(case["T"], case["D"], dtype=case.dtype, device=device, grad=True)
    index = drawn_patches(case["K"], patches=case["T"], device=device)
    grad = values(case["K"], case["D"], dtype=case.dtype, device=device, seed=1)
    return operator_race(
        case,
        device,
        gather_packed_cost(case, backward=True),
        (rows, index),
        # Packed rows are the patches of a single image to the operator behind both.
        backend=backend_of("gather_patches", rows[None], index[None]),
        grads=[grad],
        others={"index_select": Other(_index_select)},
    )


def _index_select(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index)
