"""Linear layers by oneDNN: as accurate as PyTorch's, with its gradients, and only where asked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast.nn import linear as module
from jepa_fast.nn.linear import LEAST_MULTIPLICATIONS, LEAST_WIDTH, Linear, goes_to_onednn, linear

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN"
)
SHAPES = [(300, 128, 128), (513, 384, 1536), (129, 1000, 131)]


@pytest.fixture(autouse=True)
def _by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor, and for products as small as tests want them."""
    monkeypatch.setattr(module, "_onednn_is_quicker", lambda: True)
    monkeypatch.setattr(module, "LEAST_MULTIPLICATIONS", 1)


def given(rows: int, width: int, out: int, bias: bool = True) -> list[Tensor]:
    torch.manual_seed(rows)
    tensors = [torch.randn(rows, width), torch.randn(out, width) / width**0.5]
    return [*tensors, torch.randn(out)] if bias else tensors


def run(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Result and gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    seed = torch.linspace(-1, 1, y.numel()).view_as(y).sin().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, seed)]


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_are_as_accurate_as_pytorchs(
    shape: tuple[int, int, int], bias: bool
) -> None:
    tensors = given(*shape, bias)
    assert goes_to_onednn(*tensors, *([] if bias else [None]))
    ours, plain = run(linear, tensors), run(F.linear, tensors)
    exact = run(F.linear, [t.double() for t in tensors])
    for mine, theirs, want in zip(ours, plain, exact, strict=True):
        assert mine.dtype == torch.float32
        assert mine.shape == want.shape
        error, allowed = ((got.double() - want).norm() for got in (mine, theirs))
        assert error <= 2 * allowed + 1e-7 * want.norm()


@needs_onednn
def test_leading_dimensions_and_strides() -> None:
    x, weight, bias = given(6 * 40, 256, 192)
    inputs = {
        "[6, 40, 256]": x.view(6, 40, 256),
        "transposed": x.view(40, 6, 256).transpose(0, 1),
        "sliced": torch.cat([x, x], 1).view(6, 40, 512)[:, 3:, 100:356],
        "expanded": x.view(6, 40, 256)[:, :1].expand(-1, 40, -1),
    }
    for name, given_x in inputs.items():
        for given_weight in (weight, weight.t().contiguous().t()):
            assert goes_to_onednn(given_x, given_weight, bias)
            got = run(linear, [given_x, given_weight, bias])
            for mine, want in zip(got, run(F.linear, [given_x, given_weight, bias]), strict=True):
                torch.testing.assert_close(mine, want, msg=lambda m, n=name: f"{n}: {m}")


@needs_onednn
def test_only_gradients_that_are_wanted() -> None:
    x, weight, bias = given(*SHAPES[0])
    weight.requires_grad_()
    y = linear(x, weight, bias)
    y.sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    with torch.no_grad():
        assert not linear(x, weight, bias).requires_grad
    assert not linear(x, weight.detach(), bias).requires_grad


@needs_onednn
def test_second_derivatives() -> None:
    found = []
    for function in (linear, F.linear):
        x, weight, bias = (t.requires_grad_() for t in given(*SHAPES[0]))
        y = function(x, weight, bias).tanh()
        to_x, to_weight = torch.autograd.grad(y.square().sum(), [x, weight], create_graph=True)
        penalty = to_x.square().sum() + to_weight.square().sum()
        found.append(torch.autograd.grad(penalty, [x, weight, bias]))
    for mine, want in zip(*found, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@needs_onednn
def test_two_runs_give_the_same_bits() -> None:
    tensors = given(*SHAPES[1])
    for first, second in zip(run(linear, tensors), run(linear, tensors), strict=True):
        assert torch.equal(first, second)


class _Wrapped(Tensor):
    pass


def test_everything_else_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = given(*SHAPES[0])
    others: dict[str, tuple[Any, ...]] = {
        "float64": (x.double(), weight.double(), bias.double()),
        "bfloat16": (x.bfloat16(), weight.bfloat16(), bias.bfloat16()),
        "mixed dtypes": (x, weight.double(), bias),
        "a bias of another dtype": (x, weight, bias.double()),
        "widths that differ": (x[:, 1:], weight, bias),
        "a bias of another shape": (x, weight, bias[:1]),
        "a scalar": (x[0, 0], weight, bias),
        "a subclass": (x.as_subclass(_Wrapped), weight, bias),
        "meta": (x.to("meta"), weight.to("meta"), bias.to("meta")),
        "narrow inputs": (x[:, : LEAST_WIDTH - 1], weight[:, : LEAST_WIDTH - 1], bias),
        "narrow outputs": (x, weight[: LEAST_WIDTH - 1], bias[: LEAST_WIDTH - 1]),
    }
    assert {name for name, tensors in others.items() if goes_to_onednn(*tensors)} == set()
    monkeypatch.setattr(module, "LEAST_MULTIPLICATIONS", LEAST_MULTIPLICATIONS)
    assert not goes_to_onednn(x, weight, bias)
    monkeypatch.setattr(module, "LEAST_MULTIPLICATIONS", 1)
    assert goes_to_onednn(x, weight, bias) == torch.backends.mkldnn.is_available()
    with torch.autocast("cpu", torch.bfloat16):
        assert not goes_to_onednn(x, weight, bias)
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not goes_to_onednn(x, weight, bias)
    monkeypatch.setattr(module, "_onednn_is_quicker", lambda: False)
    assert not goes_to_onednn(x, weight, bias)


def test_errors_are_pytorchs() -> None:
    x, weight, bias = given(*SHAPES[0])
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear(x[:, 1:], weight, bias)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_transforms_compile_and_traces() -> None:
    layer = Linear(128, 192)
    plain = nn.Linear(128, 192)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(64, 128)
    mapped = torch.func.vmap(layer)(x.view(4, 16, 128))
    torch.testing.assert_close(mapped.flatten(0, 1), plain(x))
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    torch.testing.assert_close(
        torch.func.grad(loss)(parameters)["weight"],
        torch.autograd.grad(plain(x).square().sum(), plain.weight)[0],
    )
    _, tangent = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(tangent, F.linear(x, plain.weight))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))
    traced = torch.jit.trace(layer, x)
    assert "mkldnn" not in str(traced.inlined_graph)


def test_a_layer_is_a_linear_layer() -> None:
    layer = Linear(128, 192)
    assert isinstance(layer, nn.Linear)
    assert layer.state_dict().keys() == nn.Linear(128, 192).state_dict().keys()
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
