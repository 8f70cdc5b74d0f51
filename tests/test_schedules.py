from __future__ import annotations

import itertools
import math

import pytest

from jepa_fast.train.schedules import cosine, linear, warmup_cosine

LR = {"total": 300.0, "warmup": 40.0, "start": 2e-4, "peak": 1e-3, "final": 1e-6}


def test_momentum_runs_straight_to_one() -> None:
    values = [linear(step, total=100, start=0.996, final=1.0) for step in range(101)]
    assert values[0] == 0.996
    assert values[50] == pytest.approx(0.998, abs=1e-12)
    assert values[100] == pytest.approx(1.0, abs=1e-12)
    steps = [later - earlier for earlier, later in itertools.pairwise(values)]
    assert max(steps) - min(steps) < 1e-12


def test_weight_decay_rises_on_a_cosine() -> None:
    def value(step: float) -> float:
        return cosine(step, total=100, start=0.04, final=0.4)

    assert value(0) == pytest.approx(0.04)
    assert value(50) == pytest.approx(0.22)
    assert value(100) == pytest.approx(0.4)
    # Written out independently: start + (final - start) * sin^2(pi/2 * progress).
    for step in (3, 17, 64, 99):
        assert value(step) == pytest.approx(0.04 + 0.36 * math.sin(math.pi * step / 200) ** 2)


def test_learning_rate_warms_up_peaks_and_ends() -> None:
    assert warmup_cosine(0, **LR) == pytest.approx(2e-4)
    assert warmup_cosine(20, **LR) == pytest.approx(6e-4)
    assert warmup_cosine(40, **LR) == pytest.approx(1e-3)
    assert warmup_cosine(170, **LR) == pytest.approx((1e-3 + 1e-6) / 2)
    assert warmup_cosine(300, **LR) == pytest.approx(1e-6)
    values = [warmup_cosine(step, **LR) for step in range(301)]
    assert values[:41] == sorted(values[:41])
    assert values[40:] == sorted(values[40:], reverse=True)


def test_values_are_held_outside_the_run() -> None:
    assert linear(-5, total=10, start=1.0, final=2.0) == 1.0
    assert linear(15, total=10, start=1.0, final=2.0) == 2.0
    assert cosine(15, total=10, start=1.0, final=2.0) == pytest.approx(2.0)
    assert warmup_cosine(400, **LR) == pytest.approx(1e-6)


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_an_empty_span_is_already_at_its_end(schedule) -> None:
    assert schedule(0, total=0, start=1.0, final=2.0) == 2.0


def test_no_warmup_starts_at_the_peak() -> None:
    assert warmup_cosine(0, **{**LR, "warmup": 0}) == pytest.approx(1e-3)


def test_warmup_longer_than_the_run_never_reaches_the_peak() -> None:
    assert warmup_cosine(10, **{**LR, "total": 10, "warmup": 40}) == pytest.approx(4e-4)
