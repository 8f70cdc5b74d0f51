"""Runs that take a second: a model of width 16 on scenes of digits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import yaml

from jepa_fast.train.build import Prepare, build_loader, build_model, build_text
from jepa_fast.train.config import Config, parse_config
from jepa_fast.train.distributed import World
from jepa_fast.train.trainer import Trainer

VALUES: dict[str, Any] = {
    "device": "cpu",
    "tensorboard": False,
    "model": {
        "method": "ijepa",
        "encoder": "vit_tiny_patch4",
        "encoder_options": {"embed_dim": 16, "depth": 1, "num_heads": 2},
        "img_size": 32,
        "predictor_dim": 16,
        "predictor_depth": 1,
        "predictor_heads": 2,
    },
    "data": {
        "kind": "digits",
        "train_length": 48,
        "val_length": 24,
        "probe_length": 32,
        "augment": {"flip": 0.5, "mean": [0.3, 0.3, 0.3], "std": [0.3, 0.3, 0.3]},
    },
    "text": {"captions": 2, "max_words": 8, "dim": 8},
    "train": {
        "steps": 20,
        "batch_size": 8,
        "lr": {"warmup_epochs": 1},
        "log_every": 5,
        "checkpoint_every": 10,
    },
}


def tiny(folder: Path, *overrides: str) -> Config:
    """A tiny run that writes into `folder`: 6 steps an epoch, 20 steps."""
    return parse_config({"output": str(folder), **copy.deepcopy(VALUES)}, overrides)


def write_recipe(path: Path) -> str:
    """The tiny run as a recipe file."""
    path.write_text(yaml.safe_dump(VALUES))
    return str(path)


def trainer_of(config: Config, world: World | None = None) -> Trainer:
    """What `pretrain` builds of a configuration; without a world, for one process on the CPU."""
    world = world or World(torch.device("cpu"))
    torch.manual_seed(config.seed)
    model = build_model(config)
    torch.manual_seed(config.seed)
    text = build_text(config, world.device)
    return Trainer(
        model=model,
        loader=build_loader(config, world),
        prepare=Prepare(config, model, text, world.device),
        config=config.train,
        folder=Path(config.output),
        world=world,
        described=config.as_dict(),
    )
