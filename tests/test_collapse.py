from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jepa_fast.models.collapse import (
    collapse_metrics,
    effective_rank,
    rank_by_eigenvalues,
    rank_by_resolvents,
)


def rank_from_singular_values(tokens: Tensor) -> float:
    share = torch.linalg.svdvals(tokens.double())
    share = share / share.sum()
    return math.exp(-sum(p * math.log(p) for p in share.tolist() if p > 0))


def spectra(rows: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, width, generator=generator)
    basis = torch.randn(5, width, generator=generator)
    return {
        "isotropic": noise,
        "decaying": noise * torch.exp(-torch.arange(width) / 8.0),
        "five directions": noise[:, :5] @ basis,
        "mean": noise + 3,
        "nearly one direction": 1 + 1e-3 * noise,
        "one direction": torch.ones(rows, width),
    }


@pytest.mark.parametrize("shape", [(200, 32), (128, 128), (100, 150)], ids=str)
def test_effective_rank_is_the_entropy_of_the_singular_values(shape: tuple[int, int]) -> None:
    for name, tokens in spectra(*shape).items():
        for scale in (1.0, 1e-6, 1e6):
            got = effective_rank(tokens * scale).item()
            assert got == pytest.approx(rank_from_singular_values(tokens), rel=1e-3), (name, scale)


def test_both_ways_to_the_effective_rank_agree() -> None:
    """The one for a GPU has no GPU here."""
    for name, tokens in spectra(128, 100).items():
        gram = tokens.double().T @ tokens.double()
        gram = gram / gram.trace()
        expected = rank_from_singular_values(tokens)
        assert rank_by_eigenvalues(gram).item() == pytest.approx(expected, rel=1e-3), name
        assert rank_by_resolvents(gram).item() == pytest.approx(expected, rel=0.02), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rank", [rank_by_eigenvalues, rank_by_resolvents])
def test_a_rank_of_what_is_not_finite_is_none(rank: Callable, bad: float) -> None:
    gram = torch.eye(5, dtype=torch.float64)
    gram[2, 1] = bad
    assert rank(gram).isnan()
    tokens = torch.randn(20, 8)
    tokens[3, 2] = bad
    assert effective_rank(tokens).isnan()


def test_both_ways_find_no_rank_in_zeros() -> None:
    zeros = torch.zeros(5, 5, dtype=torch.float64)
    assert 0 <= rank_by_eigenvalues(zeros) < 0.01
    assert 0 <= rank_by_resolvents(zeros) < 0.01


def test_effective_rank_of_many_wide_tokens_is_that_of_a_sample_of_128() -> None:
    tokens = torch.randn(1024, 200)
    expected = rank_from_singular_values(tokens[::8])
    assert effective_rank(tokens).item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("slots", [12, 16, 32, 36])
@pytest.mark.parametrize("width", [96, 384])
def test_effective_rank_looks_at_every_place_of_a_block(slots: int, width: int) -> None:
    """Whatever varies, the place in the block or the block, and however counts divide."""
    directions = torch.linalg.qr(torch.randn(width, width)).Q
    by_slot = directions[:slots].expand(512, -1, -1).flatten(0, 1)
    assert effective_rank(by_slot).item() == pytest.approx(slots, rel=0.15)
    by_block = directions[:64].repeat(8, 1)[:, None].expand(-1, slots, -1).flatten(0, 1)
    assert effective_rank(by_block).item() == pytest.approx(64, rel=0.15)


def test_effective_rank_of_nothing_but_zeros_is_near_zero() -> None:
    assert 0 <= effective_rank(torch.zeros(20, 8)).item() < 0.01


def test_metrics_are_spread_and_rank_of_both_sides() -> None:
    prediction, target = torch.randn(6, 5, 8, dtype=torch.bfloat16), torch.randn(6, 5, 8)
    prediction[..., 3] = 2
    metrics = collapse_metrics(prediction.requires_grad_(), target)
    assert sorted(metrics) == [
        f"{side}_{kind}"
        for side in ("prediction", "target")
        for kind in ("rank", "std_mean", "std_min")
    ]
    for value in metrics.values():
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert not value.requires_grad
    assert metrics["prediction_std_min"] == 0
    spread = target.flatten(0, 1).numpy().std(axis=0)
    assert metrics["target_std_mean"].item() == pytest.approx(spread.mean())
    assert metrics["target_std_min"].item() == pytest.approx(spread.min())
    assert metrics["target_rank"].item() == pytest.approx(
        rank_from_singular_values(target.flatten(0, 1)), rel=0.02
    )


def test_metrics_never_read_a_value_on_the_host() -> None:
    # Tensors on the meta device hold no values: whatever waits for one fails there.
    metrics = collapse_metrics(*torch.empty(2, 4, 3, 200, device="meta"))
    assert all(value.is_meta for value in metrics.values())


@pytest.mark.parametrize("width", [8, 200])
@pytest.mark.parametrize("kept", [0.02, 0.6])
def test_tokens_that_do_not_count_do_not_count(width: int, kept: float) -> None:
    """More or fewer of them than the rank looks at; whatever the others hold."""
    generator = torch.Generator().manual_seed(0)
    shape = (40, 50)
    counts = torch.rand(shape, generator=generator) < kept
    prediction, target = torch.randn(2, *shape, width, generator=generator)
    prediction[~counts] = math.nan
    target[~counts] = 1e4
    want = collapse_metrics(prediction[counts], target[counts])
    got = collapse_metrics(prediction, target, counts)
    assert got.keys() == want.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("count", [60, 2000])
def test_a_mask_that_is_true_everywhere_changes_nothing(count: int) -> None:
    prediction, target = torch.randn(2, count, 150)
    everywhere = torch.ones(count, dtype=torch.bool)
    want = collapse_metrics(prediction, target)
    assert collapse_metrics(prediction, target, everywhere) == want
    compiled = torch.compile(collapse_metrics, fullgraph=True, backend="eager")
    assert compiled(prediction, target, everywhere) == want


def test_no_token_that_counts() -> None:
    metrics = collapse_metrics(*torch.randn(2, 20, 8), torch.zeros(20, dtype=torch.bool))
    assert metrics["prediction_std_mean"].isnan()
    assert 0 <= metrics["prediction_rank"] < 0.01
