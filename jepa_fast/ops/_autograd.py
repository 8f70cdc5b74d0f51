"""What the operators' backward passes share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from jepa_fast.ops._checks import may_be_read

_Backward = Callable[..., tuple[Tensor | None, ...]]
_REFERENCE = "use the plain PyTorch of jepa_fast/ops/{}/reference.py"

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
    with recording():
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
def recording() -> Iterator[None]:
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


class OperatorFunction(torch.autograd.Function):
    """What the operators' functions have in common: torch.func.vmap is refused.

    `apply` takes all arguments of `forward`, in their order.

    Attributes:
        plain: the same function as torch had them before `setup_context`: neither torch.func nor
            torch.compile takes it, and eager calls cost less.
    """

    plain: type[torch.autograd.Function]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.forward.__signature__ = _AllInOrder(  # type: ignore[attr-defined]
            list(inspect.signature(cls.forward).parameters.values())
        )

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = cls.forward(*arguments)
            cls.setup_context(ctx, arguments, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(cls.backward)}
        cls.plain = type(cls.__name__, (torch.autograd.Function,), methods)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        raise RuntimeError(
            "the operators of jepa_fast.ops expected whole batches, got arguments mapped by "
            "torch.func.vmap, by jacrev or the like; call them with the batch, or in a loop"
        )


def applied(function: type[OperatorFunction], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, or its `forward` alone where autograd has nothing to record.

    That takes half the time. And where no argument takes a gradient, torch.compile would trace a
    `forward` of which it cannot tell how many arguments it takes with a context before them.
    """
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        _refuse_tangents(arguments)
    recorded = torch.is_grad_enabled() and any(
        isinstance(each, Tensor) and each.requires_grad for each in arguments
    )
    if torch.compiler.is_compiling():
        return function.apply(*arguments) if recorded else function.forward(*arguments)
    if is_transformed():
        return function.apply(*arguments)
    return function.plain.apply(*arguments) if recorded else function.forward(*arguments)


def _refuse_tangents(arguments: tuple[Any, ...]) -> None:
    # Not by a `jvp` of OperatorFunction: torch.compile refuses functions that have one.
    for each in arguments:
        if isinstance(each, Tensor) and forward_ad.unpack_dual(each).tangent is not None:
            raise RuntimeError(
                "the operators of jepa_fast.ops expected tensors without forward-mode derivatives, "
                "got one with a tangent, by torch.func.jvp, jacfwd or the like; take gradients, by "
                "torch.autograd.grad"
            )


def is_transformed() -> bool:
    """Whether torch.func, or differentiation in forward mode, looks on: `apply` refuses these."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def may_be_saved(tensor: Tensor) -> bool:
    """Whether autograd keeps such a tensor for a backward pass: none that inference mode has made,
    but in that mode, where nothing is kept.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return True
    return not tensor.is_inference()


def keep_slopes(ctx: Any, *slopes: Tensor) -> None:
    """Keeps for the backward pass those outputs that are its gradients but for a factor.

    They stay differentiable, so that a second derivative finds its way through them to the inputs,
    where `differentiable_once` refuses it, and not to a silent zero.
    """
    if torch.compiler.is_compiling():  # where torch refuses it, and outputs need gradients
        ctx.mark_non_differentiable(*slopes)
    else:
        ctx.set_materialize_grads(False)
    ctx.save_for_backward(*slopes)


class _AllInOrder(inspect.Signature):
    """Binds nothing: torch has the arguments of every `apply` bound to `forward`, at 40 us a call,
    to fill in defaults.
    """

    def bind(self, *args: Any, **keywords: Any) -> Any:
        return _Bound(args)


class _Bound:
    """What torch uses of `inspect.BoundArguments`."""

    __slots__ = ("args", "kwargs")

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args
        self.kwargs: dict[str, Any] = {}

    def apply_defaults(self) -> None:
        return None


def is_the_gradient(slope: Tensor, grad: Tensor, dtype: torch.dtype) -> bool:
    """Whether `slope`, the gradient of a loss but for the factor `grad`, may be handed on as it is:
    a last use, with the factor 1, on a CPU, where asking for its value costs nothing.
    """
    return (
        may_be_read(grad)
        and torch._C._len_torch_dispatch_stack() == 0  # as of make_fx, where reading fails
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and slope.dtype == dtype
        and grad.device.type == "cpu"
        and not torch._C._functorch.is_legacy_batchedtensor(grad)  # many at once have no value
        and float(grad) == 1.0
    )


def differentiable_once(name: str, instead: str = "") -> Callable[[_Backward], _Backward]:
    """Lets the backward pass of operator `name` run with `create_graph=True`, as torch.func.grad
    always does; its results raise RuntimeError where they are differentiated themselves, and say
    what serves `instead`, by default the operator's reference.

    torch's own `once_differentiable` gives silent zeros for second derivatives by torch.func.

    The decorated function takes the saved tensors after the context, and leaves `ctx.saved_tensors`
    alone: under `torch.utils.checkpoint` they can be had once.
    """

    def decorate(backward: _Backward) -> _Backward:
        def whole(*arguments: Any) -> tuple[Tensor | None, ...]:
            try:
                return backward(*arguments)
            except RuntimeError as error:
                if "Batching rule not implemented" not in str(error):
                    raise
                raise RuntimeError(
                    f"{name} expected one gradient from above, got many at once, by "
                    "is_grads_batched=True, torch.func.jacrev or the like; take them in a loop"
                ) from error

        @functools.wraps(backward)
        def once(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            if grads[0] is None:  # as only those of `keep_slopes` see: nothing follows from it
                return (None,) * len(ctx.needs_input_grad)
            saved = ctx.saved_tensors
            # A compiled graph refuses second derivatives by itself.
            if torch.compiler.is_compiling():
                return backward(ctx, saved, *grads)
            if not torch.is_grad_enabled():
                return whole(ctx, saved, *grads)
            with torch.no_grad():
                results = whole(ctx, saved, *grads)
            present = [result for result in results if result is not None]
            # Whatever the results depend on: they require gradients where any of it does.
            ends = _End.apply(
                f"{name} is differentiable once: a second derivative through it was asked for. For "
                f"higher derivatives {instead or _REFERENCE.format(name)}.",
                len(present),
                *present,
                *grads,
                *saved,
            )
            return spread(ends, [result is not None for result in results])

        return once

    return decorate


class _End(OperatorFunction):
    """Hands on the first `count` tensors; they have no gradient for any of the tensors."""

    @staticmethod
    def forward(why: str, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(tensor.detach() for tensor in tensors[:count] if tensor is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.why = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(ctx.why)
