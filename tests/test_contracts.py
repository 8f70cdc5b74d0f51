"""What holds for every operator, run over the `SAMPLES` of every `test_<op>.py`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import Sample
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from jepa_fast import ops
from jepa_fast.ops._registry import OPERATORS


def _samples() -> list[Any]:
    found = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path != Path(__file__) and "\nSAMPLES" in path.read_text():
            module = importlib.import_module(path.stem)
            found += [pytest.param(s, id=f"{path.stem[5:]}-{s.name}") for s in module.SAMPLES]
    return found


SAMPLES = _samples()
each_sample = pytest.mark.parametrize("sample", SAMPLES)
each_differentiable_sample = pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if s.values[0].differentiable]
)

# What users get, and the specification, which others are held to.
each_choice = pytest.mark.parametrize("choice", ["auto", "reference"])


def _floating(arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that take gradients, lists opened."""
    flat = [x for a in arguments for x in (a if isinstance(a, (list, tuple)) else [a])]
    return [x for x in flat if isinstance(x, Tensor) and x.requires_grad]


def _with_leaves(arguments: Any, leaves: Iterator[Tensor]) -> Any:
    """The arguments with other tensors in the places of those that take gradients."""
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(_with_leaves(a, leaves) for a in arguments)
    takes_gradient = isinstance(arguments, Tensor) and arguments.requires_grad
    return next(leaves) if takes_gradient else arguments


def _gradients(outputs: tuple[Tensor, ...], upstream: list[Tensor], arguments: Any) -> list[Tensor]:
    pairs = [(o, u) for o, u in zip(outputs, upstream, strict=True) if o.requires_grad]
    return list(
        torch.autograd.grad(
            [o for o, _ in pairs], _floating(arguments), [u for _, u in pairs], allow_unused=True
        )
    )


class _Calls(TorchDispatchMode):
    """Records the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "jepa_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def test_every_operator_has_a_sample() -> None:
    reached = {name for parameter in SAMPLES for name in parameter.values[0].operators}
    assert reached == set(OPERATORS)


@each_differentiable_sample
@each_choice
def test_gradcheck(sample: Sample, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JEPA_FAST_BACKEND", choice)
    arguments = sample.arguments()
    wanted = _floating(arguments)

    def of_wanted(*values: Tensor) -> tuple[Tensor, ...]:
        outputs = sample.call(*_with_leaves(arguments, iter(values)))
        return tuple(o for o in outputs if o.is_floating_point())

    if any(x.numel() == 0 for x in of_wanted(*wanted)):
        # gradcheck refuses empty outputs; their gradients are zeros of the inputs' shapes.
        outputs = of_wanted(*wanted)
        grads = _gradients(outputs, [torch.ones_like(o) for o in outputs], arguments)
        for x, grad in zip(wanted, grads, strict=True):
            assert grad is None or (grad.shape == x.shape and not grad.any())
        return
    # Nondeterminism tolerance 0: two runs are bit-identical.
    assert torch.autograd.gradcheck(of_wanted, tuple(wanted), nondet_tol=0.0)


@each_sample
def test_opcheck(sample: Sample) -> None:
    arguments = sample.arguments()
    with _Calls() as recorded:
        outputs = sample.call(*arguments)
        if sample.differentiable:
            # Not 1, which an operator may take for the factor that it is.
            _gradients(outputs, [torch.full_like(o, 0.5) for o in outputs], arguments)
    assert {func.name().partition("::")[2] for func, _ in recorded.calls} >= set(sample.operators)

    def detach(a: Any) -> Any:
        if isinstance(a, (list, tuple)):
            return type(a)(detach(x) for x in a)
        return a.detach().clone() if isinstance(a, Tensor) else a

    for func, args in recorded.calls:
        torch.library.opcheck(func, tuple(map(detach, args)))


@each_differentiable_sample
def test_operators_run_where_gradients_are_recorded(sample: Sample) -> None:
    """As those in a program that torch.export made, of which nothing is above them."""

    def as_kernels_take(x: Any) -> Any:
        wide = isinstance(x, Tensor) and x.dtype == torch.float64
        return x.detach().float().requires_grad_(x.requires_grad) if wide else x

    with _Calls() as recorded:
        sample.call(*tree_map(as_kernels_take, sample.arguments()))
    for func, args in recorded.calls:
        with torch.no_grad():
            expected = tree_leaves(func(*args))
        assert all(map(torch.equal, tree_leaves(func(*args)), expected))


@each_sample
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_break(sample: Sample, dynamic: bool) -> None:
    """Sizes of two kinds; at dynamic shapes the second needs no graph of its own."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sample.call, fullgraph=True, dynamic=dynamic, backend=graphs)
    counts = []
    for make in (sample.arguments, sample.larger_arguments):
        arguments, again = make(), make()
        expected, outputs = sample.call(*arguments), compiled(*again)
        upstream = [torch.ones_like(o) for o in expected]
        for got, want in zip(outputs, expected, strict=True):
            torch.testing.assert_close(got, want)
        if sample.differentiable:
            want_grads = _gradients(expected, upstream, arguments)
            for got, want in zip(_gradients(outputs, upstream, again), want_grads, strict=True):
                torch.testing.assert_close(got, want)
        counts.append(graphs.frame_count)
    if dynamic:
        assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "sample", {s.values[0].operators: s for s in SAMPLES if s.values[0].differentiable}.values()
)
def test_compiles_where_nothing_takes_a_gradient(sample: Sample) -> None:
    """One sample an operator."""
    torch._dynamo.reset()
    arguments = sample.arguments()
    compiled = torch.compile(sample.call, fullgraph=True, backend="eager")
    with torch.no_grad():
        for got, want in zip(compiled(*arguments), sample.call(*arguments), strict=True):
            torch.testing.assert_close(got, want)


