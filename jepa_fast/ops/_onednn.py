"""Products of matrices by oneDNN, where it is the quicker of the libraries that PyTorch has.

A product in float32 goes to MKL, which keeps its best kernels for Intel's processors. On AMD's
oneDNN, which PyTorch takes for half precision and convolutions, makes a large one in 0.85 to 0.95
of the time (AMD EPYC with AVX-512, one and two threads), and in two thirds where the number of
outputs is odd.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from jepa_fast.ops._autograd import is_transformed

LEAST_MULTIPLICATIONS = 2**26
"""Below, a millisecond on a core, calls cost more than the products gain."""

LEAST_WIDTH = 128
"""Of inputs and outputs: with less oneDNN is not quicker."""


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `product` serves these, and is quicker than `torch.nn.functional.linear`."""
    return (
        x.device.type == "cpu"
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and x.dtype == weight.dtype == torch.float32
        and weight.ndim == 2
        and min(weight.shape) >= LEAST_WIDTH
        and x.shape[-1:] == weight.shape[1:]
        and x.numel() * weight.shape[0] >= LEAST_MULTIPLICATIONS
        and all(
            each.device.type == "cpu" and type(each) in (Tensor, nn.Parameter)
            for each in (x, weight, *([] if bias is None else [bias]))
        )
        and (bias is None or (bias.dtype == torch.float32 and bias.shape == weight.shape[:1]))
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
        and torch._C._get_mkldnn_enabled()
        and _is_quicker_here()
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``[..., I]`` and ``[O, I]`` to ``[..., O]``, without a gradient."""
    if not weight.t().is_contiguous():  # a transposed one, as of backward passes, is read as it is
        weight = weight.contiguous()
    # The last three arguments are for what may follow the product: here nothing.
    return torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), weight, bias, "none", [], "")


@functools.cache
def _is_quicker_here() -> bool:
    """Whether there are both libraries, and the processor is one that MKL does not favour."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    processors = Path("/proc/cpuinfo")
    return processors.exists() and "AuthenticAMD" in processors.read_text()
