"""From a configuration to the objects of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import jepa_fast
from jepa_fast.data import Batch, DigitScenes, HashedWords, Loader, Transform, load_in_memory
from jepa_fast.data.images import CocoCaptions, ImageFolder
from jepa_fast.data.shards import ShardSource, find_shards
from jepa_fast.data.sources import Source
from jepa_fast.interop.checkpoints import load_parts, read_checkpoint
from jepa_fast.interop.text import TextEncoder, load_text_encoder
from jepa_fast.masks import BlockMasks, BlockMaskSampler
from jepa_fast.nn.attention import Block
from jepa_fast.nn.vit import create_encoder
from jepa_fast.ranges import phase
from jepa_fast.train.checkpoint import (
    WEIGHTS,
    check_whole,
    find_last,
    load_checkpoint,
    load_weights,
)
from jepa_fast.train.config import Config, DataBase, parse_config
from jepa_fast.train.distributed import World
from jepa_fast.train.errors import ConfigError

_log = logging.getLogger(__name__)

MODELS = {"ijepa": "IJepa", "tijepa": "TIJepa", "tcjepa": "TCJepa", "probijepa": "ProbIJepa"}
WITH_TEXT = ("tijepa", "tcjepa")
_PATHS = ("train", "train_images", "val", "val_images")  # of data, in the order they are asked for

Split = Literal["train", "val", "probe"]
"""What is trained on, what probes are tested on, and what they learn from: training images."""
Text = HashedWords | TextEncoder


def build_model(config: Config) -> Any:
    """The untrained model, on the default device; a frozen encoder with its weights.

    Raises:
        ConfigError: sizes or names that do not fit each other.
        CheckpointError, FileNotFoundError: the weights of the frozen encoder cannot be had.
    """
    section = config.model
    own = {"method", "encoder", "encoder_options", "img_size", "encoder_weights", "cache_features"}
    options = section.model_dump(exclude=own)
    with naming("model"):
        encoder = create_encoder(
            section.encoder,
            section.img_size,
            init=section.init,
            **section.encoder_options.model_dump(exclude_none=True),
        )
        if section.method in WITH_TEXT:
            options["text_dim"] = config.text.dim
        if section.method == "tijepa":
            options["save_frozen"] = section.encoder_weights is None
            with naming("model.encoder_weights"):
                _load_frozen(encoder, section.encoder_weights)
        model = getattr(jepa_fast, MODELS[section.method])(encoder, **options)
    if config.train.compile:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()
    return model


def load_model(checkpoint: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The trained model of a run, on the default device, in eval mode.

    Args:
        checkpoint: file, or the output folder of a run.
        overrides: `key=value` over the run's own configuration.

    Raises:
        CheckpointError: there is none, it is damaged, or of another model than it says.
        ConfigError: a configuration of another version, or overrides that do not fit.
    """
    state = load_checkpoint(checkpoint, parts=WEIGHTS)
    model = build_model(parse_config(state["config"], overrides, source=str(checkpoint)))
    load_weights(model, state)
    return model.eval()


def _load_frozen(encoder: nn.Module, weights: str | None) -> None:
    """The teacher's weights, of a run here (its folder or a checkpoint) or a public checkpoint."""
    if weights is None:
        _log.warning(
            "model.encoder_weights is not given: the frozen image encoder has RANDOM weights, and "
            "the run learns from what they happen to keep; name a checkpoint of an I-JEPA run"
        )
        return
    if next(encoder.parameters()).is_meta:
        return  # only shapes are wanted
    path = Path(weights)
    if not path.exists():
        raise FileNotFoundError(
            f"expected a checkpoint, or the output folder of a run, got {weights}, which does not "
            "exist; `jepa-fast pretrain` with an I-JEPA recipe makes one, null takes random weights"
        )
    if path.is_dir():
        path = find_last(path) or path / "last.pt"
    content = read_checkpoint(path)
    if "format" in content:  # written by `jepa-fast pretrain`: one state dict for the whole model
        prefix = "target_encoder."
        check_whole(path)
        state = content["model"].items()
        content = {
            "target_encoder": {k.removeprefix(prefix): v for k, v in state if k.startswith(prefix)}
        }
    load_parts({"target_encoder": encoder}, content)