@each_differentiable_sample
@each_choice
def test_any_strides(sample: Sample, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs transposed, upstream gradients sliced and of stride 0: the same results."""
    monkeypatch.setenv("JEPA_FAST_BACKEND", choice)
    arguments = sample.arguments()
    outputs = sample.call(*arguments)

    def restride(a: Any) -> Any:
        if isinstance(a, (list, tuple)):
            return type(a)(restride(x) for x in a)
        if not isinstance(a, Tensor):
            return a
        # The same values behind every other element of a larger, transposed block.
        block = a.new_zeros([2 * n for n in reversed(a.shape)])
        view = block[tuple(slice(None, None, 2) for _ in a.shape)]
        view = view.permute(*reversed(range(a.ndim)))
        view.copy_(a.detach())
        return view.requires_grad_(a.requires_grad)

    strided = tuple(map(restride, arguments))
    strided_outputs = sample.call(*strided)
    for got, want in zip(strided_outputs, outputs, strict=True):
        torch.testing.assert_close(got, want)

    generator = torch.Generator().manual_seed(1)
    sliced = [
        torch.randn([2 * n for n in o.shape], generator=generator, dtype=torch.float64).to(o.dtype)[
            tuple(slice(None, None, 2) for _ in o.shape)
        ]
        for o in outputs
    ]
    stride_0 = [o.new_full((), 0.5).expand(o.shape) for o in outputs]
    for upstream in (sliced, stride_0):
        want_grads = _gradients(
            sample.call(*arguments), [u.contiguous() for u in upstream], arguments
        )
        got_grads = _gradients(sample.call(*strided), upstream, strided)
        for got, want in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(got, want)


@each_differentiable_sample
def test_first_derivatives_with_a_graph_and_no_second(sample: Sample) -> None:
    arguments = sample.arguments()
    wanted = _floating(arguments)

    def total(*leaves: Tensor) -> Tensor:
        outputs = sample.call(*_with_leaves(arguments, iter(leaves)))
        return sum(o.square().sum() for o in outputs if o.is_floating_point())

    expected = torch.autograd.grad(total(*wanted), wanted)
    with_graph = torch.autograd.grad(total(*wanted), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(sum(g.sum() for g in with_graph), wanted, allow_unused=True)

    leaves, places = [x.detach() for x in wanted], tuple(range(len(wanted)))
    first = torch.func.grad(total, argnums=places)
    for got, graph, want in zip(first(*leaves), with_graph, expected, strict=True):
        assert torch.equal(got, want)
        assert torch.equal(graph, want)
    # By one argument first and all of them then: also where the first pass does not track them.
    one = torch.func.grad(total, argnums=len(wanted) - 1)
    for before in (lambda *x: sum(g.sum() for g in first(*x)), lambda *x: one(*x).sum()):
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.func.grad(before, argnums=places)(*leaves)


@each_differentiable_sample
def test_second_derivatives_are_refused_of_sums_too(sample: Sample) -> None:
    """The gradient of a sum does not depend on the operator's outputs, but may on its inputs."""
    arguments = sample.arguments()
    wanted = _floating(arguments)

    def total(*leaves: Tensor) -> Tensor:
        outputs = sample.call(*_with_leaves(arguments, iter(leaves)))
        return sum(o.sum() for o in outputs if o.is_floating_point())

    def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(total(*leaves), leaves, create_graph=True)

    here = gradients(*wanted)
    elsewhere = gradients(*((x.detach() * 1.5 + 0.1).requires_grad_() for x in wanted))
    if all(torch.allclose(*pair) for pair in zip(here, elsewhere, strict=True)):
        return  # linear: all second derivatives are 0
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(sum(g.sum() for g in here), wanted, allow_unused=True)
    places = tuple(range(len(wanted)))
    first = torch.func.grad(total, argnums=places)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(lambda *x: sum(g.sum() for g in first(*x)), argnums=places)(
            *(x.detach() for x in wanted)
        )


@each_differentiable_sample
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_under_a_checkpoint(sample: Sample, create_graph: bool) -> None:
    """Which hands out what was saved once."""
    arguments = sample.arguments()
    wanted = _floating(arguments)

    def total(*leaves: Tensor) -> Tensor:
        outputs = sample.call(*_with_leaves(arguments, iter(leaves)))
        return sum(o.sum() for o in outputs if o.is_floating_point())

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, wanted, create_graph=create_graph)

    got = gradients(checkpoint(total, *wanted, use_reentrant=False))
    for one, other in zip(got, gradients(total(*wanted)), strict=True):
        assert torch.equal(one, other)


