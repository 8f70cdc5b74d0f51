"""Benchmarks of whole training steps: checks that can fail, FLOPs as counted, text encoders."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jepa_fast import ops
from jepa_fast.models import ijepa, probijepa, tcjepa, tijepa
from jepa_fast.perf import Case, NotHere

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
bench_step: Any = importlib.import_module("bench_step")

CASES = [
    case
    for cases in (
        bench_step.IJEPA_STEPS,
        bench_step.TCJEPA_STEPS,
        bench_step.TIJEPA_STEPS,
        bench_step.PROBIJEPA_STEPS,
    )
    for case in cases
]
QUICK = [case for case in CASES if case.quick]
LIVE = [case for case in CASES if "live" in case.sizes]
_NEEDS_TRANSFORMERS = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers"
)

each_quick = pytest.mark.parametrize("case", QUICK, ids=str)
each_live = pytest.mark.parametrize("case", LIVE, ids=str)


def _named(name: str) -> Case:
    (case,) = (case for case in CASES if str(case) == name)
    return case


def test_every_model_has_a_quick_case_and_one_for_each_device() -> None:
    operators = {"ijepa_step", "tcjepa_step", "tijepa_step", "probijepa_step"}
    assert {case.operator for case in QUICK} == operators
    for devices in (("cpu",), ("cuda",)):
        assert {case.operator for case in CASES if case.devices == devices} == operators
    assert len({str(case) for case in CASES}) == len(CASES)
    assert all(
        case.dtype == ("bfloat16" if case.devices == ("cuda",) else "float32") for case in CASES
    )


@each_quick
def test_ours_and_eager_agree_and_train(case: Case) -> None:
    race = bench_step.step_race(case, "cpu")
    losses = {name: [float(step()) for _ in range(3)] for name, step in _uncompiled(race).items()}
    race.check()
    assert losses["ours"] == pytest.approx(losses["eager"], rel=1e-5)
    assert losses["ours"][2] < losses["ours"][0]
    raced = {*race.others, *race.variants, *race.why_not}
    assert raced == {"eager", "compile", "ours_compile"}
    assert race.cost.flops > 0


def _uncompiled(race: Any) -> dict[str, Callable[[], Any]]:
    return {"ours": race.ours, "eager": race.others["eager"]}


@each_quick
def test_steps_leave_each_other_alone(case: Case) -> None:
    race = bench_step.step_race(case, "cpu")
    before = {name: p.clone() for name, p in race.others["eager"].model.named_parameters()}
    random = torch.random.get_rng_state()
    race.ours()
    assert torch.equal(torch.random.get_rng_state(), random)
    for name, p in race.others["eager"].model.named_parameters():
        assert torch.equal(p, before[name])
        mine = dict(race.ours.model.named_parameters())[name]
        assert not p.requires_grad or not torch.equal(p, mine)


@each_quick
def test_a_wrong_loss_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "linear_mixture_nll" if case.operator == "probijepa_step" else "latent_loss"
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args, **options: 1.001 * right(*args, **options))
    with pytest.raises(AssertionError, match="the loss: ours is off"):
        bench_step.check_step(case, "cpu")


class _WrongBackward(torch.autograd.Function):
    """The identity, but for one sequence whose gradient is lost."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad[0] = 0
        return grad


@each_quick
def test_a_wrong_gradient_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.assemble_predictor_tokens

    def wrong(*args: Any) -> torch.Tensor:
        return _WrongBackward.apply(right(*args))

    monkeypatch.setattr(ops, "assemble_predictor_tokens", wrong)
    with pytest.raises(AssertionError, match="ours is off by"):
        bench_step.check_step(case, "cpu")