def build_text(config: Config, device: torch.device) -> Text | None:
    """What turns captions into words; None for a model that reads none.

    Raises:
        ConfigError: a text encoder of another width than `text.dim`.
        FileNotFoundError, ImportError: it cannot be loaded; says what to do.
    """
    if config.model.method not in WITH_TEXT:
        return None
    text = config.text
    if text.encoder == "hashed":
        return HashedWords(
            text.dim, text.max_words, config.seed, context=text.context, position=text.position
        )
    with naming("text.encoder"):
        encoder = load_text_encoder(
            text.encoder,
            max_words=text.max_words,
            normalize=text.normalize,
            seed=config.seed,
            trust_remote_code=text.trust_remote_code,
        )
    if encoder.dim != text.dim:
        raise ConfigError(
            f"text.dim: expected {encoder.dim}, the width of {text.encoder}, got {text.dim}"
        )
    return encoder.to(device)


def build_source(config: Config, split: Split) -> Source:
    """Where the images of a split come from.

    Raises:
        ConfigError: the path is not configured, or nothing usable is there.
    """
    data: Any = config.data
    name: Literal["train", "val"] = "val" if split == "val" else "train"
    with naming(f"data.{name}"):
        if data.kind == "digits":
            own = {"kind", "train_length", "val_length", "probe_length", *DataBase.model_fields}
            options = data.model_dump(exclude=own)
            length = getattr(data, f"{split}_length")
            scenes = DigitScenes(length, split=name, seed=config.seed, **options)
            if split == "train":
                scenes.patch = None  # only probes look at the labels of patches
            return scenes
        path = getattr(data, name)
        if path is None:
            raise ValueError("expected a path, got none")
        source: Any
        try:
            if data.kind == "shards":
                source = ShardSource(path, getattr(data, f"{name}_length"))
            elif data.kind == "folder":
                # Labels mean the same in both folders, even if one lacks a class.
                classes = ImageFolder(data.train).classes if split == "val" else None
                source = ImageFolder(path, captions=data.captions, classes=classes)
            else:
                source = CocoCaptions(path, getattr(data, f"{name}_images") or Path(path).parent)
        except FileNotFoundError as error:
            raise _elsewhere(error, data) from error
        if data.in_memory or len(source) == 0:  # of an empty source, it says what is wrong with it
            return load_in_memory(source, data.memory_size)
        return source


def check_data_paths(config: Config) -> None:
    """Notice before a training what would otherwise fail after it: paths that are not there.

    Nothing is read. Remote shards are not looked for.

    Raises:
        ConfigError: a path that is given does not exist; of several the first, and so one of
            training before one of validation.
    """
    data: Any = config.data
    for name in _PATHS:
        path = getattr(data, name, None)
        if path is None:
            continue
        with naming(f"data.{name}"):
            try:
                if data.kind == "shards":
                    find_shards(path)
                elif not Path(path).exists():
                    raise FileNotFoundError(f"expected an existing path, got {path}")
            except FileNotFoundError as error:
                told = str(_elsewhere(error, data))
                if name.startswith("val"):
                    told += "; data.val=null trains without it"
                raise FileNotFoundError(told) from error


def _elsewhere(error: FileNotFoundError, data: Any) -> FileNotFoundError:
    """The error of a path of `data`, with where it was looked for."""
    keys = " ".join(f"data.{key}=..." for key in _PATHS if hasattr(data, key))
    return FileNotFoundError(
        f"{error} (a relative path starts at the working directory, {Path.cwd()}); {keys} "
        "name another place"
    )


