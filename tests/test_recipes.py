"""Every recipe at full size without memory, and for one step at a size that fits a test."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from jepa_fast.masks import BlockMaskSampler
from jepa_fast.train.build import build_model
from jepa_fast.train.config import load_config, recipe_names
from jepa_fast.train.logs import read_rows
from jepa_fast.train.run import pretrain

# Millions of trained parameters: encoder or crosser of the papers' sizes, then all the rest.
TRAINED = {
    "ijepa_vith14_in1k": 630.43 + 22.28,
    "tcjepa_vitb16_in1k": 85.65 + 23.93,
    "tcjepa_vitl16_in1k": 303.10 + 47.48,
    "tijepa_small_coco": 38.79 + 21.88,
    "tijepa_large_coco": 131.49 + 22.07,
}
REDUCED = (
    "device=cpu",
    "tensorboard=false",
    "model.encoder=vit_tiny_patch4",
    "model.encoder_options={embed_dim: 16, depth: 1, num_heads: 2}",
    "model.img_size=32",
    "model.predictor_dim=16",
    "model.predictor_depth=1",
    "model.predictor_heads=2",
    "data={kind: digits, train_length: 4}",
    "text={encoder: hashed, captions: 2, max_words: 4, dim: 8}",
    "train.batch_size=4",
    "train.steps=1",
    "train.compile=false",
    "train.collapse={}",
    "train.require_learning=false",
)
BY_METHOD = {
    "ijepa": (),
    "tcjepa": (),
    "tijepa": (
        "model.encoder_weights=null",
        "model.width=16",
        "model.depth=1",
        "model.num_heads=2",
    ),
    "probijepa": (),
}
NAMES = recipe_names()


def test_the_recipes_of_the_papers_are_there() -> None:
    heads = ("mixture", "autoregressive", "flow", "flow_matching", "diffusion")
    assert set(NAMES) == {
        "demo",
        "cifar10_ijepa",
        "cifar10_tijepa",
        "cifar10_tcjepa",
        *(f"cifar10_prob_{head}" for head in heads),
        "ijepa_vith14_in1k",
        "tijepa_small_coco",
        "tijepa_large_coco",
        "tcjepa_vitb16_in1k",
        "tcjepa_vitl16_in1k",
        "tcjepa_vitl14_cc27m",
        *(f"tiny_imagenet100_{head}" for head in heads),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_at_full_size(name: str) -> None:
    config = load_config(name, ["train.compile=false"])
    with torch.device("meta"):
        model = build_model(config)
    if name in TRAINED:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        assert trained == pytest.approx(TRAINED[name], abs=0.01)
    BlockMaskSampler(model.encoder.grid, **config.masks.model_dump())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_at_reduced_size(name: str, tmp_path: Path) -> None:
    method = load_config(name).model.method
    config = load_config(name, [*REDUCED, *BY_METHOD[method], f"output={tmp_path}"])
    assert pretrain(config) == []
    (row,) = read_rows(tmp_path)
    assert row["loss"] is not None
    assert math.isfinite(row["loss"])


# Epochs, warm-up epochs, batch size, peak learning rate, depth of the predictor.
SCHEDULES = {
    "ijepa_vith14_in1k": (300, 40, 2048, 1e-3, 12),
    "tcjepa_vitb16_in1k": (600, 40, 2048, 1e-3, 6),
    "tcjepa_vitl16_in1k": (600, 40, 2048, 1e-3, 12),
    "tcjepa_vitl14_cc27m": (50, 10, 2048, 1e-3, 12),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_recipe_has_the_papers_numbers(name: str) -> None:
    config = load_config(name)
    model, train = config.model, config.train
    lr = train.lr
    numbers = (train.epochs, lr.warmup_epochs, train.batch_size, lr.peak, model.predictor_depth)
    assert numbers == SCHEDULES[name]
    assert (lr.start, lr.final, train.betas, train.clip_grad) == (2e-4, 1e-6, (0.9, 0.999), None)
    assert [train.weight_decay.at(at, 2) for at in (0, 1, 2)] == pytest.approx([0.04, 0.22, 0.4])
    assert [train.momentum.at(at, 2) for at in (0, 1, 2)] == pytest.approx([0.996, 0.998, 1])
    assert (model.predictor_dim, model.img_size, train.precision) == (384, 224, "bfloat16")
    assert (config.data.augment.crop_scale, config.data.augment.flip) == ((0.3, 1.0), 0.0)
    masks = config.masks
    assert (masks.num_targets, masks.target_scale, masks.target_aspect, masks.min_context) == (
        4,
        (0.15, 0.2),
        (0.75, 1.5),
        10,
    )
    assert (masks.context_scale, masks.max_context) == ((0.85, 1.0), None)
    if model.method == "tcjepa":
        assert (model.loss, config.text.captions) == ("l2_norm", 8)
        assert (model.sparsity_weight, model.consistency_weight) == (0.1, 0.5)


def test_the_tijepa_and_probabilistic_recipes_have_the_papers_numbers() -> None:
    for size, name in (("small", "tijepa_small_coco"), ("large", "tijepa_large_coco")):
        model = load_config(name).model
        assert (model.size, model.block, model.loss) == (size, "self_cross", "l1")
        predictor = (model.predictor_dim, model.predictor_depth, model.predictor_heads)
        assert predictor == (384, 12, 12)
    for name in (name for name in NAMES if name.startswith("tiny_imagenet100")):
        config = load_config(name)
        with torch.device("meta"):
            encoder = build_model(config).encoder
        assert (encoder.grid, encoder.embed_dim, encoder.num_heads) == ((8, 8), 384, 8)
        assert (len(encoder.blocks), config.train.clip_grad) == (10, 3.0)
        momentum = config.train.momentum
        assert (momentum.start, momentum.final, momentum.shape) == (0.998, 1.0, "cosine")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_sets_a_warm_up_shorter_than_its_run(name: str) -> None:
    train = load_config(name).train
    assert train.lr.warmup_epochs is not None  # the default depends on the length of the run
    assert train.warmup_warning(train.epochs) is None


def test_the_cifar10_run_is_the_peers() -> None:
    config = load_config("cifar10_ijepa")
    model, train = config.model, config.train
    with torch.device("meta"):
        built = build_model(config)
    assert (built.encoder.grid, built.encoder.embed_dim) == ((8, 8), 192)
    assert (len(built.encoder.blocks), built.encoder.num_heads) == (6, 3)
    assert (model.predictor_dim, model.predictor_depth, model.img_size) == (96, 3, 32)
    assert (train.batch_size, train.epochs, train.lr.peak) == (128, 25, 1e-3)
    assert train.lr.warmup_epochs == 2
    assert [train.weight_decay.at(step, 10) for step in (0, 5, 10)] == [0.05] * 3
    assert [train.momentum.at(step, 10) for step in (0, 10)] == pytest.approx([0.996, 1.0])
    assert (config.data.augment.crop_scale, config.data.augment.flip) == (None, 0.5)
