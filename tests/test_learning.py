"""The comparison of TC-JEPA, its parts and I-JEPA: what is trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from jepa_fast.models.ijepa import IJepa
from jepa_fast.models.tcjepa import TCJepa
from jepa_fast.train.build import build_model
from jepa_fast.train.config import Config, load_config, parse_config

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import tables
from learning import VARIANTS, recipe


def config(name: str) -> Config:
    return parse_config(recipe(name), ["seed=3", "output=runs/none"])


@pytest.mark.parametrize("name", VARIANTS)
def test_all_variants_have_the_same_scenes_schedule_encoder_and_prediction_loss(name: str) -> None:
    one, other = config(name), config("tcjepa")
    assert one.data == other.data
    assert one.masks == other.masks
    assert one.train == other.train
    models = []
    for each in (one, other):
        torch.manual_seed(each.seed)
        models.append(build_model(each))
    assert models[0].loss == models[1].loss == "l2_norm"
    for mine, theirs in zip(*(model.encoder.parameters() for model in models), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_the_readme_shows_all_variants() -> None:
    assert list(tables._LEARNING) == list(VARIANTS)


def test_variants_differ_in_what_their_names_say() -> None:
    def options(name: str) -> dict[str, Any]:
        return config(name).model.model_dump()

    full = options("tcjepa")
    demo = load_config("demo")
    assert full == demo.model.model_dump()
    assert config("tcjepa").text == demo.text
    assert demo.text.captions == 2
    assert {**full, "sparsity_weight": 0, "consistency_weight": 0} == options("no_regularisers")
    assert {**full, "text_layers": [0]} == options("one_layer")
    assert {**full, "conditioning": "append"} == options("append")
    assert options("one_caption") == full
    assert config("one_caption").text.captions == 1
    models = {name: build_model(config(name)) for name in VARIANTS}
    assert type(models["ijepa"]) is IJepa
    assert {type(model) for name, model in models.items() if name != "ijepa"} == {TCJepa}


def test_a_shorter_run_differs_in_its_length_alone() -> None:
    short, full = recipe("append", images=640), recipe("append")
    assert short["data"].pop("train_length") == 640
    assert full["data"].pop("train_length") > 640
    assert short == full
