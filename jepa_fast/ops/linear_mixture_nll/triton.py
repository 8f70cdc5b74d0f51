"""Chunks of tokens through torch's products and the Triton kernel of `mixture_nll`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jepa_fast.ops._compile import CompileCase
from jepa_fast.ops._launch import recorded_cases
from jepa_fast.ops._traffic import TrafficCase
from jepa_fast.ops.linear_mixture_nll.chunked import in_chunks
from jepa_fast.ops.mixture_nll import triton
from jepa_fast.ops.mixture_nll.reference import mixture_parameter_count, split_mixture_parameters
from jepa_fast.perf.race import Cost


def linear_mixture_nll(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """As `reference.linear_mixture_nll_and_gradients`."""
    return in_chunks(triton.nll_and_posterior, triton.mixture_nll_and_gradients_, *arguments)


def _likelihood(
    dtype: torch.dtype, tokens: int, components: int, width: int, event: str, family: str
) -> Tensor:
    """The kernel's part of a chunk: likelihood and gradients in place of a layer's outputs."""
    outputs = torch.ones(tokens, mixture_parameter_count(components, width, event), dtype=dtype)
    parameters = split_mixture_parameters(outputs, components, width, event)
    return triton.mixture_nll_and_gradients_(
        torch.ones(tokens, width), *parameters, family, event, 1e-3, "exp", 1.0, None
    )


def compile_cases() -> list[CompileCase]:
    """The kernel on a layer's outputs: of joint events a row's parts lie anywhere."""
    calls: dict[str, Callable[[], object]] = {
        f"linear_mixture_nll-{str(dtype).removeprefix('torch.')}-{event}-{components}": partial(
            _likelihood, dtype, 8, components, 1024, event, family
        )
        for dtype, components, event, family in (
            (torch.bfloat16, 8, "joint", "gaussian"),
            (torch.bfloat16, 32, "coordinate", "gaussian"),
            (torch.float32, 5, "coordinate", "logistic"),
        )
    }
    return recorded_cases(triton.CONFIGS, calls, narrow=frozenset(calls))  # as those alone


def traffic_cases() -> list[TrafficCase]:
    """Several blocks of coordinates, each read and written once."""
    tokens, components, width = 3, 5, 700
    parameters = 4 * 3 * tokens * components * width
    targets, numbers = 4 * tokens * width, 4 * tokens
    call = partial(_likelihood, torch.float32, tokens, components, width, "coordinate", "gaussian")
    cost = Cost(read=parameters + targets + numbers, written=parameters + numbers)
    return [TrafficCase("linear_mixture_nll", call, cost)]
