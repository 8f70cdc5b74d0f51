from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from jepa_fast.train.config import ConfigError, load_config, parse_config, recipe_names

VALUES: dict[str, Any] = {
    "output": "runs/x",
    "model": {"method": "ijepa"},
    "data": {"kind": "digits"},
}


def message(*overrides: str, **sections: Any) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config({**VALUES, **sections}, overrides, source="here")
    source, _, problems = str(error.value).partition("\n")
    assert source == "here:"
    return problems


def test_the_defaults_are_ijepas() -> None:
    train = parse_config(VALUES).train
    assert (train.lr.start, train.lr.peak, train.lr.final) == (2e-4, 1e-3, 1e-6)
    assert train.lr.warmup_epochs is None  # a tenth of any run
    assert [train.weight_decay.at(step, 100) for step in (0, 100)] == pytest.approx([0.04, 0.4])
    assert [train.momentum.at(step, 100) for step in (0, 50)] == pytest.approx([0.996, 0.998])
    assert (train.batch_size, train.betas, train.clip_grad) == (2048, (0.9, 0.999), None)


def test_sections_of_signatures_have_their_defaults() -> None:
    config = parse_config({**VALUES, "model": {"method": "tcjepa"}})
    assert config.model.loss == "l2_norm"
    assert config.model.consistency_weight == 0.5
    assert config.masks.target_scale == (0.15, 0.2)
    assert config.data.grid == (4, 4)


def test_overrides_are_typed_by_yaml_and_reach_every_depth() -> None:
    config = parse_config(
        VALUES,
        [
            "train.lr.peak=1e-2",
            "model.predictor_depth=3",
            "data.captions=[rule]",
            "train.weight_decay=0.05",
            "train.momentum.shape=cosine",
            "data.augment.crop_scale=[0.3, 1]",
            "data.train_length=1e6",
            "output=runs/a=b",
        ],
    )
    assert config.train.lr.peak == 0.01
    assert config.model.predictor_depth == 3
    assert list(config.data.captions) == ["rule"]
    assert config.train.weight_decay.at(7, 10) == 0.05
    assert config.data.augment.crop_scale == (0.3, 1.0)
    assert config.data.train_length == 1_000_000  # whole, though YAML has it as a float
    assert config.output == "runs/a=b"


def test_overriding_does_not_change_what_was_passed_in() -> None:
    parse_config(VALUES, ["model.predictor_depth=3"])
    assert VALUES["model"] == {"method": "ijepa"}


@pytest.mark.parametrize("name", ["demo", "cifar10_tijepa", "cifar10_prob_flow"])
def test_a_configuration_survives_being_written(name: str) -> None:
    config = load_config(name)
    written = yaml.safe_dump(config.as_dict())
    assert parse_config(yaml.safe_load(written)).as_dict() == config.as_dict()


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.lr.peek=1", "train.lr.peek: unknown key; nearest: train.lr.peak"),
        ("lr=1", "lr: unknown key; nearest: train.lr"),
        ("batch_size=8", "batch_size: unknown key; nearest: train.batch_size"),
        ("model.predictor_dm=8", "model.predictor_dm: unknown key; nearest: model.predictor_dim"),
        ("masks.min_contxt=8", "masks.min_contxt: unknown key; nearest: masks.min_context"),
        ("model.patch_size=8", "model.patch_size: unknown key, it is part of the encoder's name"),
        ("model.method=ijeppa", "got 'ijeppa'; nearest: ijepa"),
        ("data.kind=imagenet", "data.kind: expected one of ['shards', 'folder', 'coco', 'digits']"),
        ("data.kind=webdataset", "got 'webdataset'; nearest: shards"),
        ("data.kind=coco", "data.train_images: missing, the folder of the images; data.train is"),
        ("train.lr=1e-3", "train.lr: expected keys with values, such as train.lr.peak=0.001, got"),
        ("train.precision=bf16", "'float32', 'bfloat16' or 'auto', got 'bf16' (str); nearest"),
        ("train.batch_size=many", "train.batch_size: expected a valid integer"),
        ("train.batch_size=many", "got 'many' (str)"),
        ("train.batch_size=0", "train.batch_size: expected greater than 0, got 0 (int)"),
        ("train.weight_decay=fast", "train.weight_decay.start: expected a valid number"),
        ("train=3", "train: expected keys with values, got 3"),
        ("train.epochs=true", "train.epochs: expected a valid integer, got True (bool)"),
        ("seed=true", "seed: expected a valid integer, got True (bool)"),
        ('train.batch_size="8"', "train.batch_size: expected a valid integer, got '8' (str)"),
        ("train.lr.peak=true", "train.lr.peak: expected a valid number, got True (bool)"),
        ("train.momentum=true", "train.momentum.start: expected a valid number, got True (bool)"),
        ("train.betas=[0.9, true]", "train.betas.1: expected a valid number, got True (bool)"),
        ("model.predictor_depth='3'", "model.predictor_depth: expected a valid integer, got '3'"),
        ("data.background=[true, 1]", "data.background.0: expected a valid number, got True"),
        ("data.steps=[1, true]", "data.steps.1: expected a valid integer, got True (bool)"),
        ("seed=9223372036854775808", "seed: expected less than 9223372036854776000, got 9"),
        ("device=cpu:foo", "device: expected auto, cpu, cuda or cuda:<number>, got 'cpu:foo'"),
        ("train.lr.peak=.inf", "train.lr.peak: expected a finite number"),
        ("zzz=1", "zzz: unknown key; known: data, device, eval, masks, model, output"),
    ],
)
def test_a_bad_override_is_named(override: str, problem: str) -> None:
    assert problem in message(override)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = parse_config(
        {
            "output": "~/run",
            "model": {"method": "tijepa", "encoder_weights": "~/ijepa"},
            "data": {"kind": "shards", "train": "~/a-{0..3}.tar", "val": "b~.tar"},
        }
    )
    assert (config.output, config.model.encoder_weights) == ("/home/me/run", "/home/me/ijepa")
    assert (config.data.train, config.data.val) == ("/home/me/a-{0..3}.tar", "b~.tar")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("extends: demo\nseed: 7\n")
    (tmp_path / "mine.yaml").write_text("extends: ~/base.yaml\n")
    assert load_config("~/mine.yaml").seed == 7


