"""assemble_predictor_tokens at the predictor's width, against gathers, repeats and cat."""

from __future__ import annotations

from cases import PREDICTOR, assemble_predictor_tokens_cost
from plain import backend_of, drawn_patches, operator_race, values

from jepa_fast.perf import Case, Race, benchmark

_SMALL = {"B": 8, "N": 64, "d": 192, "M": 4, "Kt": 11, "Kc": 27}


@benchmark(
    [
        Case("assemble_predictor_tokens", "small", _SMALL, quick=True),
        Case("assemble_predictor_tokens", "16-images", {**PREDICTOR, "B": 16}, devices=("cpu",)),
        Case("assemble_predictor_tokens", "256-images", PREDICTOR, "bfloat16", ("cuda",)),
    ]
)
def bench_assemble_predictor_tokens(case: Case, device: str) -> Race:
    """Forward and backward; the position embedding is fixed, and as wide as the residual stream."""
    batch, patches, width, blocks = (case[size] for size in ("B", "N", "d", "M"))
    context = values(batch, case["Kc"], width, dtype=case.dtype, device=device, grad=True)
    mask_token = values(width, device=device, seed=1, grad=True)
    pos_embed = values(patches, width, device=device, seed=2)
    context_index = drawn_patches(batch, case["Kc"], patches=patches, device=device)
    target_index = drawn_patches(batch, blocks, case["Kt"], patches=patches, device=device, seed=1)
    arguments = (context, mask_token, pos_embed, context_index, target_index)
    grad = values(blocks * batch, case["Kc"] + case["Kt"], width, device=device, seed=3)
    return operator_race(
        case,
        device,
        assemble_predictor_tokens_cost(case, backward=True),
        arguments,
        backend=backend_of("assemble_predictor_tokens", *arguments),
        grads=[grad],
    )
