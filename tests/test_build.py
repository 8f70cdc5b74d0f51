"""What is built from a configuration: sources, text, the frozen encoder, a model's inputs."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import tiny, trainer_of

from jepa_fast.data import HashedWords
from jepa_fast.errors import CheckpointError
from jepa_fast.train.build import (
    Prepare,
    build_loader,
    build_model,
    build_probe_loader,
    build_source,
    build_text,
    build_transform,
    check_data_paths,
)
from jepa_fast.train.checkpoint import load_checkpoint, load_weights
from jepa_fast.train.distributed import World
from jepa_fast.train.errors import ConfigError
from jepa_fast.train.evaluate import evaluate
from jepa_fast.train.run import pretrain

CPU = torch.device("cpu")
TIJEPA = ("model.method=tijepa", "model.width=16", "model.depth=1", "model.num_heads=2")


def picture(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 32), (grey, grey, grey)).save(buffer, "JPEG")
    return buffer.getvalue()


def make_shard(path: Path, captions: list[str] | None = None) -> None:
    with tarfile.open(path, "w") as shard:
        for i in range(4):
            some = [f"grey {i}"] if captions is None else captions
            told = json.dumps({"label": i % 2, "captions": some}).encode()
            for name, content in ((f"{i}.jpg", picture(i * 60)), (f"{i}.json", told)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def make_folder(path: Path) -> None:
    for i in range(4):
        (path / f"class_{i % 2}").mkdir(parents=True, exist_ok=True)
        (path / f"class_{i % 2}" / f"{i}.jpg").write_bytes(picture(i * 60))


def make_coco(path: Path) -> None:
    path.mkdir()
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)]
    for i in range(4):
        (path / f"{i}.jpg").write_bytes(picture(i * 60))
    annotations = [{"image_id": i, "caption": f"grey {i}"} for i in range(4)]
    (path / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("shards", "train: HERE/*.tar"),
        ("folder", "train: HERE/folder, captions: 'a photo of a {}'"),
        ("coco", "train: HERE/coco/captions.json, train_images: HERE/coco"),
    ],
)
def test_every_kind_of_data_gives_batches(
    tmp_path: Path, kind: str, data: str, in_memory: bool
) -> None:
    make_shard(tmp_path / "a.tar")
    make_folder(tmp_path / "folder")
    make_coco(tmp_path / "coco")
    memory = "in_memory: true, memory_size: 32" if in_memory else "in_memory: false"
    told = f"data={{kind: {kind}, {data}, {memory}}}".replace("HERE", str(tmp_path))
    config = tiny(tmp_path / "run", told, "train.batch_size=2")
    loader = build_loader(config, World(CPU))
    batches = list(loader)
    assert [batch.images.shape for batch in batches] == [(2, 3, 32, 32)] * 2
    trained_on = {i for batch in batches for i in batch.ids.tolist()}
    (probed,) = build_probe_loader(config, "probe", CPU)
    assert len(trained_on) == 4
    assert trained_on == set(probed.ids.tolist())
    assert all(len(some) == 1 for batch in batches for some in batch.captions)
    with pytest.raises(ConfigError, match=r"data\.val: expected a path, got none"):
        build_source(config, "val")


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        ("kind: shards, train: nowhere-*.tar", "data.train=... data.val=..."),
        ("kind: folder, train: nowhere", "data.train=... data.val=..."),
        (
            "kind: coco, train: nowhere.json, train_images: nowhere",
            "data.train=... data.train_images=... data.val=... data.val_images=...",
        ),
    ],
)
def test_missing_data_are_told_where_they_were_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, keys: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        build_source(tiny(tmp_path, f"data={{{data}}}"), "train")
    assert str(error.value).startswith("data.train: ")
    assert str(error.value).endswith(
        f"(a relative path starts at the working directory, {tmp_path}); {keys} name another place"
    )


@pytest.mark.parametrize(
    ("key", "data"),
    [
        ("val", "kind: shards, train: a.tar, val: nowhere-*.tar"),
        ("val", "kind: folder, train: folder, val: nowhere"),
        ("val", "kind: coco, train: c.json, train_images: folder, val: nowhere.json"),
        (
            "val_images",
            "kind: coco, train: c.json, train_images: folder, val: c.json, val_images: nowhere",
        ),
    ],
)
def test_missing_validation_data_are_told_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, data: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_shard(Path("a.tar"))
    make_folder(Path("folder"))
    Path("c.json").touch()
    with pytest.raises(ConfigError, match=rf"^data\.{key}: .*nowhere.*; data\.val=null trains"):
        pretrain(tiny(tmp_path / "run", f"data={{{data}}}"))
    assert not Path("run").exists()
    remote = tiny(tmp_path / "run", "data={kind: shards, train: a.tar, val: 'pipe:cat x.tar'}")
    check_data_paths(remote)
    check_data_paths(tiny(tmp_path / "run", "data={kind: folder, train: folder, val: folder}"))
    both = tiny(tmp_path / "run", "data={kind: folder, train: gone, val: nowhere}")
    with pytest.raises(ConfigError, match=r"^data\.train: .*gone.*data\.val=\.\.\. name another"):
        pretrain(both)


def test_a_folder_of_shards_is_told_how_to_name_them(tmp_path: Path) -> None:
    make_shard(tmp_path / "a.tar")
    with pytest.raises(ConfigError, match=rf"^data\.train: .*the folder .*, {tmp_path}/\*\.tar"):
        build_source(tiny(tmp_path, f"data={{kind: shards, train: {tmp_path}}}"), "train")
    good = tiny(tmp_path, f"data={{kind: shards, train: '{tmp_path}/*.tar'}}")
    assert len(build_source(good, "train")) > 0


def test_captions_without_a_place_for_the_class_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path / "x")
    data = f"kind: folder, train: {tmp_path / 'x'}"
    build_source(tiny(tmp_path, f"data={{{data}, captions: 'a photo of a {{}}'}}"), "train")
    assert not caplog.text
    build_source(tiny(tmp_path, f"data={{{data}, captions: 'a photo of a'}}"), "train")
    assert "captions: expected {} in the text, for the class name, got 'a photo of a'" in (
        caplog.text
    )


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    two = World(CPU, rank=0, size=2)
    with pytest.raises(
        ConfigError, match=r"^train\.batch_size: expected at most the 48 images of "
    ):
        build_loader(tiny(tmp_path, "train.batch_size=50"), two)
    assert build_loader(tiny(tmp_path, "train.batch_size=48"), two).batch_size == 24


def test_data_without_a_sample_say_why(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    (tmp_path / "noise.tar").write_bytes(b"noise" * 500)
    make_shard(tmp_path / "a.tar")
    for shard, reason in (
        ("empty.tar", "it is empty"),
        ("noise.tar", "damaged header at byte 0"),
    ):
        bad, good = tmp_path / shard, tmp_path / "a.tar"
        told = f"data={{kind: shards, train: {bad}, val: {good}}}"
        with pytest.raises(ConfigError, match=rf"^data\.train: no readable sample in .*{reason}"):
            build_loader(tiny(tmp_path / "run", told), World(CPU))
        told = f"data={{kind: shards, train: {good}, val: {bad}}}"
        with pytest.raises(ConfigError, match=rf"^data\.val: no readable sample in .*{reason}"):
            build_probe_loader(tiny(tmp_path / "run", told), "val", CPU)


def test_a_model_of_text_wants_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path / "folder")
    make_coco(tmp_path / "coco")
    untold = tmp_path / "coco" / "captions.json"
    untold.write_text(json.dumps({**json.loads(untold.read_text()), "annotations": []}))
    make_shard(tmp_path / "a.tar", captions=[])
    shards = f"kind: shards, train: {tmp_path / 'a.tar'}"
    for data in (
        f"kind: folder, train: {tmp_path / 'folder'}",
        f"kind: coco, train: {untold}, train_images: {tmp_path / 'coco'}",
        f"{shards}, in_memory: true",
        "kind: digits, uncaptioned: 1.0",
    ):
        told = (f"data={{{data}}}", "train.batch_size=2")
        build_loader(tiny(tmp_path / "run", *told), World(CPU))  # I-JEPA reads none
        for method in (("model.method=tcjepa",), TIJEPA):
            with pytest.raises(ConfigError, match=r"data\.train: expected images with captions"):
                build_loader(tiny(tmp_path / "run", *told, *method), World(CPU))

    # Shards that are not read yet may hold captions, so that only the first batch tells.
    config = tiny(
        tmp_path / "run", f"data={{{shards}}}", "model.method=tcjepa", "train.batch_size=2"
    )
    prepare = Prepare(config, build_model(config), build_text(config, CPU), CPU)
    for step, batch in enumerate(build_loader(config, World(CPU))):
        prepare(batch, step)
    assert caplog.text.count("no image of the first batch has a caption") == 1


def test_probes_see_plain_images_and_patch_labels(tmp_path: Path) -> None:
    config = tiny(tmp_path, "data.augment.flip=0.5", "data.augment.crop_scale=[0.5, 1]")
    assert build_transform(config, train=True).flip == 0.5
    plain = build_transform(config, train=False)
    assert (plain.flip, plain.crop_scale) == (0.0, None)
    assert [len(build_source(config, split)) for split in ("train", "val", "probe")] == [48, 24, 32]
    batch = next(iter(build_probe_loader(config, "val", CPU)))
    assert batch.patch_labels is not None
    assert batch.patch_labels.shape == (24, 64)
    # Augmented images could not keep them.
    assert next(iter(build_loader(config, World(CPU)))).patch_labels is None


def test_text_is_for_models_that_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert build_text(tiny(tmp_path), CPU) is None
    text = build_text(tiny(tmp_path, "model.method=tcjepa", "text.context=0.5"), CPU)
    assert isinstance(text, HashedWords)
    assert (text.dim, text.max_words, text.context) == (8, 8, 0.5)
    assert "hashed vectors" in caplog.text


def test_a_text_encoder_must_have_the_configured_width(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "bert"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(
        transformers.BertConfig(vocab_size=4, intermediate_size=8, **sizes)
    ).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "a", "three"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    overrides = ("model.method=tcjepa", f"text.encoder={folder}")
    with pytest.raises(ConfigError, match=r"text\.dim: expected 8, the width of .*bert, got 16"):
        build_text(tiny(tmp_path, *overrides, "text.dim=16"), CPU)
    config = tiny(tmp_path / "run", *overrides, "train.steps=1")
    text = build_text(config, CPU)
    assert text is not None
    assert text.split("a three there") == ["a", "three", "[UNK]"]
    assert pretrain(config) == []


def test_masks_and_words_depend_on_step_and_sample_alone(tmp_path: Path) -> None:
    config = tiny(tmp_path, "model.method=tcjepa")
    model = build_model(config)
    prepare = Prepare(config, model, build_text(config, CPU), CPU)
    batch = next(iter(build_loader(config, World(CPU))))
    _, masks, text = prepare(batch, 3)
    _, again, same = Prepare(config, model, build_text(config, CPU), CPU)(batch, 3)
    _, later, _ = prepare(batch, 4)
    assert torch.equal(masks.targets, again.targets)
    assert torch.equal(text["words"], same["words"])
    assert masks.targets.shape != later.targets.shape or not torch.equal(
        masks.targets, later.targets
    )
    assert text["words"].shape == (8, 2, 8, 8)
    assert text["word_mask"].shape == (8, 2, 8)


def test_tijepa_stands_on_the_teacher_of_a_run(tmp_path: Path) -> None:
    pretrain(tiny(tmp_path / "ijepa", "train.steps=2"))
    weights = f"model.encoder_weights={tmp_path / 'ijepa'}"
    model = build_model(tiny(tmp_path, *TIJEPA, weights))
    teacher = trainer_of(tiny(tmp_path / "other"))
    load_weights(teacher.model, load_checkpoint(tmp_path / "ijepa"))
    for name, value in teacher.model.target_encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value)
    assert not any(key.startswith("encoder.") for key in model.state_dict())

    folder = tmp_path / "tijepa"
    assert pretrain(tiny(folder, *TIJEPA, weights, "train.steps=2")) == []
    found = evaluate(folder)
    assert {probe.name for probe in found.probes} == {"knn", "linear", "patch"}
    assert "knn" in str(found)

    pretrain(tiny(tmp_path / "ijepa", "train.steps=3"), overwrite=True)
    with pytest.raises(CheckpointError, match="frozen encoder has other weights"):
        evaluate(folder)
    with pytest.raises(CheckpointError, match="frozen encoder has other weights"):
        pretrain(tiny(folder, *TIJEPA, weights, "train.steps=4"), resume="")


def test_tijepa_without_weights_warns_and_keeps_its_random_encoder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(tiny(tmp_path, *TIJEPA))
    assert "the frozen image encoder has RANDOM weights" in caplog.text
    assert any(key.startswith("encoder.") for key in model.state_dict())
    with pytest.raises(
        ConfigError, match=r"model\.encoder_weights: expected a checkpoint.*nowhere"
    ):
        build_model(tiny(tmp_path, *TIJEPA, "model.encoder_weights=nowhere"))


def test_cached_features_are_the_encoders(tmp_path: Path) -> None:
    overrides = (*TIJEPA, "model.cache_features=true", "data.augment.flip=0", "train.steps=9")
    cached = tiny(tmp_path / "cached", *overrides)
    trainer = trainer_of(cached)
    calls = []
    trainer.model.encoder.register_forward_hook(lambda *args: calls.append(1))
    trainer.fit()
    assert len(calls) == 6  # one epoch; the next three steps read the cache
    plain = trainer_of(tiny(tmp_path / "plain", *overrides, "model.cache_features=false"))
    plain.fit()
    for a, b in zip(trainer.parameters, plain.parameters, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
