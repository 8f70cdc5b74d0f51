"""linear_mixture_nll."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from backends import backends, needs_native
from samples import Sample, normal
from tolerance import assert_as_accurate
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_fast import ops
from jepa_fast.ops._registry import OPERATORS as REGISTERED
from jepa_fast.ops.linear_mixture_nll import chunked, native
from jepa_fast.ops.mixture_nll import mixture_parameter_count, split_mixture_parameters

OPERATORS = ("linear_mixture_nll", "linear_mixture_nll_backward")


def _of_some(*arguments: Tensor, **keywords) -> Tensor:
    *arguments, token_mask = arguments
    return ops.linear_mixture_nll(*arguments, token_mask=token_mask, **keywords)


def _sample(
    name: str,
    tokens: int,
    hidden: int,
    width: int,
    components: int,
    bias: bool = True,
    masked: bool = False,
    **keywords,
) -> Sample:
    def make(dtype: torch.dtype, generator: torch.Generator, times: int = 1):
        event = keywords.get("event", "joint")
        outputs = mixture_parameter_count(components, times * width, event)
        rows, inputs = times * tokens, times * hidden
        return (
            normal(rows, inputs, dtype=dtype, generator=generator),
            normal(outputs, inputs, dtype=dtype, generator=generator),
            normal(outputs, dtype=dtype, generator=generator) if bias else None,
            normal(rows, times * width, dtype=dtype, generator=generator, grad=bias),
            *([torch.arange(rows) % 3 > 0] if masked else []),
        )

    keywords = {"num_components": components, **keywords}
    return Sample(
        name,
        _of_some if masked else ops.linear_mixture_nll,
        OPERATORS,
        make,
        keywords,
        make_larger=partial(make, times=2),
    )


SAMPLES = [
    _sample("joint", 3, 4, 3, 2),
    _sample("coordinate logistic, no bias", 2, 3, 5, 2, False, event="coordinate", reduction="sum",
            family="logistic"),
    _sample("batch 0", 0, 4, 3, 2),
    _sample("some tokens", 4, 3, 2, 2, masked=True),
]  # fmt: skip


@pytest.mark.parametrize("event", ["joint", "coordinate"])
@pytest.mark.parametrize("family", ["gaussian", "logistic"])
@pytest.mark.parametrize("scale_map", ["exp", "softplus"])
def test_is_a_linear_layer_and_mixture_nll(event: str, family: str, scale_map: str) -> None:
    """The documented layout: logits, then loc, then log_scale, K rows of D."""
    tokens, hidden, width, components = 4, 3, 5, 2
    logit_count = components if event == "joint" else components * width
    torch.manual_seed(0)
    x, target = torch.randn(tokens, hidden), torch.randn(tokens, width)
    sizes = (logit_count, components * width, components * width)
    weights = [torch.randn(size, hidden) for size in sizes]
    biases = [torch.randn(size) for size in sizes]
    logits, loc, log_scale = (F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    options = {"family": family, "event": event, "scale_map": scale_map, "scale_floor": 0.1}
    rows = (tokens, components, width)
    expected = ops.mixture_nll(
        target,
        logits if event == "joint" else logits.view(rows),
        loc.view(rows),
        log_scale.view(rows),
        **options,
    )
    arguments = (x, torch.cat(weights), torch.cat(biases), target, components)
    mean = ops.linear_mixture_nll(*arguments, **options)
    torch.testing.assert_close(mean, expected.mean())
    total = ops.linear_mixture_nll(*arguments, **options, reduction="sum")
    torch.testing.assert_close(total, expected.sum())


def _inputs(tokens: int, components: int, width: int, event: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    outputs = mixture_parameter_count(components, width, event)
    shapes = ((tokens, 24), (outputs, 24), (outputs,), (tokens, width))
    scales = (1.0, 0.1, 0.1, 1.0)
    return [
        scale * torch.randn(shape, generator=generator)
        for scale, shape in zip(scales, shapes, strict=True)
    ]


@backends(REGISTERED["linear_mixture_nll"].backends)
@pytest.mark.parametrize("event", ["joint", "coordinate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_as_accurate_as_eager_in_chunks(
    reduction: str,
    dtype: torch.dtype,
    event: str,
    backend: str,
    device: str,
    backends_run: list[tuple[str, str]],
    poisoned_memory: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss and all gradients over chunks of 64 tokens, of which the last is not full."""
    monkeypatch.setattr(chunked, "_CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    inputs = _inputs(70, 3, 11, event)
    inputs = [*(x.to(dtype) for x in inputs[:3]), inputs[3]]

    def run(inputs: list[Tensor], backend: str) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        loss = ops.linear_mixture_nll(*leaves, 3, event=event, reduction=reduction, backend=backend)
        return [x.detach().cpu() for x in (loss, *torch.autograd.grad(0.5 * loss, leaves))]

    got = run([x.to(device) for x in inputs], backend)
    assert ("linear_mixture_nll", backend) in backends_run
    eager = run(inputs, "reference")
    exact = run([x.double() for x in inputs], "reference")
    for mine, theirs, truth in zip(got, eager, exact, strict=True):
        # In one row: what rounding makes of a token's shares is luck, in float32 as in theirs.
        assert_as_accurate(mine.flatten(), theirs.flatten(), truth.flatten())


@backends(REGISTERED["linear_mixture_nll"].backends)
@pytest.mark.parametrize("event", ["joint", "coordinate"])
def test_float16_gradients_of_a_token_do_not_overflow(
    event: str, backend: str, device: str
) -> None:
    """A target 76 scales away has gradients beyond 65504, which the mean over tokens has not."""
    tokens, logit, scale = 64, 0.0, -10.0
    hidden, weight = torch.ones(tokens, 1).half(), torch.zeros(3, 1).half()
    bias, target = torch.tensor([logit, 0.0, scale]).half(), torch.zeros(tokens, 1)
    target[0] = 0.08
    inputs = [x.to(device).requires_grad_() for x in (hidden, weight, bias, target)]
    loss = ops.linear_mixture_nll(*inputs, 1, event=event, backend=backend)
    got = torch.autograd.grad(loss, inputs)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    want = torch.autograd.grad(ops.linear_mixture_nll(*exact, 1, event=event), exact)
    for mine, truth in zip(got, want, strict=True):
        torch.testing.assert_close(mine.cpu().double(), truth, rtol=2e-3, atol=1e-5)


@backends(["cpu", "reference"])
@pytest.mark.parametrize("bias", [True, False])
def test_only_what_is_needed_has_a_gradient(bias: bool, backend: str, device: str) -> None:
    hidden, weight, offset, target = _inputs(5, 2, 3, "joint")
    inputs = [hidden, weight, offset if bias else None, target]
    every = [x if x is None else x.clone().requires_grad_() for x in inputs]
    ops.linear_mixture_nll(*every, 2, backend=backend).backward()
    for i, x in enumerate(inputs):
        if x is None:
            continue
        given = [y if j != i or y is None else y.clone().requires_grad_()
                 for j, y in enumerate(inputs)]  # fmt: skip
        ops.linear_mixture_nll(*given, 2, backend=backend).backward()
        torch.testing.assert_close(given[i].grad, every[i].grad, rtol=0, atol=0)
    with torch.no_grad():
        quiet = ops.linear_mixture_nll(*every, 2, backend=backend)
    torch.testing.assert_close(quiet, ops.linear_mixture_nll(*inputs, 2, backend=backend))


class _Largest(TorchDispatchMode):
    """The largest tensor, in bytes, that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(each, Tensor):
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return result


@needs_native
def test_the_outputs_never_exist_in_full() -> None:
    """Of 64 MB of outputs nothing that is made is larger than a chunk."""
    inputs = _inputs(16384, 4, 85, "coordinate")
    options = (4, "gaussian", "coordinate", 1e-3, "exp", "mean")
    with _Largest() as seen:  # a dispatch mode sees nothing inside an operator
        native.linear_mixture_nll(*inputs, None, *options, [True, True, True, False])
    outputs = 16384 * len(inputs[1]) * 4
    assert seen.bytes <= outputs / 2
    assert seen.bytes >= outputs / 8  # the chunks' room is seen


@backends(REGISTERED["linear_mixture_nll"].backends)
@pytest.mark.parametrize(
    ("dtype", "reduction"),
    [
        (torch.float32, "mean"),
        (torch.float32, "sum"),
        (torch.bfloat16, "mean"),
        (torch.float16, "mean"),
    ],
    ids=str,
)
def test_a_mask_leaves_tokens_out_whatever_they_hold(
    dtype: torch.dtype,
    reduction: str,
    backend: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss and gradients are those of the others alone; several chunks, one of them left out."""
    monkeypatch.setattr(chunked, "_CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    hidden, weight, bias, target = _inputs(140, 2, 3, "coordinate")
    mask = torch.arange(140) % 5 != 1
    mask[64:128] = False
    hidden[~mask], target[~mask] = float("nan"), float("inf")
    tensors = [*(x.to(dtype) for x in (hidden, weight, bias)), target]

    def run(inputs: list[Tensor], backend: str = backend, **options) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        options |= {"event": "coordinate", "reduction": reduction, "backend": backend}
        loss = ops.linear_mixture_nll(*leaves, 2, **options)
        return [x.detach().cpu() for x in (loss, *torch.autograd.grad(0.5 * loss, leaves))]

    def some(inputs: list[Tensor]) -> list[Tensor]:
        return [inputs[0][mask], *inputs[1:3], inputs[3][mask]]

    got = run([x.to(device) for x in tensors], token_mask=mask.to(device))
    for of_rows in (got[1], got[4]):
        assert torch.equal(of_rows[~mask], torch.zeros_like(of_rows[~mask]))
    eager = run(some(tensors), "reference")
    exact = run([x.double() for x in some(tensors)], "reference")
    mine = [got[0], *some(got[1:])]
    for found, theirs, truth in zip(mine, eager, exact, strict=True):
        assert_as_accurate(found.flatten(), theirs.flatten(), truth.flatten())
    nothing = run([x.to(device) for x in tensors], token_mask=torch.zeros_like(mask).to(device))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in nothing)


def test_targets_that_are_no_numbers() -> None:
    hidden, weight, offset, target = _inputs(4, 2, 3, "joint")
    target[1, 2] = float("nan")
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match="target must be finite"):
            ops.linear_mixture_nll(hidden, weight, offset, target, 2, backend=backend)


