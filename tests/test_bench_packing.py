"""The benchmark of packing: what it counts is what runs, and its check notices what is wrong."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jepa_fast import ops
from jepa_fast.masks import BlockMasks, PackedMasks
from jepa_fast.models import ijepa
from jepa_fast.perf import Case, Race

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
bench_packing: Any = importlib.import_module("bench_packing")

(TINY,) = (case for case in bench_packing.PACKING_STEPS if case.quick)
SEVERAL = Case(TINY.operator, "several", {**TINY.sizes, "batches": 3})
PROVIDERS = ("ours", "truncated", "padded", "padded_static", "packed_to_fit")


def _race(case: Case) -> Race:
    return bench_packing.bench_packing_step.entry.set_up(case, "cpu")


def _providers(race: Race) -> dict[str, Any]:
    return {"ours": race.ours, **race.others, **race.variants}


def _contexts(masks: BlockMasks) -> list[list[int]]:
    assert masks.context_mask is not None
    rows = zip(masks.context, masks.context_mask, strict=True)
    return [row[real].tolist() for row, real in rows]


def test_contexts_are_arranged_as_the_names_say() -> None:
    drawn = bench_packing.draw(TINY, 0)
    made = {name: f(drawn) for name, f in bench_packing.arrangements(TINY).items()}
    assert set(made) == set(PROVIDERS)
    whole = _contexts(drawn)
    lengths = [len(context) for context in whole]
    assert len(set(lengths)) > 1
    assert made["truncated"].context.tolist() == [context[: min(lengths)] for context in whole]
    assert made["truncated"].context_mask is None
    longest = bench_packing._sampler(TINY).longest_context
    assert longest > max(lengths)
    for name, slots in (("padded", max(lengths)), ("padded_static", longest)):
        assert made[name].context.shape == (len(whole), slots)
    for name in ("padded", "padded_static", "ours", "packed_to_fit"):
        masks = made[name]
        masks = masks.padded() if isinstance(masks, PackedMasks) else masks
        assert _contexts(masks) == whole
        assert torch.equal(masks.targets[:, :, : drawn.targets.shape[2]], drawn.targets)
    assert len(made["packed_to_fit"].context) == sum(lengths) + 1


def test_all_providers_take_the_same_batches_in_turn() -> None:
    race = _race(SEVERAL)
    steps = _providers(race)
    assert set(steps) == set(PROVIDERS)
    losses = {name: [float(step()) for _ in range(4)] for name, step in steps.items()}
    for name in ("padded", "padded_static", "packed_to_fit"):
        assert losses[name] == pytest.approx(losses["ours"], rel=1e-5)
    assert losses["truncated"] != pytest.approx(losses["ours"], rel=1e-5)
    seen = [step._inputs.arguments()["masks"].targets for step in steps.values()]
    patches = seen[1].shape[2]
    second = bench_packing.draw(SEVERAL, 4 % 3).targets
    assert all(torch.equal(each[:, :, :patches], second) for each in seen)
    race.check()


def test_context_tokens_are_counted() -> None:
    numbers = _race(SEVERAL).numbers
    drawn = [bench_packing.draw(SEVERAL, step).context_mask.sum(1).tolist() for step in range(3)]
    mean = sum(map(sum, drawn)) / 3 / SEVERAL["B"]
    for name in PROVIDERS:
        least = sum(map(min, drawn)) / 3 if name == "truncated" else mean
        assert numbers[name]["context_tokens_used"] == pytest.approx(least)
    computed = {name: numbers[name]["context_tokens_computed"] for name in PROVIDERS}
    assert computed["truncated"] == pytest.approx(sum(map(min, drawn)) / 3)
    assert computed["padded"] == pytest.approx(sum(map(max, drawn)) / 3)
    assert computed["padded_static"] == bench_packing._sampler(SEVERAL).longest_context
    assert computed["packed_to_fit"] == pytest.approx(mean + 1 / SEVERAL["B"])
    assert computed["ours"] > computed["packed_to_fit"]


@pytest.mark.parametrize("name", PROVIDERS)
def test_flops_are_those_that_are_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's products are counted where it is written out; metrics are left out."""
    monkeypatch.setattr(ijepa, "collapse_metrics", lambda *args: {})
    race = _race(TINY)
    step = _providers(race)[name]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    counted = counter.get_total_flops()
    assert counted == pytest.approx(race.numbers[name]["step_flops"] * TINY["B"], rel=1e-12)
    if name == "ours":
        assert race.cost.flops == counted


def test_pairs_of_packed_attention_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: those of every sequence, and of the pieces of slack."""
    masks = bench_packing.arrangements(TINY)["ours"](bench_packing.draw(TINY, 0))
    padded = bench_packing.computed_of(TINY, masks, "cpu")
    monkeypatch.setattr(bench_packing, "choose_backend", lambda query: "varlen")
    exact = bench_packing.computed_of(TINY, masks, "cpu")
    lengths = masks.context_offsets.diff().tolist()
    full, rest = divmod(lengths.pop(), masks.longest)
    assert exact.context_pairs == sum(n**2 for n in lengths) + full * masks.longest**2 + rest**2
    assert exact.context_pairs < padded.context_pairs
    assert exact.predictor_pairs < padded.predictor_pairs


def test_a_provider_with_another_loss_is_noticed() -> None:
    race = _race(TINY)
    race.others["padded"]()
    race.ours().mul_(1.001)
    with pytest.raises(AssertionError, match="ours: the loss is"):
        race.check()


class _WrongBackward(torch.autograd.Function):
    """The identity, but for one row whose gradient is lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[0] = 0
        return grad


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_packing_that_is_wrong_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.gather_packed  # of packed steps alone

    def perturbed(rows: Tensor, index: Tensor, **options: Any) -> Tensor:
        out = right(rows, index, **options)
        return out.roll(1, 0) if wrong == "loss" else _WrongBackward.apply(out)

    bench_packing.check_packing(TINY, "cpu")
    monkeypatch.setattr(ops, "gather_packed", perturbed)
    with pytest.raises(AssertionError, match=r"^ours: .* is off by"):
        bench_packing.check_packing(TINY, "cpu")
