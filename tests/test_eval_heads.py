"""What is said of a probabilistic head: of distributions that are known, and after a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from test_probijepa import OPTIONS, OwnHead, UnitNormal
from tiny_runs import tiny
from torch import Tensor

from jepa_fast import CheckpointError
from jepa_fast.data import Batch, Loader
from jepa_fast.eval import heads, write_report
from jepa_fast.eval.heads import SAMPLES as DRAWN
from jepa_fast.eval.heads import HeadScores, score_distribution, score_head
from jepa_fast.masks import BlockMaskSampler, pack_masks
from jepa_fast.models.probijepa import ProbIJepa
from jepa_fast.nn.heads import LatentDistribution
from jepa_fast.train.build import build_model, load_model
from jepa_fast.train.checkpoint import load_checkpoint
from jepa_fast.train.errors import ConfigError
from jepa_fast.train.evaluate import _HeadQuestion, evaluate
from jepa_fast.train.run import pretrain


class Wide(UnitNormal):
    """Samples lie twice as far apart as its density says."""

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        return self.loc + 2 * self._normal(n, generator)


def scores(distribution: LatentDistribution, target: Tensor) -> HeadScores:
    return score_distribution(distribution, target, population=target)


def test_a_true_distribution_is_judged_calibrated() -> None:
    torch.manual_seed(1)  # not that of the samples
    loc = torch.zeros(600, 8)
    target = torch.randn(600, 8)
    found = scores(UnitNormal(loc), target)
    assert found.tokens == 600
    assert found.nll == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.05)
    assert found.normal_nll == pytest.approx(found.nll, abs=0.05)
    error = 3 / math.sqrt(600 * 8)
    assert found.coverage == {
        "50": pytest.approx(0.50, abs=0.5 * error),
        "80": pytest.approx(0.80, abs=0.4 * error),
        "95": pytest.approx(0.95, abs=0.22 * error),
    }
    assert len(found.pit) == DRAWN + 1
    assert sum(found.pit) == pytest.approx(1)
    expected = torch.full((DRAWN + 1,), 1 / (DRAWN + 1)).double()
    chi2 = 4800 * ((torch.tensor(found.pit) - expected).square() / expected).sum()
    assert chi2 < 73  # of 39 degrees of freedom, 1 in 1000 is larger
    assert found.diversity == pytest.approx(1, abs=0.02)
    # The same question has the same answer.
    assert scores(UnitNormal(loc), target) == found


def test_a_distribution_of_nothing_or_of_others_is_refused() -> None:
    normal = UnitNormal(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"population must be .* D = 2 of target, got \[4, 3\]"):
        score_distribution(normal, torch.zeros(3, 2), torch.zeros(4, 3))
    with pytest.raises(TypeError, match="score_distribution: seed must be an integer, got None"):
        score_distribution(normal, normal.loc, torch.zeros(4, 2), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 token"):
        score_distribution(UnitNormal(torch.zeros(0, 2)), torch.zeros(0, 2), torch.zeros(4, 2))


def test_distributions_too_wide_or_far_off_are_found_out() -> None:
    torch.manual_seed(1)
    loc, target = torch.zeros(600, 8), torch.randn(600, 8)
    wide = scores(Wide(loc), target)
    assert wide.coverage["50"] > 0.7
    assert wide.diversity == pytest.approx(2, abs=0.05)
    assert wide.pit[0] < 0.01 < 0.04 < wide.pit[DRAWN // 2]
    off = scores(UnitNormal(loc - 100), target)
    assert off.coverage == {"50": 0, "80": 0, "95": 0}
    assert off.pit[-1] == 1
    never = scores(UnitNormal(loc), torch.full_like(target, 1e30))
    assert never.nll is None
    assert "NLL not finite nats" in str(never)


@pytest.mark.parametrize("name", OPTIONS)
def test_eval_asks_the_head_of_a_run(name: str, tmp_path: Path) -> None:
    options = json.dumps(OPTIONS[name])
    head = ("model.method=probijepa", f"model.head={name}", f"model.head_options={options}")
    folder = tmp_path / name
    pretrain(tiny(folder, *head, "train.steps=2"))
    found = evaluate(folder, ["eval.head_tokens=40"], report=True)
    assert found.head is not None
    assert found.head.tokens == 40
    assert all(
        value is not None and math.isfinite(value)
        for value in (found.head.nll, found.head.normal_nll, found.head.diversity)
    )
    assert {probe.name for probe in found.probes} == {"knn", "linear", "patch"}
    assert str(found).endswith(str(found.head))
    assert str(found.head).startswith("40 held-out targets: NLL ")
    told = json.loads((folder / "eval.json").read_text())["head"]
    assert told["nll"] == found.head.nll
    assert told["coverage"] == found.head.coverage
    assert "Ranks of targets among samples" in (folder / "report.html").read_text()

    assert evaluate(folder, ["eval.head_tokens=40"]).head == found.head


def test_samples_that_are_not_finite_have_no_ranks(tmp_path: Path) -> None:
    class Broken(UnitNormal):
        def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
            return super().sample(n, generator) * math.nan

    found = scores(Broken(torch.zeros(6, 4)), torch.randn(6, 4))
    assert found.nll is not None
    assert (found.coverage, found.pit, found.diversity) == (None, None, None)
    assert str(found).endswith("samples that are not finite")
    path = write_report(tmp_path / "report.html", title="broken", head=found)
    assert "samples that are not finite" in path.read_text()


@pytest.mark.parametrize("total", [1, 3, 250, 499, 1000])
def test_a_head_is_asked_about_images_from_all_over_the_data(total: int, tmp_path: Path) -> None:
    class Numbered:
        source = range(total)

        def __iter__(self) -> Iterator[Batch]:
            for ids in torch.arange(total).split(77):
                nothing = [()] * len(ids)
                yield Batch(ids[:, None, None, None].float(), ids, ids, nothing)

    config = tiny(tmp_path)
    question = _HeadQuestion(config, build_model(config), Numbered())
    assert torch.cat([batch.ids for batch in question]).tolist() == list(range(total))
    kept = question.images.flatten().tolist()
    assert len(kept) == min(total, 250)
    assert kept[0] == 0
    steps = torch.tensor(kept).diff()
    assert (steps >= max(1, total // 250)).all()
    assert (steps <= -(-total // 250)).all()
    assert kept[-1] >= total - -(-total // 250)


def test_the_data_are_read_once_for_probes_and_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(tiny(tmp_path / "run", "model.method=probijepa", "train.steps=2"))
    passes = []
    read = Loader.__iter__
    monkeypatch.setattr(Loader, "__iter__", lambda self: passes.append(1) or read(self))
    evaluate(tmp_path / "run")
    assert len(passes) == 2  # what probes learn from, and what they are tested on


def test_what_a_head_cannot_be_asked_is_said(tmp_path: Path) -> None:
    pretrain(tiny(tmp_path / "run", "model.method=probijepa", "train.steps=2"))
    with pytest.raises(ConfigError, match="masks: target_scale: expected at least one patch"):
        evaluate(tmp_path / "run", ["masks.target_scale=[0.001,0.001]"])
    single = ("masks.num_targets=1", "masks.target_scale=[0.0157,0.0157]", "data.val_length=1")
    with pytest.raises(ConfigError, match=r"data\.val: .*at least 2 target tokens.*head_tokens=0"):
        evaluate(tmp_path / "run", single)


def test_eval_asks_no_head_where_there_is_none_or_nothing_to_ask(tmp_path: Path) -> None:
    pretrain(tiny(tmp_path / "plain", "train.steps=2"))
    assert evaluate(tmp_path / "plain").head is None
    assert "head" not in json.loads((tmp_path / "plain" / "eval.json").read_text())
    pretrain(tiny(tmp_path / "head", "model.method=probijepa", "train.steps=2"))
    assert evaluate(tmp_path / "head", ["eval.head_tokens=0"]).head is None


def test_a_heads_scores_are_of_its_own_distribution() -> None:
    torch.manual_seed(0)
    model = ProbIJepa(
        "vit_tiny_patch4", OwnHead, img_size=16, predictor_dim=12, predictor_heads=2
    ).eval()
    batches = []
    for i in range(2):
        masks = BlockMaskSampler(model.encoder.grid, seed=0)(0, 3 * i + torch.arange(3))
        batches.append((torch.randn(3, 3, 16, 16), masks))
    with torch.no_grad():
        target = torch.cat([model.targets(*batch) for batch in batches])
        nll = torch.cat(
            [-model.predict_distribution(*b).log_prob(model.targets(*b)) for b in batches]
        )
    found = score_head(model, batches, tokens=10**6)
    assert found.tokens == len(target)
    assert found.nll == pytest.approx(nll.mean().item() / target.shape[1], rel=1e-5)
    few = score_head(model, batches, tokens=20)
    assert few.tokens == 20
    assert few.normal_nll == found.normal_nll  # of all targets
    assert few.nll != found.nll
    with pytest.raises(ValueError, match="at least 2 target tokens"):
        score_head(model, [])
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        score_head(model, batches, tokens=0)
    assert score_head(model, batches, numpy.int64(20), numpy.int64(0)) == few
    with pytest.raises(TypeError, match="seed must be an integer, got None"):
        score_head(model, batches, seed=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a ProbIJepa, got VisionTransformer"):
        score_head(model.encoder, batches)


def test_of_packed_masks_only_targets_that_count_are_asked_about() -> None:
    torch.manual_seed(0)
    model = ProbIJepa(
        "vit_tiny_patch4", OwnHead, img_size=32, predictor_dim=12, predictor_heads=2
    ).eval()
    images = torch.randn(5, 3, 32, 32)
    masks = BlockMaskSampler(model.encoder.grid, num_targets=2, min_context=2)(0, 5)
    want = score_head(model, [(images, masks)], tokens=10**6)
    packs = pack_masks(masks, 1 + 2 * masks.context.shape[1])
    assert len(packs) > 1
    found = score_head(model, [(images, pack) for pack in packs], tokens=10**6)
    assert found.tokens == want.tokens
    assert found.nll == pytest.approx(want.nll, rel=1e-5)
    assert found.normal_nll == pytest.approx(want.normal_nll, rel=1e-5)


def test_tokens_asked_in_parts_count_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = ProbIJepa(
        "vit_tiny_patch4", OwnHead, img_size=16, predictor_dim=12, predictor_heads=2
    ).eval()
    masks = BlockMaskSampler(model.encoder.grid, seed=0)(0, 3)
    batches = [(torch.randn(3, 3, 16, 16), masks)]
    whole = score_head(model, batches)
    monkeypatch.setattr(heads, "_TOGETHER", 5)
    parts = score_head(model, batches)
    assert parts.nll == pytest.approx(whole.nll, rel=1e-6)
    assert parts.normal_nll == whole.normal_nll
    assert sum(parts.pit) == pytest.approx(1)
    assert parts.diversity == pytest.approx(whole.diversity, rel=0.05)  # of other samples


def test_a_model_of_a_run_is_loaded_to_be_used(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", "model.method=probijepa", "train.steps=2")
    pretrain(config)
    model = load_model(config.output)
    assert type(model) is ProbIJepa
    assert not model.training
    state = load_checkpoint(tmp_path / "run" / "last.pt")["model"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    with pytest.raises(CheckpointError, match="of another model"):
        load_model(config.output, ["model.head_options.num_components=2"])
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_model(tmp_path / "nowhere")
