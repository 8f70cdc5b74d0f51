"""What a `test_<op>.py` says of its operator, for the suite in `test_contracts.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One call of a public operator.

    Args:
        name: what is special about it; part of the test's id.
        function: the public operator, `jepa_fast.ops.gather_patches`.
        operators: names of the registered operators that the call reaches, forward and backward.
        make: (dtype, generator) -> positional arguments; tensors only, floating ones in `dtype`.
            Those that take gradients have requires_grad set.
        keywords: keyword arguments, no tensors among them.
        differentiable: whether some argument takes a gradient.
        make_larger: `make` with other sizes, where these cannot simply be doubled.
    """

    name: str
    function: Callable[..., Any]
    operators: tuple[str, ...]
    make: Callable[[torch.dtype, torch.Generator], tuple[Any, ...]]
    keywords: dict[str, Any] = field(default_factory=dict)
    differentiable: bool = True
    make_larger: Callable[[torch.dtype, torch.Generator], tuple[Any, ...]] | None = None

    def arguments(self, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        """Fresh arguments, the same at every call."""
        return self.make(dtype, torch.Generator().manual_seed(0))

    def larger_arguments(self, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        """Arguments of twice every size, except 0 and 1: torch.compile takes these as constants."""
        if self.make_larger is not None:
            return self.make_larger(dtype, torch.Generator().manual_seed(0))

        def double(a: Any) -> Any:
            if isinstance(a, (list, tuple)):
                return type(a)(double(x) for x in a)
            if not isinstance(a, Tensor):
                return a
            repeats = [2 if size > 1 else 1 for size in a.shape]
            return a.detach().repeat(repeats).requires_grad_(a.requires_grad)

        return tuple(double(a) for a in self.arguments(dtype))

    def call(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The operator's outputs, always as a tuple."""
        output = self.function(*arguments, **self.keywords)
        return (output,) if isinstance(output, Tensor) else tuple(output)


def normal(
    *shape: int, dtype: torch.dtype, generator: torch.Generator, grad: bool = True
) -> Tensor:
    """A standard normal tensor."""
    return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_(grad)


def indices(
    size: int, *shape: int, generator: torch.Generator, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Patch indices in [0, size), with repetitions."""
    return torch.randint(0, max(size, 1), shape, generator=generator).to(dtype)
