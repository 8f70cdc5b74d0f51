"""Shards, image folders and COCO captions on disk, whole and broken."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from jepa_fast.data import (
    CocoCaptions,
    CorruptSample,
    ImageFolder,
    Loader,
    ShardSource,
    Transform,
    load_in_memory,
)
from jepa_fast.errors import DataError


def picture(value: int, size: tuple[int, int] = (6, 4), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 2 * value, 100)).save(buffer, kind)
    return buffer.getvalue()


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))


def sample(number: int) -> dict[str, bytes]:
    about = {"label": number % 3, "captions": [f"number {number}", "a picture"]}
    return {f"s{number}.png": picture(number), f"s{number}.json": json.dumps(about).encode()}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard in range(3):
        members = [sample(number) for number in range(4 * shard, 4 * shard + 4)]
        write_shard(tmp_path / f"part-{shard}.tar", {k: v for m in members for k, v in m.items()})
    return tmp_path


def values(loader: Loader) -> list[int]:
    return [int(image[0, 0, 0]) for batch in loader for image in batch.images]


def test_samples_of_one_key_in_two_shards_have_two_ids(tmp_path: Path) -> None:
    for shard in range(2):
        write_shard(tmp_path / f"{shard}.tar", sample(0))
    (batch,) = Loader(ShardSource(str(tmp_path / "*.tar")), 2, train=False)
    assert batch.ids.unique().numel() == 2


def test_samples_of_shards_of_one_name_in_two_folders_have_two_ids(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("0.tar", "1.tar"):
            write_shard(tmp_path / folder / name, sample(0))

    def numbers(pattern: str) -> list[int]:
        (batch,) = Loader(ShardSource(f"{tmp_path}/{pattern}"), 4, train=False)
        return batch.ids.tolist()

    assert len(set(numbers("*/*.tar"))) == 4
    assert numbers("a/*.tar") == numbers("b/*.tar")  # wherever they lie


def test_shards(shards: Path) -> None:
    source = ShardSource(str(shards / "part-*.tar"))
    assert len(source) == 12
    assert source.shards == ShardSource(str(shards / "part-{0..2}.tar")).shards
    loader = Loader(source, 5, train=False)
    batches = list(loader)
    assert values(loader) == list(range(12))
    assert batches[0].images.shape == (5, 3, 4, 6)
    assert batches[0].labels.tolist() == [0, 1, 2, 0, 1]
    assert batches[0].captions[1] == ["number 1", "a picture"]
    assert len({i for batch in batches for i in batch.ids.tolist()}) == 12
    again = load_in_memory(source)
    assert torch.equal(again.ids[:5], batches[0].ids)
    (shards / "elsewhere").mkdir()
    (shards / "part-1.tar").rename(shards / "elsewhere" / "part-1.tar")
    moved = load_in_memory(ShardSource(str(shards / "elsewhere" / "*.tar")))
    assert torch.equal(moved.ids, again.ids[4:8])  # the folder does not matter
    (shards / "elsewhere" / "part-1.tar").rename(shards / "part-1.tar")

    training = Loader(source, 4, train=True, shuffle_buffer=5)
    first, second = values(training), values(training)
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    # Whole shards to each part, or every n-th sample where there are too few shards.
    for parts in (2, 5):
        seen = [
            record["__key__"]
            for part in range(parts)
            for record in source.records(part, parts, (1,))
        ]
        assert sorted(seen) == sorted(f"s{i}" for i in range(12))


def test_shards_of_text_and_class_files(tmp_path: Path) -> None:
    members = {"a.jpg": picture(9, kind="JPEG"), "a.txt": b"nine", "a.cls": b"4"}
    members |= {"b.png": picture(8), "b.json": b'{"caption": "eight"}'}
    members |= {"c.png": picture(7), "c.json": b'{"label": null, "caption": null}', "c.cls": b"2"}
    write_shard(tmp_path / "x.tar", members)
    batch = next(iter(Loader(ShardSource(str(tmp_path / "x.tar")), 3, train=False)))
    assert batch.labels.tolist() == [4, -1, 2]
    assert batch.captions == [["nine"], ["eight"], []]


def test_the_image_of_a_sample_is_the_one_of_the_plainest_name(tmp_path: Path) -> None:
    members = {"0.mask.png": picture(9), "0.png": picture(5), "0.cls": b"1", "._0.png": picture(7)}
    write_shard(tmp_path / "a.tar", {**members, "1.mask.png": picture(6), "1.cls": b"0"})
    source = ShardSource(str(tmp_path / "a.tar"))
    assert len(source) == 2  # samples, not images
    assert values(Loader(source, 2, train=False)) == [5, 6]


def test_broken_samples_in_shards_are_named(tmp_path: Path) -> None:
    good = sample(1)
    members = {
        **good,
        "cut.png": picture(5)[:30],
        "cut.json": b"{}",
        "lone.png": picture(5),
        "blind.json": b"{}",
        "odd.png": picture(5),
        "odd.json": b"{not json",
        "list.png": picture(5),
        "list.json": b"[1]",
        "text.png": b"not found",
        "text.json": b"{}",
    }
    write_shard(tmp_path / "x.tar", members)
    loader = Loader(ShardSource(str(tmp_path / "x.tar")), 2, train=False)
    assert values(loader) == [1]
    reasons = loader.skips.reasons
    names = ("cut", "lone", "blind", "odd", "list", "text")
    assert set(reasons) == {f"x.tar/{name}" for name in names}
    assert reasons["x.tar/text"] == "image cannot be decoded (no known format)"
    assert "image cannot be decoded" in reasons["x.tar/cut"]
    assert reasons["x.tar/lone"] == "no json, txt or cls beside the image"
    assert reasons["x.tar/blind"] == "no image"
    assert "JSONDecodeError" in reasons["x.tar/odd"]


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        (b'{"label": Infinity}', "label must be a whole number from -1 to 2147483647, got inf"),
        (b'{"label": NaN}', "label must be a whole number"),
        (b'{"label": 99999999999999999999}', "label must be a whole number"),
        (b'{"label": 2147483648}', "label must be a whole number"),
        (b'{"label": 3.7}', "label must be a whole number from -1 to 2147483647, got 3.7"),
        (b'{"label": true}', "label must be a whole number"),
        (b'{"label": -7}', "label must be a whole number"),
        (b'{"label": [1]}', "label must be a whole number"),
        (b'{"captions": [null]}', "captions must be a text or a list of texts"),
        (b'{"captions": [["a"]]}', "captions must be a text or a list of texts"),
        (b'{"caption": {"a": 1}}', "captions must be a text or a list of texts"),
        (b'{"caption": "\\ud800"}', "UnicodeEncodeError"),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_a_description_that_means_nothing_is_a_corrupt_sample(
    tmp_path: Path, about: bytes, reason: str
) -> None:
    write_shard(tmp_path / "x.tar", {**sample(1), "odd.png": picture(5), "odd.json": about})
    source = load_in_memory(ShardSource(str(tmp_path / "x.tar")))
    assert len(source) == 1
    assert list(source.skipped) == ["x.tar/odd"]
    assert reason in source.skipped["x.tar/odd"]


def test_whole_numbers_are_labels_however_they_are_written(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for name, label in (("a", b"3.0"), ("b", b'"4"'), ("c", b"-1"), ("d", b"2147483647")):
        members |= {f"{name}.png": picture(1), f"{name}.json": b'{"label": %s}' % label}
    write_shard(tmp_path / "x.tar", members)
    source = load_in_memory(ShardSource(str(tmp_path / "x.tar")))
    assert source.labels.tolist() == [3, 4, -1, 2**31 - 1]


def test_skips_of_one_key_in_two_shards_are_two(tmp_path: Path) -> None:
    for shard in range(2):
        write_shard(tmp_path / f"{shard}.tar", {**sample(shard), "s9.json": b"{}"})
    source = load_in_memory(ShardSource(str(tmp_path / "*.tar")))
    assert set(source.skipped) == {"0.tar/s9", "1.tar/s9"}


def test_a_file_name_that_is_no_utf8_is_a_key(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", {"\udcff.png": picture(5), "\udcff.json": b"{}"})
    source = load_in_memory(ShardSource(str(tmp_path / "x.tar")))
    assert len(source) == 1
    assert not source.skipped


@pytest.mark.parametrize("cut", ["header", "content", "between", "empty", "noise"])
def test_a_truncated_shard_gives_what_it_holds_and_is_reported(shards: Path, cut: str) -> None:
    path = shards / "part-1.tar"
    data = path.read_bytes()
    with tarfile.open(path) as shard:
        third = shard.getmembers()[4]
    ends = {
        "header": third.offset + 100,
        "content": third.offset_data + 20,
        "between": third.offset,
        "empty": 0,
    }
    path.write_bytes(b"\x7fnoise" * 300 if cut == "noise" else data[: ends[cut]])
    source = ShardSource(str(shards / "part-*.tar"))
    loader = Loader(source, 5, train=False)
    held = [] if cut in ("empty", "noise") else [4, 5]
    assert values(loader) == [0, 1, 2, 3, *held, 8, 9, 10, 11]
    assert loader.skipped == 1
    assert "shard cannot be read in full" in loader.skips.reasons[str(path)]
    assert not any(text in loader.skips.reasons[str(path)] for text in ("object at", path.name))
    training = Loader(ShardSource(str(shards / "part-*.tar"), length=12), 5, train=True)
    assert len(values(training)) == 10
    assert training.skipped == 1


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("damage", ["noise", "zeros"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_damaged_header_costs_its_own_sample_and_is_reported(
    tmp_path: Path, kind: int, damage: str, number: int
) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=kind) as shard:
        for i in range(3):
            for name, data in sample(i).items():
                # A fraction of a second takes an extended header before the file's own.
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(data), 0.5 if kind == tarfile.PAX_FORMAT else 0
                shard.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as shard:
        at = shard.getmembers()[2 * number].offset_data - 512
    data = bytearray(path.read_bytes())
    data[at : at + 512] = b"\x9a" * 512 if damage == "noise" else bytes(512)
    path.write_bytes(data)
    source = load_in_memory(ShardSource(str(path)))
    assert source.images[:, 0, 0, 0].tolist() == [i for i in range(3) if i != number]
    assert set(source.skipped) == {str(path), f"x.tar/s{number}"}
    expected = f"shard cannot be read in full (ReadError: damaged header at byte {at})"
    assert source.skipped[str(path)] == expected


def test_zeros_in_place_of_whole_files_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_shard(path, {name: data for i in range(3) for name, data in sample(i).items()})
    with tarfile.open(path) as shard:
        begin, end = (shard.getmembers()[i].offset for i in (2, 4))
    data = bytearray(path.read_bytes())
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    source = load_in_memory(ShardSource(str(path)))
    assert source.images[:, 0, 0, 0].tolist() == [0, 2]
    assert f"damaged header at byte {begin}" in source.skipped[str(path)]


def test_a_compressed_shard_is_whole_and_a_cut_one_is_reported(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", {**sample(1), **sample(2)})
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
    loader = Loader(ShardSource(str(path)), 2, train=False)
    assert values(loader) == [1, 2]
    assert loader.skipped == 0
    whole = path.read_bytes()
    cut, flipped = whole[: len(whole) // 2], bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for broken in (cut, bytes(flipped)):
        path.write_bytes(broken)
        loader = Loader(ShardSource([str(path), str(tmp_path / "x.tar")]), 2, train=False)
        assert values(loader)[-2:] == [1, 2]
        assert "shard cannot be read in full" in loader.skips.reasons[str(path)]
        assert "object at" not in loader.skips.reasons[str(path)]


def test_an_empty_shard_has_no_readable_sample(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", {})
    with pytest.raises(DataError, match=r"no readable sample in .*x\.tar.*: it is empty"):
        load_in_memory(ShardSource(str(tmp_path / "x.tar")))


def test_no_shards_and_remote_shards(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="urls must match at least one shard"):
        ShardSource(str(tmp_path / "none-*.tar"))
    with pytest.raises(ValueError, match="length must say how many samples remote shards hold"):
        ShardSource("pipe:cat x.tar")
    with pytest.raises(FileNotFoundError, match="urls must match at least one shard"):
        ShardSource([])


def test_each_shard_of_a_range_must_be_there(tmp_path: Path) -> None:
    for name in "ac":
        write_shard(tmp_path / f"k{name}.tar", sample(0))
    with pytest.raises(FileNotFoundError, match=r"kb\.tar, \S*kd\.tar match none"):
        ShardSource(str(tmp_path / "k{a,b,c,d}.tar"))
    assert len(ShardSource(str(tmp_path / "k{a,c}.tar"))) == 2
    with pytest.raises(FileNotFoundError, match=r"n19\.tar and 5 more match none"):
        ShardSource(str(tmp_path / "n{0..24}.tar"))


def test_brackets_and_braces_in_the_name_of_a_shard(tmp_path: Path) -> None:
    for number, folder in enumerate(("br[1]", "{x,y}")):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "a.tar", sample(number))
        assert len(ShardSource(str(tmp_path / folder / "a.tar"))) == 1
    write_shard(tmp_path / "br[1]" / "b.tar", sample(1))
    assert len(ShardSource(str(tmp_path / "br[1]" / "{a,b}.tar"))) == 2


def test_paths_of_shards(shards: Path) -> None:
    assert len(ShardSource(shards / "part-0.tar")) == len(ShardSource(str(shards / "part-0.tar")))
    assert len(ShardSource(shards / "part-*.tar")) == len(ShardSource(sorted(shards.glob("*.tar"))))


def test_shards_through_a_pipe(shards: Path) -> None:
    source = ShardSource(f"pipe:cat {shards / 'part-0.tar'}", length=4)
    assert values(Loader(source, 2, train=False)) == [0, 1, 2, 3]


def test_shared_cifar(shared_dir: Path) -> None:
    shards = str(shared_dir / "data/cifar10/val-*.tar")
    source = ShardSource(shards)
    batch = next(iter(Loader(source, 8, train=False, transform=Transform(32))))
    assert len(source) == 2000
    assert batch.images.shape == (8, 3, 32, 32)
    assert all(len(captions) > 1 for captions in batch.captions)


def test_image_folder(tmp_path: Path) -> None:
    for name, value in (("cat/1.png", 1), ("cat/x/2.png", 2), ("big_dog/3.jpg", 3), ("4.png", 4)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(value))
    (tmp_path / "cat/5.png").write_bytes(picture(5)[:40])
    (tmp_path / "cat/notes.txt").write_text("no image")
    source = ImageFolder(tmp_path, captions="a photo of a {}")
    assert source.classes == ["big_dog", "cat"]
    loader = Loader(source, 9, train=False)
    (batch,) = loader
    assert sorted(zip(values(loader), batch.labels.tolist(), strict=True)) == [
        (1, 1),
        (2, 1),
        (3, 0),
        (4, -1),
    ]
    assert ["a photo of a big dog"] in batch.captions
    assert list(loader.skips.reasons) == ["cat/5.png"]
    both = ["ant", "big_dog", "cat"]
    (batch,) = Loader(ImageFolder(tmp_path, classes=both), 9, train=False)
    assert sorted(batch.labels.tolist()) == [-1, 1, 2, 2]
    with pytest.raises(ValueError, match=r"must be among the 1 classes, got big_dog"):
        ImageFolder(tmp_path, classes=["cat"])
    with pytest.raises(FileNotFoundError, match="root must be a folder"):
        ImageFolder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="root must hold images"):
        ImageFolder(tmp_path / "empty")


def test_image_folders_leave_out_what_is_hidden_or_no_file(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/2.png", ".cache/3.png", "cat/.thumbs/4.png", "dog/._5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    (tmp_path / "dog" / "folder.jpg").mkdir()
    (tmp_path / "dog" / "lost.png").symlink_to(tmp_path / "nowhere")
    source = ImageFolder(tmp_path)
    assert source.classes == ["cat", "dog"]
    assert list(map(str, source.paths)) == ["cat/1.png", "dog/2.png", "dog/lost.png"]
    assert list(load_in_memory(source).skipped) == ["dog/lost.png"]  # a file that should be there


def test_links_to_the_folders_of_classes_are_followed(tmp_path: Path) -> None:
    for name in ("all/cat/1.png", "all/dog/x/2.png", "some/ant/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    for name in ("cat", "dog"):
        (tmp_path / "some" / name).symlink_to(f"../all/{name}")
    (tmp_path / "all" / "dog" / "back").symlink_to("../../some")  # round and round
    (tmp_path / "some" / "self").symlink_to("self")
    source = ImageFolder(tmp_path / "some")
    assert source.classes == ["ant", "cat", "dog"]
    direct = ["ant/3.png", "cat/1.png", "dog/x/2.png"]
    assert set(direct) <= set(map(str, source.paths))
    (tmp_path / "all" / "dog" / "back").unlink()
    assert list(map(str, ImageFolder(tmp_path / "some").paths)) == direct


@pytest.mark.parametrize("captions", ["a {name}", "{", "{0} {1}", "{:d}", "{0.x}", "{0[x]}"])
def test_captions_of_a_folder_take_the_class_name_alone(tmp_path: Path, captions: str) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(picture(1))
    with pytest.raises(ValueError, match=r"captions must be a text with \{\} for the class name"):
        ImageFolder(tmp_path, captions=captions)
    assert ImageFolder(tmp_path, captions="a {} {{sic}}")[0]["captions"] == ["a cat {sic}"]


def test_sixteen_bits_are_brought_to_eight(tmp_path: Path) -> None:
    values = torch.arange(0, 65536, 257, dtype=torch.int32).reshape(16, 16)
    grey = Image.fromarray(values.numpy().astype("uint16"))
    grey.save(tmp_path / "grey.png")
    image = ImageFolder(tmp_path)[0]["image"]
    assert torch.equal(
        image, torch.arange(256, dtype=torch.uint8).reshape(16, 16).expand(3, 16, 16)
    )


def test_a_bad_entry_of_a_coco_file_costs_itself_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(picture(1))
    files = ("a.png", "b.png", 5, None, "a\0b.png")
    images: list[object] = [{"id": i, "file_name": name} for i, name in enumerate(files)]
    images += [{"id": 5}, {"id": 10**20, "file_name": "a.png"}, {"file_name": "a.png"}, 7]
    captions = ("first", None, 4, ["listed"])
    told: list[object] = [{"image_id": 0, "caption": caption} for caption in captions]
    told += [{"image_id": 99, "caption": "lost"}, {"image_id": 1}, {"caption": "whose"}, None]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": told}))
    source = CocoCaptions(path, tmp_path)
    skipped = {f"captions.json images[{i}]" for i in (2, 3, 5, 6, 7, 8)}
    skipped |= {f"captions.json annotations[{i}]" for i in range(1, 8)}
    assert set(source.skipped) == skipped
    reason = source.skipped["captions.json annotations[4]"]
    assert reason == "unusable (ValueError: image_id is of none of the images)"
    assert "skipped captions.json images[2]: unusable (ValueError: file_name" in caplog.text
    assert "13 samples skipped" in caplog.text

    loader = Loader(source, 3, train=False)
    assert loader.skipped == 13
    (batch,) = loader
    assert batch.captions == [["first"], []]
    assert "embedded null" in loader.skips.reasons["a\0b.png"]
    assert set(load_in_memory(source).skipped) == {*skipped, "a\0b.png"}


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        "[" * 100_000,
        '{"images": null, "annotations": []}',
        '{"images": [], "annotations": []}',
        '{"images": [{"id": 1, "file_name": 2}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"bbox": [1, 2]}]}',
    ],
)
def test_a_file_of_another_kind_is_no_coco_captions(tmp_path: Path, content: str) -> None:
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(ValueError, match="annotations must be COCO captions") as refused:
        CocoCaptions(tmp_path / "captions.json", tmp_path)
    assert "no sample skipped" not in str(refused.value)


def test_coco_captions(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name, value in (("a.png", 1), ("b.png", 2)):
        (tmp_path / "images" / name).write_bytes(picture(value))
    content = {
        "images": [{"id": 7 + i, "file_name": f"{name}.png"} for i, name in enumerate("abc")],
        "annotations": [
            {"image_id": 7, "caption": "one "},
            {"image_id": 7, "caption": "uno"},
            {"image_id": 9, "caption": "lost"},
        ],
    }
    annotations = tmp_path / "captions.json"
    annotations.write_text(json.dumps(content))
    source = CocoCaptions(annotations, tmp_path / "images")
    assert len(source) == 3
    loader = Loader(source, 3, train=False)
    (batch,) = loader
    assert batch.ids.tolist() == [7, 8]
    assert batch.captions == [["one", "uno"], []]
    reason = "image cannot be read (FileNotFoundError: No such file or directory)"
    assert loader.skips.reasons["c.png"] == reason
    with pytest.raises(CorruptSample, match="image cannot be read"):
        source[2]
    annotations.write_text('{"images": [{"id": 1}]}')
    with pytest.raises(ValueError, match="annotations must be COCO captions"):
        CocoCaptions(annotations, tmp_path / "images")
    with pytest.raises(FileNotFoundError, match="annotations must be a JSON file"):
        CocoCaptions(tmp_path / "none.json", tmp_path / "images")
