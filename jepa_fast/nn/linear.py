"""Linear layers: on a CPU their products go to the quicker of the two libraries that PyTorch has.

``torch.nn.functional.linear`` in float32 goes to MKL, which keeps its best kernels for Intel's
processors. On AMD's oneDNN, which PyTorch takes for half precision and convolutions, makes a large
product in 0.85 to 0.95 of the time (AMD EPYC with AVX-512, one and two threads).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast.ops._autograd import is_transformed

LEAST_MULTIPLICATIONS = 2**26
"""Below, a millisecond on a core, calls cost more than the products gain."""

LEAST_WIDTH = 128
"""Of inputs and outputs: with less oneDNN is not quicker."""


class Linear(nn.Linear):
    """:class:`torch.nn.Linear`, by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return linear(input, self.weight, self.bias)


def is_what_its_weights_say(layer: nn.Module, kind: type[nn.Linear] = Linear) -> bool:
    """Whether weight and bias of a layer of a ``kind`` are all there is to it, so that they may be
    read instead.

    They are not of a layer with an adapter around it (LoRA), with a ``forward`` of its own, or with
    a weight that a hook makes at every call (:func:`torch.nn.utils.weight_norm`).
    """
    return (
        isinstance(layer, nn.Linear)
        and type(layer).forward in (nn.Linear.forward, kind.forward)
        and "weight" not in vars(layer)
    )


def check_is_what_its_weights_say(
    owner: str, name: str, layer: nn.Module, kind: type[nn.Linear] = Linear
) -> None:
    """Refuse a layer whose weights are read and which has more to say.

    Raises:
        TypeError: as :func:`is_what_its_weights_say` has it.
    """
    if not is_what_its_weights_say(layer, kind):
        raise TypeError(
            f"{owner}: {name} is read and not called, so it must be a linear layer as it was made, "
            f"got {type(layer).__name__}; leave it out of what adapters and weight norms are for, "
            "or merge them into its weight"
        )


def has_hooks(layer: nn.Module) -> bool:
    """Whether something waits for the layer to be called."""
    return bool(
        layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear`, to rounding, by the quicker library.

    That is oneDNN for large float32 products on AMD's CPUs, outside ``torch.compile``, autocast,
    ``torch.func`` and tracing. ``torch.backends.mkldnn.flags(enabled=False)`` keeps everything with
    ``torch.nn.functional.linear``.

    Args:
        x: ``[..., I]``.
        weight: ``[O, I]``.
        bias: ``[O]``.

    Returns:
        ``[..., O]``.
    """
    if not goes_to_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _OneDnnLinear.apply(x, weight, bias)
    return _product(x, weight, bias)


def goes_to_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`linear` takes oneDNN for these."""
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
        and _onednn_is_quicker()
    )


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Of operations with gradients, for second derivatives.
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            linear(grad, weight.t()) if to_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not weight.t().is_contiguous():  # a transposed one, as of backward passes, is read as it is
        weight = weight.contiguous()
    # The last three arguments are for what may follow the product: here nothing.
    return torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), weight, bias, "none", [], "")


@functools.cache
def _onednn_is_quicker() -> bool:
    """Whether there are both libraries, and the processor is one that MKL does not favour."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    processors = Path("/proc/cpuinfo")
    return processors.exists() and "AuthenticAMD" in processors.read_text()
