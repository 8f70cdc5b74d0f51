"""The comparison of the probabilistic heads: what is trained, and what is asked of it."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_probijepa import OPTIONS
from tiny_runs import VALUES

from jepa_fast import cli
from jepa_fast.models.ijepa import IJepa
from jepa_fast.models.probijepa import ProbIJepa
from jepa_fast.train.build import build_model
from jepa_fast.train.config import Config, load_config, parse_config

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import heads
import tables

TINY = "tiny_imagenet100_mixture"
both_recipes = pytest.mark.parametrize("base", [heads.RECIPE, TINY])


def config(name: str, base: str = heads.RECIPE, ablation: str | None = None) -> Config:
    return parse_config(heads.recipe(name, base, ablation), ["seed=3", "output=runs/none"])


@both_recipes
@pytest.mark.parametrize("name", heads.HEADS)
def test_all_heads_have_the_same_images_masks_schedule_and_first_encoder(
    name: str, base: str
) -> None:
    one, other = config(name, base), config("mixture", base)
    assert one.data == other.data
    assert one.masks == other.masks
    assert one.train == other.train
    shared = {"encoder", "encoder_options", "img_size", "init"}
    shared |= {"predictor_dim", "predictor_depth", "predictor_heads"}
    assert one.model.model_dump(include=shared) == other.model.model_dump(include=shared)
    if base == TINY:  # a size that takes time
        with torch.device("meta"):
            model = build_model(one)
    else:
        models = []
        for each in (one, other):
            torch.manual_seed(each.seed)
            models.append(build_model(each))
        model = models[0]
        for mine, theirs in zip(*(m.encoder.parameters() for m in models), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert type(model) is (IJepa if name == "ijepa" else ProbIJepa)


@both_recipes
def test_heads_are_those_of_their_recipes(base: str) -> None:
    for name in ("mixture", "autoregressive", "flow", "flow_matching", "diffusion"):
        recipe = load_config(base.removesuffix("mixture") + name)
        assert config(name, base).model == recipe.model
        assert heads.recipe(name, base)["data"] == recipe.as_dict()["data"]
    per_coordinate = config("mixture_coordinate", base).model
    joint = config("mixture", base).model
    assert per_coordinate == joint.model_copy(update={"head_options": {"event": "coordinate"}})


def test_the_schedule_is_the_recipes_cut_to_the_hour_or_as_it_is() -> None:
    cut, whole = config("mixture").train, load_config(heads.RECIPE).train
    assert {"epochs": cut.epochs, "batch_size": cut.batch_size} == heads.CUT[heads.RECIPE]
    assert cut.epochs < whole.epochs
    share = whole.lr.warmup_epochs / whole.epochs
    assert cut.lr.warmup_epochs / cut.epochs == pytest.approx(share)
    assert config("mixture", TINY).train == load_config(TINY).train.model_copy(
        update={"require_learning": False, "collapse": config("mixture").train.collapse}
    )
    assert load_config(TINY).train.epochs == 200
    longer = heads.recipe("flow", epochs=20)["train"]
    assert (longer["epochs"], longer["lr"]["warmup_epochs"]) == (20, 4)
    overridden = heads.recipe("flow", overrides=["data.train=/elsewhere/*.tar"])
    assert overridden["data"]["train"] == "/elsewhere/*.tar"


@pytest.mark.parametrize("ablation", heads.ABLATIONS)
@both_recipes
def test_variants_of_an_ablation_differ_in_what_its_name_says(ablation: str, base: str) -> None:
    options = {
        "components": {"num_components"},
        "family": {"family", "event"},
        "couplings": {"num_couplings"},
        "timesteps": {"timesteps"},
        "flow": set(),
    }[ablation]
    without, values = [], []
    for name in heads.ABLATIONS[ablation]:
        variant = heads.recipe(name, base, ablation)
        head_options = variant["model"]["head_options"]
        values.append([head_options.pop(option) for option in sorted(options)])
        if ablation == "flow":
            assert variant["model"].pop("head").replace("_", " ") in name
            del variant["output"]  # these two have recipes of their own
        without.append(variant)
        for value in values[-1]:
            assert str(value) in name
        with torch.device("meta"):
            build_model(config(name, base, ablation))
    assert all(variant == without[0] for variant in without)
    assert (
        values
        == {
            "components": [[1], [5], [16]],
            "family": [
                [event, family]
                for event in ("joint", "coordinate")
                for family in ("gaussian", "logistic")
            ],
            "couplings": [[2], [6], [10]],
            "timesteps": [[100], [1000]],
            "flow": [[], []],
        }[ablation]
    )


def test_results_have_names_of_their_own() -> None:
    names = [heads.default_output(heads.RECIPE, None), heads.default_output(TINY, None)]
    names += [heads.default_output(heads.RECIPE, ablation) for ablation in heads.ABLATIONS]
    assert [path.name for path in names] == [
        "heads.json",
        "heads_tiny_imagenet100.json",
        "heads_components.json",
        "heads_family.json",
        "heads_couplings.json",
        "heads_timesteps.json",
        "heads_flow.json",
    ]
    assert {str(path.parent.relative_to(heads.ROOT)) for path in names} == {
        "benchmarks/results/recipes"
    }


def small(name: str, folder: Path) -> Config:
    """A run of a second."""
    file = folder / "recipe.yaml"
    values = copy.deepcopy(VALUES)
    values["model"] |= {"method": "probijepa", "head": "mixture"}
    file.write_text(yaml.safe_dump(values))
    made = heads.recipe(name, str(file), epochs=1, overrides=["train.steps=2"])
    options = dict(OPTIONS.get(made["model"].get("head"), {}))
    if options:
        made["model"]["head_options"] = options
    return parse_config(made, [f"output={folder / name}"])


def test_a_whole_comparison_and_going_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, where the command starts new ones."""
    commands = []

    def run(threads: int, *arguments: object) -> None:
        assert threads == 1
        words = [str(argument) for argument in arguments]
        commands.append(words[2] if words[0] == "-m" else words[1])
        if words[0] == "-m":
            assert cli.main(words[2:]) == 0
        else:
            heads.main(words[1:])

    monkeypatch.setattr(heads, "run_python", run)
    monkeypatch.setattr(heads.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(heads, "uncommitted", lambda root: [])
    monkeypatch.setattr(heads, "TOKENS", 16)
    monkeypatch.setattr(heads, "_ROUNDS", 1)
    small("mixture", tmp_path)
    command = ["--recipe", str(tmp_path / "recipe.yaml"), "--scratch", str(tmp_path / "scratch")]
    command += ["--output", str(tmp_path / "heads.json"), "--epochs", "1", "--seeds", "1"]
    heads.main([*command, "--variants", "ijepa", "mixture", "--", "train.steps=2"])
    assert commands == ["pretrain", "eval", "pretrain", "eval", "--costs"]
    found = json.loads((tmp_path / "heads.json").read_text())
    assert (found["steps"], found["ablation"], found["uncommitted"]) == (2, None, [])
    assert list(found["variants"]) == ["ijepa", "mixture"]
    assert len(found["untrained"]["knn"]) == 3
    (run_of_mixture,) = found["variants"]["mixture"]["runs"]
    assert set(run_of_mixture["probes"]) == {"knn", "linear", "patch"}
    assert math.isfinite(run_of_mixture["target_rank"])
    assert "pit" in run_of_mixture
    assert "pit" not in found["variants"]["ijepa"]["runs"][0]
    assert found["variants"]["mixture"]["costs"]["images_per_second"] > 0
    assert (tmp_path / "heads.png").exists()

    commands.clear()
    heads.main([*command, "--variants", "ijepa", "mixture_coordinate", "--", "train.steps=2"])
    assert commands == ["pretrain", "eval", "--costs"]

    # 5 components are the default, so this run is that of the mixture.
    commands.clear()
    ablation = ["--ablation", "components", "--variants"]
    heads.main([*command, *ablation, "K=5", "K=1", "--", "train.steps=2"])
    assert commands == ["eval", "pretrain", "eval", "--costs"]
    found = json.loads((tmp_path / "heads.json").read_text())
    assert found["variants"]["K=5"]["runs"] == [run_of_mixture]
    assert len(found["untrained"]["knn"]) == 3
    with pytest.raises(SystemExit):
        heads.main([*command, "--variants", "gan"])


def test_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "TOKENS", 16)
    names = ("ijepa", "mixture_coordinate", "autoregressive")
    monkeypatch.setattr(heads, "_ROUNDS", 1)
    found = heads.measure_costs({name: small(name, tmp_path) for name in names})
    assert list(found) == list(names)
    assert found["ijepa"]["sample_microseconds"] is None
    for name in names[1:]:
        assert all(value > 0 for value in found[name].values())


