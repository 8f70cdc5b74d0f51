"""Scenes of handwritten digits: rules, captions, labels, splits, determinism."""

from __future__ import annotations

import re

import pytest
import torch

from jepa_fast.data import DigitScenes
from jepa_fast.data.digits import _digits

NUMBER = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def grids(source: DigitScenes, n: int = 40) -> torch.Tensor:
    """Digit of every cell, [n, rows, cols], read off the patch labels."""
    rows, cols = source.grid
    labels = source.batch(torch.arange(n)).patch_labels
    assert labels is not None
    times = source.cell // (source.patch or 1)
    return labels.view(n, rows, times, cols, times)[:, :, 0, :, 0]


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    source = DigitScenes(100, rule="theme", shift=1, noise=0.1, empty=0.2)
    index = torch.tensor([7, 3, 99])
    batch, again = (
        source.batch(index),
        DigitScenes(5000, rule="theme", shift=1, noise=0.1, empty=0.2),
    )
    one = again.batch(index[1:2])
    assert batch.images.shape == (3, 3, 32, 32)
    assert batch.images.dtype == torch.uint8
    assert torch.equal(batch.images[1], one.images[0])
    assert batch.captions[1] == one.captions[0]
    assert batch.labels[1] == one.labels[0]
    assert torch.equal(batch.ids, index)
    for other in (
        DigitScenes(100, rule="theme", seed=1),
        DigitScenes(100, rule="theme", split="val"),
    ):
        assert not torch.equal(other.batch(index).images, batch.images)


def test_no_handwritten_digit_is_in_both_splits() -> None:
    banks = [_digits(split, 8, 0, 0) for split in ("train", "val")]
    seen = [{picture.tobytes() for picture in bank[:-1]} for bank, _ in banks]
    assert not seen[0] & seen[1]
    assert sum(len(bank) - 1 for bank, _ in banks) == 1797
    for bank, (starts, counts) in banks:
        assert counts.min() > 20
        assert starts[-1] + counts[-1] == len(bank) - 1
        assert not bank[-1].any()


def test_rules() -> None:
    independent = grids(DigitScenes(100, rule="independent"))
    assert independent.unique().tolist() == list(range(10))

    source = DigitScenes(100, rule="progression", steps=(2, -1), label="first_step", grid=(2, 3))
    digits = grids(source).flatten(1)
    labels = source.batch(torch.arange(40)).labels
    step = torch.tensor(source.steps)[labels % 2]
    expected = (labels[:, None] // 2 + step[:, None] * torch.arange(6)) % 10
    assert torch.equal(digits, expected)
    assert set((labels % 2).tolist()) == {0, 1}

    rows = grids(DigitScenes(100, rule="rows"))
    assert torch.equal(rows, rows[:, :, :1].expand_as(rows))

    source = DigitScenes(100, rule="theme", classes=3)
    theme = grids(source).flatten(1)
    assert all(len(line.unique()) == 3 for line in theme)
    assert torch.equal(theme.mode(1).values, source.batch(torch.arange(40)).labels)
    assert ((theme == theme.mode(1).values[:, None]).sum(1) > 8).all()


@pytest.mark.parametrize("rule", ["independent", "progression", "rows", "theme"])
def test_captions_say_what_is_there(rule: str) -> None:
    source = DigitScenes(
        50, rule=rule, grid=(3, 4), empty=0.2, captions=("corner", "row", "column", "cell")
    )
    batch = source.batch(torch.arange(30))
    checked = 0
    for grid, captions in zip(grids(source, 30).tolist(), batch.captions, strict=True):
        for text in captions:
            said = [NUMBER.index(word) for word in re.findall(r"an? (\w+)", text)]
            place = re.search(r"(row|column) (\w+)(?: column (\w+))?", text)
            if corner := re.search(r"(top|bottom) (left|right) corner", text):
                held = [grid[-(corner[1] == "bottom")][-(corner[2] == "right")]]
            elif place and place[3]:
                held = [grid[NUMBER.index(place[2]) - 1][NUMBER.index(place[3]) - 1]]
            else:
                assert place is not None
                number = NUMBER.index(place[2]) - 1
                held = grid[number] if place[1] == "row" else [line[number] for line in grid]
            assert said == [digit for digit in held if digit >= 0], (text, grid)
            assert not said or text.count("an eight") == said.count(8)
            checked += 1
    assert checked > 300


def test_rule_captions() -> None:
    source = DigitScenes(9, rule="progression", steps=(3,), captions=("rule",))
    batch = source.batch(torch.arange(3))
    for label, captions in zip(batch.labels.tolist(), batch.captions, strict=True):
        assert captions == [f"digits that count up by three from {NUMBER[label]}"]
    (caption,) = DigitScenes(9, rule="theme", captions=("rule",)).batch(torch.arange(1)).captions[0]
    assert re.fullmatch(r"a scene of \w+s and \w+s", caption)


def test_a_share_of_the_scenes_has_no_captions() -> None:
    told = DigitScenes(1000).batch(torch.arange(1000))
    some = DigitScenes(1000, uncaptioned=0.3).batch(torch.arange(1000))
    silent = [not captions for captions in some.captions]
    assert 250 < sum(silent) < 350
    for mute, captions, all_captions in zip(silent, some.captions, told.captions, strict=True):
        assert mute or captions == all_captions
    assert torch.equal(some.images, told.images)


def test_patches_carry_the_digit_of_their_cell_and_blank_cells_none() -> None:
    source = DigitScenes(50, empty=0.4, background=(0, 0), contrast=(1, 1), shift=2, cell=12)
    batch = source.batch(torch.arange(20))
    assert batch.images.shape == (20, 3, 48, 48)
    assert batch.patch_labels is not None
    assert batch.patch_labels.shape == (20, 144)
    ink = batch.images[:, 0].view(20, 4, 12, 4, 12).amax((2, 4))
    digits = grids(source, 20)
    assert torch.equal(ink > 0, digits >= 0)
    framed = DigitScenes(5, cell=12, margin=2, background=(0, 0)).batch(torch.arange(2)).images
    cells = framed[:, 0].view(2, 4, 12, 4, 12).amax((0, 1, 3)) > 0
    assert not cells[[0, 1, 10, 11]].any()
    assert not cells[:, [0, 1, 10, 11]].any()
    assert DigitScenes(5, patch=None).batch(torch.arange(2)).patch_labels is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "spiral"}, r"rule must be one of .*'spiral'"),
        ({"split": "test"}, r"split must be one of"),
        ({"captions": ("row", "poem")}, r"captions must be one of .*'poem'"),
        ({"label": "step", "rule": "rows"}, r"needs rule=\"progression\""),
        ({"patch": 3}, r"patch must divide cell=8"),
        ({"empty": 1.0}, r"empty must be in \[0, 1\)"),
        ({"uncaptioned": 1.5}, r"uncaptioned must be in \[0, 1\]"),
        ({"classes": 11}, r"classes must be in 1..10"),
        ({"cell": 8, "margin": 4}, r"cell must leave a digit of at least 2 pixels"),
        ({"grid": (0, 2)}, r"length and grid must be at least 1"),
    ],
)
def test_errors_name_the_argument(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitScenes(10, **arguments)