def test_every_problem_is_listed() -> None:
    problems = message("train.lr.peek=1", "seed=x", "train.epochs=-1")
    named = {line.strip().partition(":")[0] for line in problems.splitlines()}
    assert named == {"train.lr.peek", "seed", "train.epochs"}


def test_captions_beyond_what_max_takes_are_refused() -> None:
    model = {"method": "tcjepa", "encoder": "vit_tiny_patch4", "img_size": 32}
    problem = "text.captions: expected at most 256 with model.pool=max, got 257"
    assert problem in message("text.captions=257", model=model)
    for more in ("pool=mean", "per_caption=true", "conditioning=mean_words"):
        parse_config({**VALUES, "model": model}, ["text.captions=257", f"model.{more}"])
    parse_config({**VALUES, "model": model}, ["text.captions=256"])


def test_an_override_must_be_a_key_and_a_value() -> None:
    with pytest.raises(ConfigError, match=r"override: expected key=value, got '--resum'"):
        parse_config(VALUES, ["--resum"])
    with pytest.raises(ConfigError, match=r"seed: '\[' is not valid YAML"):
        parse_config(VALUES, ["seed=["])
    with pytest.raises(ConfigError, match=r"seed\.x: 'seed' is the value 3, it has no keys"):
        parse_config({**VALUES, "seed": 3}, ["seed.x=1"])


def test_options_of_a_head_are_checked_by_its_signature() -> None:
    flow = {"method": "probijepa", "head": "flow"}
    assert "model.head_options.hidden: unknown key; nearest: model.head_options.hidden_dim" in (
        message("model.head_options={hidden: 8}", model=flow)
    )
    # As where a recipe's head is replaced, and its options are not.
    other = message("model.head=mixture", model={**flow, "head_options": {"hidden_dim": 8}})
    assert "another head: model.head_options=null takes what this one has by default" in other
    assert "another head" not in message("model.head_options={hidden: 8}", model=flow)
    assert "model.head_options.hidden_dim: expected a valid integer" in (
        message("model.head_options={hidden_dim: wide}", model=flow)
    )
    parse_config({**VALUES, "model": {**flow, "head_options": {"hidden_dim": 8}}})
    # These options reach the head as YAML gives them.
    mixture = {"method": "probijepa", "head": "mixture"}
    config = parse_config({**VALUES, "model": mixture}, ["model.head_options.scale_floor=1e-2"])
    assert config.model.head_options == {"scale_floor": 0.01}
    # A key of what is null, as it is in a run's own configuration.
    again = parse_config(
        {**VALUES, "model": {**mixture, "head_options": None}}, ["model.head_options.event=joint"]
    )
    assert again.model.head_options == {"event": "joint"}


def test_cached_features_and_augmentation_exclude_each_other() -> None:
    model = {"method": "tijepa", "cache_features": True}
    parse_config({**VALUES, "model": model})
    assert "model.cache_features: expected false" in message("data.augment.flip=.5", model=model)


def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid YAML: 'utf-8' codec"):
        load_config(str(tmp_path / "x.yaml"))


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: demo\ntrain: {epochs: 2}\nseed: 1\ntrain:\n  batch_size: 8\n")
    with pytest.raises(
        ConfigError, match=r"mine\.yaml: not valid YAML: 'train' is there already, in"
    ):
        load_config(str(path))
    with pytest.raises(ConfigError, match="is not valid YAML: 'peak' is there already"):
        parse_config(VALUES, ["train.lr={peak: 1, peak: 2}"])
    path.write_text("extends: demo\ntrain: {<<: &twice {epochs: 2}, batch_size: 8}\n")
    assert load_config(str(path)).train.epochs == 2


