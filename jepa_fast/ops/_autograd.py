"""What the operators' backward passes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_AUTOGRAD_KEYS = (
    torch._C.DispatchKey.AutogradFunctionality,
    torch._C.DispatchKey.AutogradCPU,
    torch._C.DispatchKey.AutogradCUDA,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.ADInplaceOrView,
)


def recomputed_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    grad_outputs: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of `function(*inputs)` for the inputs marked in `needs`, by running it again.

    The reference backend's backward pass: nothing but the inputs is saved between the passes.

    Raises:
        RuntimeError: autograd recorded nothing, so that the gradients would be silent zeros.
    """
    leaves = [
        tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, needs, strict=True)
    ]
    with _recording():
        outputs = function(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        reached = [
            pair for pair in zip(outputs, grad_outputs, strict=True) if pair[0].requires_grad
        ]
        if not reached:
            raise RuntimeError("autograd did not record the operator's reference")
        return list(
            torch.autograd.grad(
                [output for output, _ in reached],
                [leaf for leaf in leaves if leaf.requires_grad],
                [grad for _, grad in reached],
                materialize_grads=True,
            )
        )


@contextmanager
def _recording() -> Iterator[None]:
    """Lets autograd record, which operators called by compiled code are otherwise below."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def spread(grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Puts the gradients of the inputs marked in `needs` into their places, None elsewhere."""
    remaining = iter(grads)
    return tuple(next(remaining) if need else None for need in needs)


def refuse_double_backward(name: str) -> None:
    """Raises where autograd would need the gradient of `name`'s backward pass.

    Raises:
        RuntimeError: the backward pass runs with `create_graph=True`.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} is differentiable once: its backward pass was called with create_graph=True. "
            f"For higher derivatives use the plain PyTorch of jepa_fast/ops/{name}/reference.py."
        )