@needs_native
@pytest.mark.parametrize("trains", [True, False])
def test_which_target_is_no_number_counts_from_the_first_chunk(
    trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    hidden, weight, offset, target = _inputs(150, 2, 3, "joint")
    target[[100, 140], 2] = float("inf")
    weight.requires_grad_(trains)
    message = "linear_mixture_nll: target must be finite, .* 2 of 150 tokens, .* token 100$"
    with pytest.raises(ValueError, match=message):
        ops.linear_mixture_nll(hidden, weight, offset, target, 2, backend="cpu")


def test_split_is_the_inverse_of_the_layout() -> None:
    parameters = torch.arange(2 * 15.0).view(2, 15)
    logits, loc, log_scale = split_mixture_parameters(parameters, 3, 2, "joint")
    assert torch.equal(logits, parameters[:, :3])
    assert torch.equal(loc[:, 1], parameters[:, 5:7])
    assert torch.equal(log_scale[:, 2], parameters[:, 13:])


def test_mean_over_no_token_is_zero() -> None:
    nothing = ops.linear_mixture_nll(
        torch.zeros(0, 4), torch.zeros(14, 4), None, torch.zeros(0, 3), 2
    )
    assert nothing.item() == 0.0


def test_under_autocast() -> None:
    """The layer runs in bfloat16, the likelihood in float32; gradients fit their parameters."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(6, 8), torch.randn(14, 8), torch.randn(14)
    target = torch.randn(6, 3)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_mixture_nll(*leaves, target, 2)
    loss.backward()
    assert loss.dtype == torch.float32
    by_hand = [x.bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    parameters = split_mixture_parameters(F.linear(*by_hand), 2, 3, "joint")
    expected = ops.mixture_nll(target, *parameters).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for got, want in zip(leaves, by_hand, strict=True):
        assert got.grad is not None
        assert got.grad.dtype == torch.float32
        torch.testing.assert_close(got.grad, want.grad.float())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_components": 3}, ValueError, r"K \(2 D \+ 1\) = 21 rows .* got \[14, 4\]"),
        ({"num_components": 0}, ValueError, "num_components must be at least 1, got 0"),
        ({"event": "coordinate"}, ValueError, "3 K D = 18 rows"),
        ({"target": torch.zeros(2, 4)}, ValueError, "= 18 rows .* target width D = 4"),
        ({"target": torch.zeros(3, 3)}, ValueError, r"hidden.shape\[0\] and target.shape\[0\]"),
        ({"hidden": torch.zeros(2, 5)}, ValueError, r"hidden.shape\[1\] and weight.shape\[1\]"),
        ({"bias": torch.zeros(13)}, ValueError, r"bias.shape\[0\] and weight.shape\[0\]"),
        ({"bias": torch.zeros(14).double()}, TypeError, "bias must have the dtype of hidden"),
        ({"weight": torch.zeros(14, 4).half()}, TypeError, "weight must have the dtype of hidden"),
        ({"reduction": "none"}, ValueError, "reduction must be one of"),
        ({"token_mask": torch.ones(2)}, TypeError, "token_mask must be bool"),
        ({"token_mask": torch.ones(3) > 0}, ValueError, r"token_mask must have shape \[2\], got"),
        ({"family": "cauchy"}, ValueError, "family must be one of"),
        ({"scale_floor": -1.0}, ValueError, "scale_floor must be positive"),
        ({"scale_floor": torch.tensor(1e-3)}, TypeError, "scale_floor must be a number, got Tens"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(14, 4),
        "bias": torch.zeros(14),
        "target": torch.zeros(2, 3),
        "num_components": 2,
    }
    with pytest.raises(error, match=message):
        ops.linear_mixture_nll(**{**arguments, **change})