def test_what_is_missing_is_named() -> None:
    assert "model: missing 'method'" in message(model={"predictor_dim": 8})
    assert "data.train: missing" in message(data={"kind": "shards"})


def test_recipes_come_by_name_and_by_path(tmp_path: Path) -> None:
    assert "demo" in recipe_names()
    with pytest.raises(ConfigError, match=r"got 'cifar_ijepa'; nearest: cifar10_ijepa"):
        load_config("cifar_ijepa")
    with pytest.raises(ConfigError, match=r"no file .*nowhere\.yaml"):
        load_config(str(tmp_path / "nowhere.yaml"))
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: cifar10_ijepa\ntrain: {epochs: 2}\n")
    config = load_config(str(mine), ["seed=4"])
    assert (config.train.epochs, config.train.batch_size, config.seed) == (2, 128, 4)
    assert config.output == "runs/mine"
    mine.write_text(f"extends: {mine}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: extends itself"):
        load_config(str(mine))
    mine.write_text(f"extends: ../{tmp_path.name}/mine.yaml\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: extends itself"):
        load_config(str(mine))
    mine.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected keys with values"):
        load_config(str(mine))
    mine.write_text("a: [\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: not valid YAML"):
        load_config(str(mine))
    mine.write_text("model: !!python/object/apply:os.system [exit]\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(str(mine))


def test_a_path_that_is_extended_starts_at_the_folder_of_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "base.yaml").write_text("extends: demo\nseed: 3\n")
    (tmp_path / "runs" / "mine.yaml").write_text("extends: ../base.yaml\ntrain: {steps: 7}\n")
    monkeypatch.chdir(tmp_path)
    config = load_config("runs/mine.yaml")
    assert (config.seed, config.train.steps, config.output) == (3, 7, "runs/mine")
    (tmp_path / "runs" / "mine.yaml").write_text("extends: base.yaml\n")
    with pytest.raises(ConfigError, match=r"no file .*runs/base\.yaml"):
        load_config("runs/mine.yaml")


def test_another_method_or_kind_leaves_behind_what_only_the_first_one_has(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "extends: demo\n"
        "model: {method: ijepa, encoder: vit_small_patch8}\n"
        "data: {kind: folder, train: images}\n"
    )
    config = load_config(str(mine))
    demo = load_config("demo")
    assert (config.model.method, config.model.predictor_dim) == ("ijepa", 64)
    assert not hasattr(config.model, "similarity")
    assert (config.data.train, config.data.val, config.data.captions) == ("images", None, None)
    assert config.data.augment == demo.data.augment
    # So with overrides, in any order, and for a path that both have.
    other = ["data.train=x.json", "data.kind=coco", "data.train_images=y", "model.method=tijepa"]
    config = load_config(str(mine), other)
    assert (config.data.train, config.data.train_images) == ("x.json", "y")
    assert config.model.method == "tijepa"
    with pytest.raises(ConfigError, match=r"(?s)data\.train: missing"):
        load_config(str(mine), ["data.kind=shards"])
    # The same one again drops nothing, and a key of one's own is never dropped.
    assert load_config("demo", ["data.kind=digits", "model.method=tcjepa"]) == demo
    with pytest.raises(ConfigError, match=r"model\.similarity: unknown key"):
        load_config(str(mine), ["model.method=tijepa", "model.similarity=softplus"])


def test_epochs_asked_for_win_over_steps_that_were_not(tmp_path: Path) -> None:
    mine, child = tmp_path / "mine.yaml", tmp_path / "child.yaml"
    mine.write_text("extends: demo\ntrain: {steps: 7}\n")
    child.write_text(f"extends: {mine}\ntrain: {{epochs: 3}}\n")
    for config, expected in (
        (load_config(str(mine)), (1, 7)),
        (load_config(str(mine), ["train.epochs=2"]), (2, None)),
        (load_config(str(mine), ["train.epochs=2", "train.steps=5"]), (2, 5)),
        (load_config(str(child)), (3, None)),
        (load_config(str(child), ["train.steps=4"]), (3, 4)),
    ):
        assert (config.train.epochs, config.train.steps) == expected


def test_the_nearest_key_is_one_that_the_kind_has() -> None:
    told = message("data={kind: coco, train: x.json, train_images: x, captions: y}")
    assert "data.captions: unknown key, of kind folder alone: shards have" in told
    assert "data.contrst: unknown key; nearest: data.contrast" in message("data.contrst=1")
    told = message("data={kind: coco, train: x.json, train_images: x, contrst: y}")
    assert "data.contrst: unknown key" in told
    assert "data.contrast" not in told
    folder = {"kind": "folder", "train": "x"}
    assert "data.caption: unknown key; nearest: data.captions" in message(
        "data.caption=y", data=folder
    )
