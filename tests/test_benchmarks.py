"""The benchmarks of the operators: they are there, count right, and notice what is wrong.

Steps have `test_bench_step.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from samples import Sample
from test_contracts import SAMPLES
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from jepa_fast import ops
from jepa_fast.nn.vit import create_encoder
from jepa_fast.ops._registry import OPERATORS
from jepa_fast.perf import Case, Race
from jepa_fast.perf.race import load_suite, quick_entries

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
ENTRIES = load_suite(FOLDER)
CASES = [case for entry in ENTRIES for case in entry.cases]
QUICK = [
    pytest.param(case, set_up, id=str(case))
    for case, set_up in quick_entries(ENTRIES)
    if not case.operator.endswith("_step")
]
each_quick = pytest.mark.parametrize(("case", "set_up"), QUICK)
OF_OPERATORS = [each.values for each in QUICK if hasattr(ops, each.values[0].operator)]
each_operator = pytest.mark.parametrize(
    ("case", "set_up"), [pytest.param(*pair, id=str(pair[0])) for pair in OF_OPERATORS]
)
SetUp = Callable[[Case, str], Race]
IN_PLACE = ("ema_update_", "adamw_ema_")
"""They update the tensors of their first argument, and have no gradient."""
WITHOUT_GRADIENT = (*IN_PLACE, "draw_block_masks", "q_sample")
"""Have none, or are timed without: a teacher's tokens take none."""
DRAWN = ("draw_block_masks", "q_sample", "denoising_loss")
"""The plain way draws other random numbers: their benchmarks look at these themselves."""


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/plain.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("plain")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for each in value for t in _tensors(each)] if isinstance(value, (list, tuple)) else []


# What there is


def test_every_operator_has_a_file_and_quick_cases_for_a_cpu() -> None:
    operators = {name.removesuffix("_backward") for name in OPERATORS}
    files = {path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")}
    assert {name.rstrip("_") for name in operators} <= files
    quick = {case.operator for case in CASES if case.quick and "cpu" in case.devices}
    assert operators <= quick


def test_every_operator_has_a_larger_case_for_each_device() -> None:
    for device in ("cpu", "cuda"):
        larger = {case.operator for case in CASES if not case.quick and device in case.devices}
        assert {name.removesuffix("_backward") for name in OPERATORS} <= larger


def test_names_are_unique() -> None:
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names)


def test_parameters_are_those_of_the_encoders() -> None:
    """All but the positions, which are no parameter, by their shapes."""
    cases = importlib.import_module("cases")
    for name, width, depth in (("small", 384, 12), ("base", 768, 12), ("large", 1024, 24)):
        with torch.device("meta"):
            encoder = create_encoder(f"vit_{name}_patch16", 32)
        shapes = sorted(tuple(parameter.shape) for parameter in encoder.parameters())
        assert sorted(cases.vit_parameters(width, depth)) == shapes


# What costs count


def _unread(case: Case, inputs: list[Tensor]) -> int:
    """Bytes of the inputs that the result does not depend on."""
    if case.operator == "gather_packed":
        return (case["T"] - len(set(inputs[1].tolist()))) * case["D"] * 4
    if case.operator in ("gather_patches", "latent_loss"):
        taken = {(b, i) for b, row in enumerate(inputs[-1].flatten(1).tolist()) for i in row}
        return (case["B"] * case["N"] - len(taken)) * case["D"] * 4
    if case.operator == "affine_coupling":  # scale and shift of the half that passes
        return 2 * case["T"] * case["D"] // 2 * 4
    return 0