@pytest.mark.parametrize("momentum", [1.0, 0.9961])
@each_quick
def test_a_wrong_ema_is_noticed(
    case: Case, momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.adamw_ema_
    monkeypatch.setattr(
        ops, "adamw_ema_", lambda *args, **named: right(*args, **{**named, "momentum": momentum})
    )
    with pytest.raises(AssertionError, match="not close"):
        bench_step.check_step(case, "cpu")


@pytest.mark.parametrize("case", [c for c in QUICK if c.operator == "ijepa_step"], ids=str)
def test_only_the_plain_predictor_computes_what_nobody_reads(case: Case) -> None:
    rows = []

    def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
        rows.append(output.shape[1])

    for plain in (True, False):
        model = bench_step.make_model(case, "cpu")
        step = bench_step.Step(case, "cpu", model, bench_step.make_inputs(case, "cpu"), plain=plain)
        model.predictor.predictor_blocks[-1].mlp.register_forward_hook(note)
        step.backward()
    assert rows == [case["Kc"] + case["Kt"], case["Kt"]]


def test_ours_keeps_its_memory_and_the_plain_step_does_not(monkeypatch: Any) -> None:
    log: list[str] = []
    monkeypatch.setattr(bench_step, "keep_host_memory", lambda: log.append("keep"))
    monkeypatch.setattr(
        bench_step, "return_host_memory", lambda heap: log.append(f"return, heap={heap}")
    )
    race = bench_step.step_race(QUICK[0], "cpu")
    race.ours()
    race.others["eager"]()
    assert log == ["keep", "return, heap=False"]


@each_quick
def test_an_ema_that_is_wrong_in_the_model_is_noticed(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ours and the plain one are wrong alike.
    monkeypatch.setattr(bench_step, "teacher_parameters", lambda model: [])
    monkeypatch.setattr(ijepa, "update_teachers", lambda *args: None)
    monkeypatch.setattr(tijepa, "update_teachers", lambda *args: None)
    with pytest.raises(AssertionError, match="not close"):
        bench_step.check_step(case, "cpu")


def test_a_provider_with_another_loss_is_noticed() -> None:
    race = bench_step.step_race(QUICK[0], "cpu")
    race.ours()
    race.others["eager"]().mul_(1.001)
    with pytest.raises(AssertionError, match="eager: the loss is"):
        race.check()


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(c, marks=_NEEDS_TRANSFORMERS) for c in LIVE)], ids=str
)
def test_flops_are_those_that_are_counted(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # Metrics are left out of the model. Attention's products are counted where it is written out.
    for model in (ijepa, probijepa, tcjepa, tijepa):
        monkeypatch.setattr(model, "collapse_metrics", lambda *args: {})
    # The cost is what ours computes, whose products, in its operators, nobody sees.
    monkeypatch.setattr(bench_step, "_compute_all_tokens", lambda block: None)
    race = bench_step.step_race(case, "cpu")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        race.others["eager"]()
    counted = counter.get_total_flops()
    if case.operator == "tcjepa_step":
        # Plain attention multiplies queries and keys once more, for the cosines.
        tokens = case["B"] * case["M"] * (case["Kc"] + case["Kt"])
        counted -= 3 * case["L"] * 2 * tokens * case["C"] * case["S"] * case["d"]
    # The statistics of the text attention, of some images, are metrics, too.
    assert counted == pytest.approx(race.cost.flops, rel=2e-3)


@each_quick
def test_bytes_are_those_of_adamw_and_the_ema(case: Case) -> None:
    race = bench_step.step_race(case, "cpu")
    model = race.ours.model
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    taught = 4 * sum(p.numel() for p in bench_step.networks(model)[0].parameters())
    assert race.cost.read == 4 * trained + taught
    assert race.cost.written == 3 * trained + taught


@_NEEDS_TRANSFORMERS
@each_live
def test_the_text_encoder_runs_in_every_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from jepa_fast.interop.text import TextEncoder

    encoded = []
    forward = TextEncoder.forward

    def counting(self: TextEncoder, captions: Any, *args: Any, **options: Any) -> Any:
        text = forward(self, captions, *args, **options)
        encoded.append(text.word_mask)
        return text

    monkeypatch.setattr(TextEncoder, "forward", counting)
    race = bench_step.step_race(case, "cpu")
    assert not encoded
    for step in _uncompiled(race).values():
        step()
        step()
    assert len(encoded) == 4
    assert encoded[0].shape == (case["B"], case["C"], case["S"])
    assert all(mask.all() for mask in encoded)
    race.check()


@_NEEDS_TRANSFORMERS
def test_a_live_text_encoder_races_against_given_words() -> None:
    case = _named("tcjepa_step/tiny-live")
    sizes = {name: size for name, size in case.sizes.items() if name != "live"}
    race = bench_step.step_race(Case(case.operator, "both", sizes), "cpu")
    assert torch.isfinite(race.variants["live"]())
    race.ours()
    race.check()


def test_without_transformers_live_cases_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "_HAS_TRANSFORMERS", False)
    with pytest.raises(NotHere, match=r"jepa-fast\[text\]"):
        bench_step.step_race(LIVE[0], "cpu")
    sizes = {name: size for name, size in LIVE[0].sizes.items() if name != "live"}
    race = bench_step.step_race(Case(LIVE[0].operator, "both", sizes), "cpu")
    assert "live" not in race.variants
    assert "jepa-fast[text]" in race.why_not["live"]


def test_cached_features_race_against_the_frozen_encoder() -> None:
    sizes = {**_named("tijepa_step/tiny").sizes, "cached": 1}
    case = Case("tijepa_step", "cached", sizes)
    race = bench_step.step_race(case, "cpu")
    assert race.ours.model.encoder is None
    assert race.others["eager"].model.encoder is None
    recomputing = race.variants["recomputing"]
    encoded = []
    recomputing.model.encoder.register_forward_hook(lambda *args: encoded.append(args))
    for step in (race.ours, race.others["eager"], recomputing):
        assert torch.isfinite(step())
    assert len(encoded) == 1
    race.check()
    assert race.cost.flops < bench_step.step_race(_named("tijepa_step/tiny"), "cpu").cost.flops


def test_compiled_steps_agree() -> None:
    # One block fewer to compile than a predictor of several, whose last differs.
    case = Case("ijepa_step", "compiled", {**_named("ijepa_step/tiny").sizes, "L": 1})
    if why := bench_step.why_no_compile("cpu"):
        pytest.skip(why)
    torch.compiler.reset()
    race = bench_step.step_race(case, "cpu")
    assert "ours_compile" not in race.others
    compiled = [race.others["compile"], race.variants["ours_compile"]]
    losses = [[float(step()) for _ in range(2)] for step in [race.ours, *compiled]]
    race.check()
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)
