"""latent_loss, whose eager way is LayerNorm of whole images, a gather and a loss of torch's."""

from __future__ import annotations

import torch
from cases import VIT_L, VIT_S, latent_loss_cost
from plain import backend_of, distinct_patches, drawn_patches, operator_race, values

from jepa_fast.perf import Case, Race, benchmark

_SMALL = {"B": 8, "N": 64, "D": 192, "M": 4, "Kt": 11}
_S = {size: VIT_S[size] for size in _SMALL}
_L = {size: VIT_L[size] for size in _SMALL}
_L2_NORM = "l2-norm-"


@benchmark(
    [
        Case("latent_loss", "small", _SMALL, quick=True),
        Case("latent_loss", "vit-s", _S, devices=("cpu",)),
        Case("latent_loss", f"{_L2_NORM}vit-s", _S, devices=("cpu",)),
        Case("latent_loss", "vit-l", _L, "bfloat16", ("cuda",)),
        Case("latent_loss", f"{_L2_NORM}vit-l", _L, "bfloat16", ("cuda",)),
    ]
)
def bench_latent_loss(case: Case, device: str) -> Race:
    """Forward and backward: I-JEPA's smooth L1, or TC-JEPA's norm."""
    batch, patches, width, blocks = (case[size] for size in ("B", "N", "D", "M"))
    shape = (blocks * batch, case["Kt"], width)
    prediction = values(*shape, dtype=case.dtype, device=device, grad=True)
    teacher = values(batch, patches, width, dtype=case.dtype, device=device, seed=1)
    index = drawn_patches(batch, blocks, case["Kt"], patches=patches, device=device)
    kind = "l2_norm" if case.name.startswith(_L2_NORM) else "smooth_l1"
    return operator_race(
        case,
        device,
        latent_loss_cost(case, backward=True, distinct=distinct_patches(index)),
        (prediction, teacher, index),
        {"kind": kind},
        backend=backend_of(
            "latent_loss", prediction, teacher, index, None, kind, True, 1.0, 1e-5, True
        ),
        grads=[torch.ones((), device=device)],
    )