@each_operator
def test_bytes_are_those_of_inputs_outputs_and_gradients(
    case: Case, set_up: SetUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    race, function, calls = set_up(case, "cpu"), getattr(ops, case.operator), []

    def recorded(*arguments: Any, **options: Any) -> Any:
        calls.append((_tensors(arguments), _tensors(function(*arguments, **options))))
        return calls[-1][1][0] if len(calls[-1][1]) == 1 else tuple(calls[-1][1])

    monkeypatch.setattr(ops, case.operator, recorded)
    race.ours()
    ((inputs, outputs),) = calls
    grads = [tensor for tensor in inputs if tensor.requires_grad]
    upstream = outputs
    if case.operator == "ema_update_":  # the first half of the inputs is updated
        written = sum(tensor.nbytes for tensor in inputs[: len(inputs) // 2])
    elif case.operator == "adamw_ema_":  # all but the gradient; the count of steps is none
        inputs = [tensor for tensor in inputs if tensor.ndim]
        written = sum(tensor.nbytes for tensor in [inputs[0], *inputs[2:]])
    elif case.operator in WITHOUT_GRADIENT:
        written, upstream = sum(tensor.nbytes for tensor in outputs), []
    else:
        assert grads
        written = sum(tensor.nbytes for tensor in [*outputs, *grads])
    read = sum(tensor.nbytes for tensor in [*inputs, *upstream]) - _unread(case, inputs)
    assert (race.cost.read, race.cost.written) == (read, written)
    assert race.cost.flops > 0 or case.operator == "draw_block_masks"  # integers


# What plain PyTorch multiplies, forward and backward, for one product of the model.
PRODUCTS = {
    "masked_linear": (2, 1),  # half of the weights are masked
    "linear_mixture_nll": (1, 1),
    "text_cross_attention": (9, 6),  # cosines are a third product there, and reuse scores here
    "patch_word_consistency": (3, 3),
}


@pytest.mark.parametrize(
    ("case", "set_up"),
    [pytest.param(*pair, id=str(pair[0])) for pair in OF_OPERATORS if pair[0].operator in PRODUCTS],
)
def test_products_are_those_that_are_counted(case: Case, set_up: SetUp, plain: ModuleType) -> None:
    race = set_up(case, "cpu")
    with FlopCounterMode(display=False) as counter:
        race.others["eager"]()
    theirs, ours = PRODUCTS[case.operator]
    expected = counter.get_total_flops() * ours / theirs
    if "S" in case.sizes:  # where padding is multiplied, too
        words = plain.drawn_words(case["B"], case["C"], case["S"])
        expected *= float(words.double().mean())
    if case.operator == "linear_mixture_nll":
        expected += 16 * case["T"] * case["K"] * case["D"]  # the likelihood, which is no product
    assert race.cost.flops == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if hasattr(ops, c.operator)], ids=str)
def test_costs_grow_with_every_size(case: Case) -> None:
    """Of the functions in cases.py, as called for a case; nothing is set up at these sizes."""
    module = importlib.import_module("cases")
    function = getattr(module, f"{case.operator.rstrip('_')}_cost")
    if case.operator in IN_PLACE:
        dtypes = ("float32", "float32") if case.operator == "ema_update_" else ("bfloat16",)
        small, large = (function(n, *dtypes) for n in (1000, 2000))
        assert large == small + small
        return
    if case.operator == "draw_block_masks":
        doubled = Case(case.operator, case.name, {**case.sizes, "B": 2 * case["B"]})
        assert function(doubled) == function(case) + function(case)
        return
    options: dict[str, Any] = {"event": "joint"} if "mixture" in case.operator else {}
    if case.operator in ("gather_patches", "latent_loss"):
        options = {"distinct": case["B"]}
    if case.operator in ("text_cross_attention", "patch_word_consistency"):
        options = {"present": case["B"] * case["C"]}
    if case.name == "realnvp":
        function = lambda case, backward: module.realnvp_cost(case)  # noqa: E731
    forward, both = (function(case, backward=b, **options) for b in (False, True))
    assert both.moved >= forward.moved > 0
    assert both.flops >= forward.flops
    for size in {"B", "T", "D", "d"} & case.sizes.keys():
        doubled = Case(case.operator, case.name, {**case.sizes, size: 2 * case[size]}, case.dtype)
        assert function(doubled, backward=True, **options).moved > both.moved


# What checks notice


@each_quick
def test_what_is_right_passes(case: Case, set_up: SetUp) -> None:
    race = set_up(case, "cpu")
    race.check()
    race.ours()
    assert {"eager", "compile"} <= race.others.keys() | race.why_not.keys()
    if hasattr(ops, case.operator):
        assert race.backend in OPERATORS[case.operator.replace("packed", "patches")].backends


class _Scaled(torch.autograd.Function):
    """x * forward, whose gradient is multiplied by backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_factor = backward
        return x * forward

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.backward_factor, None, None


@pytest.mark.parametrize(
    ("case", "set_up", "wrong"),
    [
        pytest.param(case, set_up, wrong, id=f"{case}-{wrong}")
        for case, set_up in OF_OPERATORS
        for wrong in ("output", "gradient")[: 1 if case.operator in WITHOUT_GRADIENT else 2]
    ],
)
def test_what_is_wrong_is_noticed(
    case: Case, set_up: SetUp, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result off by a thousandth, in all outputs or in all gradients."""
    function = getattr(ops, case.operator)
    if case.operator in IN_PLACE:

        def perturbed(updated: list[Tensor], *arguments: Any, **options: Any) -> Any:
            function(updated, *arguments, **options)
            updated[-1].detach().mul_(1.001)
    elif case.operator == "draw_block_masks":

        def perturbed(*arguments: Any, **options: Any) -> Any:
            context, *others = function(*arguments, **options)
            return context.roll(1, 0), *others
    else:
        factors = (1.001, 1.0) if wrong == "output" else (1.0, 1.001)

        def perturbed(*arguments: Any, **options: Any) -> Any:
            outputs = function(*arguments, **options)
            if isinstance(outputs, Tensor):
                return _Scaled.apply(outputs, *factors)
            return tuple(_Scaled.apply(output, *factors) for output in outputs)

    monkeypatch.setattr(ops, case.operator, perturbed)
    said = r"^ours: (\d+ of \d+ rows of tensor \d+ are off|tensor 0 is not the reference's)"
    with pytest.raises(AssertionError, match=said):
        set_up(case, "cpu").check()


def test_masks_that_are_none_are_noticed() -> None:
    masks = importlib.import_module("bench_draw_block_masks")
    torch.manual_seed(0)
    contexts, targets = masks.loop_masks(16)
    masks.assert_masks("right", contexts, targets, whole=True)
    with_target = torch.cat([contexts[0], targets[0, 0, :1]]).sort().values
    with pytest.raises(AssertionError, match="wrong: a context holds targets"):
        masks.assert_masks("wrong", [with_target, *contexts[1:]], targets, whole=True)
    with pytest.raises(AssertionError, match="wrong: a context has holes"):
        masks.assert_masks("wrong", [contexts[0][:-1], *contexts[1:]], targets, whole=True)
    with pytest.raises(AssertionError, match="wrong: images share their blocks"):
        masks.assert_masks("wrong", contexts, targets[:1].expand(16, -1, -1), whole=True)
    scattered = torch.arange(targets.shape[-1]).mul(2).expand_as(targets)
    with pytest.raises(AssertionError, match="wrong: a target is no block"):
        masks.assert_masks("wrong", contexts, scattered, whole=True)


# The plain operators


PUBLIC = {
    case.operator: getattr(ops, case.operator)
    for case in CASES
    if hasattr(ops, case.operator) and case.operator not in DRAWN
}


def _is_empty(sample: Sample) -> bool:
    return any(tensor.numel() == 0 for tensor in _tensors(sample.arguments()))


def _found(sample: Sample, function: Callable[..., Any]) -> list[Tensor | None]:
    """Outputs and gradients, in float64."""
    arguments = sample.arguments()
    outputs = _tensors([function(*arguments, **sample.keywords)])
    taking = [tensor for tensor in _tensors(arguments) if tensor.requires_grad]
    giving = [output for output in outputs if output.requires_grad]
    upstream = [torch.linspace(1, 2, x.numel(), dtype=x.dtype).view_as(x) for x in giving]
    grads = torch.autograd.grad(giving, taking, upstream, allow_unused=True) if taking else ()
    return [*outputs, *grads]


@pytest.mark.parametrize("name", PUBLIC)
def test_plain_operators_equal_ours(
    name: str, plain: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the operators' tests have a call of it that is not empty."""
    calls = []

    def plain_operator(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return plain.PLAIN[name](*arguments, **options)

    samples = [each.values[0] for each in SAMPLES if not _is_empty(each.values[0])]
    for sample in samples:
        ours = _found(sample, sample.function)
        called = len(calls)
        with monkeypatch.context() as patch:
            # The sample's function is the operator, or one of its test that calls it.
            patch.setattr(ops, name, plain_operator)
            for place in {name} & sample.function.__globals__.keys():
                patch.setitem(sample.function.__globals__, place, plain_operator)
            direct = sample.function is PUBLIC[name]
            theirs = _found(sample, plain_operator if direct else sample.function)
        if len(calls) == called:
            continue
        assert len(ours) == len(theirs)
        for got, want in zip(theirs, ours, strict=True):
            if got is None or want is None:  # a gradient of nothing
                assert not any(grad is not None and grad.any() for grad in (got, want))
            else:
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=sample.name)
    assert calls
    assert set(plain.PLAIN) == set(PUBLIC)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_flex_attention_makes_are_the_features(plain: ModuleType) -> None:
    """Its benchmark is for a GPU; not compiled it is the same mathematics."""
    suite = importlib.import_module("bench_text_cross_attention")
    q, residual = (plain.values(4, 7, 16, device="cpu", seed=seed) for seed in (0, 3))
    k, v = (plain.values(2, 3, 5, 16, device="cpu", seed=seed) for seed in (1, 2))
    word_mask = plain.drawn_words(2, 3, 5, "cpu")
    want, _ = plain.PLAIN["text_cross_attention"](q, k, v, residual, word_mask)
    got = suite.flex_attention_features(q, k, v, residual, word_mask)
    torch.testing.assert_close(got, want)