@each_differentiable_sample
def test_many_gradients_at_once_are_right_or_refused(sample: Sample) -> None:
    arguments = sample.arguments()
    wanted = _floating(arguments)
    output = next(o for o in sample.call(*arguments) if o.requires_grad)
    above = torch.stack([torch.ones_like(output), torch.full_like(output, 2.0)])
    refused = ""
    try:
        together = torch.autograd.grad(
            output, wanted, above, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
    except RuntimeError as error:
        refused = str(error)
    if refused:
        assert "expected one gradient from above" in refused
        return
    for i, each in enumerate(above):
        one = torch.autograd.grad(output, wanted, each, retain_graph=True, allow_unused=True)
        for got, want in zip(together, one, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got[i], want)


@each_differentiable_sample
def test_gradients_ask_for_no_values(sample: Sample) -> None:
    """As estimates of memory want it, which run a training step on fake tensors, and make_fx."""
    arguments = sample.arguments()
    wanted = _floating(arguments)

    def gradients(*leaves: Tensor) -> list[Tensor]:
        output = next(o for o in sample.call(*_with_leaves(arguments, iter(leaves))) if o.grad_fn)
        return list(torch.autograd.grad(output.sum(), leaves, allow_unused=True))

    expected = gradients(*wanted)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x.detach()).requires_grad_() for x in wanted]
        for got, want in zip(gradients(*fake), expected, strict=True):
            assert (got is None) == (want is None)
            assert got is None or got.shape == want.shape
    traced = make_fx(gradients)(*wanted)
    for got, want in zip(traced(*wanted), expected, strict=True):
        assert got is None or torch.equal(got, want)


@each_differentiable_sample
def test_vmap_is_refused(sample: Sample) -> None:
    arguments = sample.arguments()
    mapped = [x.detach()[None] for x in _floating(arguments)]
    with pytest.raises(RuntimeError, match=r"arguments mapped by torch\.func\.vmap"):
        torch.func.vmap(lambda *x: sample.call(*_with_leaves(arguments, iter(x))))(*mapped)


@each_differentiable_sample
def test_forward_mode_is_refused(sample: Sample) -> None:
    arguments = sample.arguments()
    leaves = tuple(x.detach() for x in _floating(arguments))

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return sample.call(*_with_leaves(arguments, iter(leaves)))

    with pytest.raises(RuntimeError, match=r"got one with a tangent.*torch\.autograd\.grad"):
        torch.func.jvp(call, leaves, leaves)
    with torch.autograd.forward_ad.dual_level():
        call(*leaves)  # nothing has a tangent
        dual = torch.autograd.forward_ad.make_dual(leaves[0], leaves[0])
        with pytest.raises(RuntimeError, match="got one with a tangent"):
            call(dual, *leaves[1:])


@each_differentiable_sample
def test_sparse_tensors_are_refused(sample: Sample) -> None:
    _each_refused(sample, lambda x: x.detach().to_sparse(), "must be dense")


@each_differentiable_sample
def test_fp8_is_refused_where_it_would_be_computed_with(sample: Sample) -> None:
    if sample.function in (ops.gather_patches, ops.gather_packed):
        return  # they move rows of any floating dtype
    _each_refused(
        sample, lambda x: x.detach().to(torch.float8_e4m3fn), "times its scale|the dtype of"
    )


def _each_refused(sample: Sample, change: Callable[[Tensor], Tensor], message: str) -> None:
    arguments = sample.arguments()
    leaves = [x.detach() for x in _floating(arguments)]
    for i, leaf in enumerate(leaves):
        with pytest.raises(TypeError, match=message):
            sample.call(
                *_with_leaves(arguments, iter([*leaves[:i], change(leaf), *leaves[i + 1 :]]))
            )


@each_sample
def test_meta_tensors_and_others_do_not_go_together(sample: Sample) -> None:
    arguments = sample.arguments()
    flat = [x for x in arguments if isinstance(x, Tensor) and x.ndim > 0]
    if len(flat) < 2:
        return
    moved = [x.to("meta") if x is flat[0] else x for x in arguments]
    with pytest.raises((ValueError, RuntimeError), match="device"):
        sample.call(*moved)


@each_sample
def test_unknown_and_missing_backends(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = sample.arguments()
    with pytest.raises(ValueError, match="must be 'auto' or one of"):
        sample.function(*arguments, **sample.keywords, backend="fastest")
    monkeypatch.setenv("JEPA_FAST_BACKEND", "")  # as good as none
    sample.call(*arguments)
    monkeypatch.setenv("JEPA_FAST_BACKEND", "fastest")
    with pytest.raises(ValueError, match="JEPA_FAST_BACKEND"):
        sample.call(*arguments)
