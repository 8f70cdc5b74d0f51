"""Chunks of tokens through torch's products and the C++ kernel of `mixture_nll`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jepa_fast.ops.linear_mixture_nll.chunked import in_chunks
from jepa_fast.ops.mixture_nll import native


def linear_mixture_nll(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """As `reference.linear_mixture_nll_and_gradients`."""
    return in_chunks(native.nll_and_posterior, native.mixture_nll_and_gradients_, *arguments)