def build_loader(config: Config, world: World) -> Loader:
    """Training batches: this rank's share.

    Raises:
        ConfigError: the data are not there, the batch cannot be shared evenly, or a model of images
            and text would get no caption at all. Shards that are read while training do not tell
            beforehand: there `Prepare` warns.
    """
    batch_size = config.train.batch_size
    if batch_size % world.size:
        raise ConfigError(
            f"train.batch_size: expected a multiple of the {world.size} processes, got {batch_size}"
        )
    source = build_source(config, "train")
    method = config.model.method
    if method in WITH_TEXT and not getattr(source, "has_captions", True):
        raise ConfigError(
            f"data.train: expected images with captions, which model.method={method} learns from, "
            "got none with any; for a folder, data.captions='a photo of a {}' makes them"
        )
    if len(source) < batch_size:
        raise ConfigError(
            f"train.batch_size: expected at most the {len(source)} images of data.train, got "
            f"{batch_size}; it counts those of all processes"
        )
    with naming("train.batch_size"):
        return Loader(
            source,
            batch_size // world.size,
            train=True,
            transform=build_transform(config, train=True),
            seed=config.seed,
            num_workers=config.data.workers,
            rank=world.rank,
            world_size=world.size,
            shuffle_buffer=config.data.shuffle_buffer,
            pin_memory=world.device.type == "cuda",
        )


def build_probe_loader(config: Config, split: Split, device: torch.device) -> Loader:
    """Every image of a split once, in order, without augmentation."""
    return Loader(
        build_source(config, split),
        config.eval.batch_size,
        train=False,
        transform=build_transform(config, train=False),
        num_workers=config.data.workers,
        pin_memory=device.type == "cuda",
    )


def build_transform(config: Config, train: bool) -> Transform:
    """From uint8 to normalised images: augmented, or the centre alone."""
    options = config.data.augment.model_dump()
    if not train:
        options |= {"crop_scale": None, "flip": 0.0}
    with naming("data.augment"):
        return Transform(config.model.img_size, seed=config.seed, **options)


class Prepare:
    """Makes a model's inputs of a batch: masks and words as functions of (seed, step, sample id).

    Args:
        config: of the run.
        model: for its patch grid, and its frozen encoder where features are cached.
        text: what `build_text` gave.
        device: where the inputs go.

    Raises:
        ConfigError: masks that cannot be drawn on this grid.
    """

    def __init__(self, config: Config, model: Any, text: Text | None, device: torch.device) -> None:
        self.model, self.text, self.device = model, text, device
        self.captions = config.text.captions
        self._first_batch = True
        grid = model.encoder.grid
        with naming("masks"):
            self.sampler = BlockMaskSampler(grid, seed=config.seed, **config.masks.model_dump())
        caching = getattr(config.model, "cache_features", False)
        self._features: dict[int, Tensor] | None = {} if caching else None

    def __call__(self, batch: Batch, step: int) -> tuple[Tensor, BlockMasks, dict[str, Tensor]]:
        """Images, masks and text on the device."""
        with phase("masks"):
            masks = self.sampler(step, batch.ids).to(self.device, non_blocking=True)
        images = batch.images.to(self.device, non_blocking=True)
        more: dict[str, Tensor] = {}
        if self.text is not None:
            if self._first_batch and not any(batch.captions):
                _log.warning(
                    "no image of the first batch has a caption: without captions this model learns "
                    "nothing of text; shards hold them in json (captions) or txt files"
                )
            self._first_batch = False
            with phase("text encoder"):
                text = self.text(batch.captions, self.captions, ids=batch.ids, step=step)
                text = text.to(self.device, non_blocking=True)
            more = {
                "words": text.words,
                "word_mask": text.word_mask,
                "caption_mask": text.caption_mask,
            }
        if self._features is not None:
            more["image_features"] = self._cached(self._features, images, batch.ids.tolist())
        return images, masks, more

    @torch.no_grad()
    def _cached(self, features: dict[int, Tensor], images: Tensor, ids: list[int]) -> Tensor:
        """The frozen encoder's tokens, computed once an image."""
        if any(number not in features for number in ids):
            # The whole batch, so that an image's features do not depend on which others were known.
            with phase("frozen image encoder"):
                features.update(zip(ids, self.model.encoder(images), strict=True))
        return torch.stack([features[number] for number in ids])


@contextmanager
def naming(key: str) -> Iterator[None]:
    """A bad value found by what is built from it, as a ConfigError that names the key."""
    try:
        yield
    except ConfigError:
        raise
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from error
