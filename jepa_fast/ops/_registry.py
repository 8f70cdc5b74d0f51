"""What an operator is: a schema, a fake, and backends of which one runs a call.

Plumbing that knows no operator. Every `contract.py` builds its `Operator`s here; they exist as soon
as torch is imported, before anything is traced, and whether or not triton or the native library is
present. See CONTRIBUTING.md for a walk through one of them.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jepa_fast._arguments import switched_on
from jepa_fast.errors import BackendError
from jepa_fast.ops import _machine
from jepa_fast.ranges import around_operator, when_switched

NAMESPACE = "jepa_fast"
BACKENDS = ("cuda", "triton", "cpu", "reference")
"""Every backend's name, in the order in which `"auto"` tries them."""

# The registrations live as long as this object.
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
OPERATORS: dict[str, Operator] = {}
"""Every operator by the name in its schema: `OPERATORS["gather_patches"]`."""


def _serves_everything(*args: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Backend:
    """One way to run an operator.

    Args:
        function: `"package.module:function"`, imported at the first call; it takes the arguments of
            the schema without the trailing `backend`.
        unsupported: takes the same arguments and says, from metadata alone (shapes, strides,
            dtypes, devices), why this backend cannot serve them; an empty list if it can.
    """

    function: str
    unsupported: Callable[..., list[str]] = _serves_everything


@dataclass(eq=False)
class Operator:
    """A `torch.ops.jepa_fast` operator whose calls go to the first backend that can serve them.

    Args:
        schema: as `torch.library.Library.define` takes it. The last argument is `str backend`.
        fake: shapes and dtypes of the outputs from those of the inputs, for tracing; takes the
            arguments of the schema without `backend`.
        backends: by name, of `BACKENDS`. `"reference"` is always there.
        order: in which `"auto"` tries the backends, where benchmarks show another order than the
            default.

    `operator.call(...)` is the way in: the `torch.ops` overload, which eager code and
    `torch.compile` both take.
    """

    schema: str
    fake: Callable[..., Any]
    backends: dict[str, Backend]
    order: tuple[str, ...] = BACKENDS
    name: str = field(init=False)
    call: torch._ops.OpOverload = field(init=False)
    _loaded: dict[str, Callable[..., Any]] = field(init=False, default_factory=dict)
    _warned: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.name = self.schema.partition("(")[0]
        unknown = set(self.backends) - set(BACKENDS)
        if unknown or "reference" not in self.backends:
            raise ValueError(
                f"{self.name}: backends must be among {BACKENDS} and include 'reference', "
                f"got {sorted(self.backends)}"
            )
        LIBRARY.define(self.schema)
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self._run_fake, lib=LIBRARY)
        self.call = getattr(torch.ops.jepa_fast, self.name).default
        OPERATORS[self.name] = self

    def _serves(self, backend: str, args: tuple[Any, ...], types: set[str]) -> bool:
        """Whether `why_not` has nothing to say; the cheapest questions first."""
        return (
            _machine.takes(backend, types)
            and not _machine.missing(backend)
            and not self.backends[backend].unsupported(*args)
        )

    def why_not(self, backend: str, args: tuple[Any, ...]) -> list[str]:
        """Why `backend` cannot serve a call with these arguments; empty if it can."""
        if backend not in self.backends:
            return [f"{self.name} has no {backend} kernel"]
        missing = _machine.missing(backend)
        if missing:
            return missing
        wrong_device = _machine.wrong_device(backend, _machine.device_types(_tensors(args)))
        return wrong_device or self.backends[backend].unsupported(*args)

    def select(self, requested: str, args: tuple[Any, ...]) -> str:
        """The backend that serves a call.

        Raises:
            ValueError: `requested` is not a backend's name, or `JEPA_FAST_STRICT` says neither yes
                nor no.
            BackendError: `requested` (or `JEPA_FAST_BACKEND`) cannot serve the call, or the call
                would fall back to the reference under `JEPA_FAST_STRICT=1`.
        """
        source = "backend"
        if requested == "auto":
            requested = os.environ.get("JEPA_FAST_BACKEND") or "auto"
            source = "JEPA_FAST_BACKEND"
        if requested != "auto":
            if requested not in BACKENDS:
                raise ValueError(
                    f"{self.name}: {source} must be 'auto' or one of {BACKENDS}, got {requested!r}"
                )
            if self.why_not(requested, args):
                raise BackendError(self._explain(f"{source}={requested!r} cannot run", args))
            return requested
        types = _machine.device_types(_tensors(args)) or {"cpu"}
        for backend in self.order:
            if backend in self.backends and self._serves(backend, args, types):
                if backend == "reference":
                    self._note_fallback(args, types)
                return backend
        raise BackendError(self._explain("no backend can run", args))

    def _note_fallback(self, args: tuple[Any, ...], types: set[str]) -> None:
        """The reference serves everything, so landing there by accident must not go unseen."""
        if len(self.backends) > 1 and switched_on("JEPA_FAST_STRICT"):
            raise BackendError(
                self._explain("JEPA_FAST_STRICT=1 forbids the fall-back to the reference of", args)
            )
        if "cuda" not in types:
            return
        message = self._explain("the plain PyTorch reference runs on a CUDA tensor in", args)
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def _explain(self, what: str, args: tuple[Any, ...]) -> str:
        lines = [f"{what} {self.name}:"]
        for backend in self.order:
            reasons = self.why_not(backend, args)
            lines.append(f"  {backend}: {'; '.join(reasons) if reasons else 'can'}")
        lines.append("`jepa-fast info` shows what this machine can run and how to add the rest.")
        return "\n".join(lines)

    def _run(self, *args: Any) -> Any:
        if torch.is_grad_enabled():  # for a program of torch.export's, which has operators alone
            with torch.no_grad():
                return self._run(*args)
        inputs = args[:-1]
        function = self.function(self.select(args[-1], inputs))
        if not torch._C._is_any_autocast_enabled():
            return function(*inputs)
        device = _device(inputs)
        if device is None or not torch.is_autocast_enabled(device):
            return function(*inputs)
        # Operators compute in the dtypes they are given, the same under autocast as without.
        with torch.autocast(device, enabled=False):
            return function(*inputs)

    def _run_fake(self, *args: Any) -> Any:
        *inputs, _ = args
        # Numbers may lie anywhere: momenta and seeds of shape [].
        types = _machine.device_types([each for each in _tensors(inputs) if each.ndim > 0])
        if "meta" in types and len(types) > 1:
            raise ValueError(
                f"{self.name}: tensors must be on one device, got {sorted(types)}; move them with "
                "tensor.to(device)"
            )
        return self.fake(*inputs)

    def function(self, backend: str) -> Callable[..., Any]:
        """The function behind `backend`, imported at the first use; in its range, if on."""
        function = self._loaded.get(backend)
        if function is None:
            module, _, name = self.backends[backend].function.partition(":")
            function = getattr(importlib.import_module(module), name)
            function = self._loaded[backend] = around_operator(self.name, backend, function)
        return function

    def forget_functions(self) -> None:
        """Has the functions looked up again, with or without ranges."""
        self._loaded = {}


def _forget_functions() -> None:
    for operator in OPERATORS.values():
        operator.forget_functions()


when_switched(_forget_functions)


def _device(args: Iterable[Any]) -> str | None:
    """The type of the first tensor's device."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device.type
        if isinstance(arg, (list, tuple)) and arg:
            return _device(arg)
    return None


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):  # of a schema's list, not nested
            found += [each for each in arg if isinstance(each, Tensor)]
    return found