def results() -> dict[str, Any]:
    pit = [1 / (heads.SAMPLES + 1)] * (heads.SAMPLES + 1)
    plain = {"probes": {"knn": 0.25, "linear": 0.5}, "target_rank": 41.3}
    asked = {
        "nll": 0.75,
        "normal_nll": 1.25,
        "pit": pit,
        "coverage": {"50": 0.501, "80": 0.79, "95": 0.96},
        "diversity": 0.875,
    }
    cost = {
        "images_per_second": 211.4,
        "step_bytes": 3 * 2**20,
        "parameters": 500_000,
        "sample_microseconds": 12.345,
    }
    variants = {name: {"costs": cost, "runs": [{**plain, **asked}] * 2} for name in heads.HEADS}
    without = {**cost, "sample_microseconds": None}
    variants["ijepa"] = {"costs": without, "runs": [plain, plain]}
    return {"untrained": {"knn": [0.2, 0.3], "linear": [0.4]}, "variants": variants}


def test_the_table_shows_all_heads(tmp_path: Path) -> None:
    assert list(tables.HEAD_NAMES) == list(heads.HEADS)
    (tmp_path / "recipes").mkdir()
    some = results()
    lost = dict.fromkeys(("nll", "normal_nll", "coverage", "pit", "diversity"))
    some["variants"]["diffusion"]["runs"] = [
        {**run, **lost} for run in some["variants"]["diffusion"]["runs"]
    ]
    (tmp_path / "recipes/heads.json").write_text(json.dumps(some))
    lines = tables.heads(tables.Results(tmp_path))
    assert lines[2] == (
        "| encoder without training | 25.0 % (20.0 to 30.0) | 40.0 % (40.0 to 40.0) | - | - | - "
        "| - | - | - | - | - | - |"
    )
    assert lines[3] == (
        "| I-JEPA, deterministic | 25.0 % (25.0 to 25.0) | 50.0 % (50.0 to 50.0) | 41 | 0.50 M | - "
        "| - | - | - | 211 | 3 MiB | - |"
    )
    assert lines[4] == (
        "| mixture, joint | 25.0 % (25.0 to 25.0) | 50.0 % (50.0 to 50.0) | 41 | 0.50 M | 0.750 "
        "| 0.50 | 50 / 79 / 96 % | 0.88 | 211 | 3 MiB | 12.3 µs |"
    )
    row = lines[2 + list(heads.HEADS).index("diffusion") + 1]
    assert "| not finite | - | - | not finite |" in row
    assert len(lines) == 3 + len(heads.HEADS)


def test_the_table_of_ablations_shows_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    mixture = results()["variants"]["mixture"]
    for ablation, variants in heads.ABLATIONS.items():
        file = tmp_path / f"recipes/heads_{ablation}.json"
        file.write_text(json.dumps({"variants": dict.fromkeys(variants, mixture)}))
    lines = tables.ablations(tables.Results(tmp_path), *heads.ABLATIONS)
    assert lines[2] == (
        "| components | K=1 | 0.50 M | 41 | 0.750 | 0.50 | 50 / 79 / 96 % | 0.88 | 211 | 12.3 µs |"
    )
    assert len(lines) == 2 + sum(len(variants) for variants in heads.ABLATIONS.values())
    assert lines[-1].startswith("| flow | flow matching |")


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    some = results()
    heads.draw(some, tmp_path / "heads.png")
    whole = (tmp_path / "heads.png").read_bytes()
    assert whole.startswith(b"\x89PNG")
    for run in some["variants"]["diffusion"]["runs"]:
        run |= dict.fromkeys(("nll", "normal_nll", "coverage", "pit", "diversity"))
    heads.draw(some, tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes() != whole
