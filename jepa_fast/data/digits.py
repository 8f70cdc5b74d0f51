"""Scenes of real handwritten digits on a grid, with captions and per-patch labels.

The digits are scikit-learn's (1,797 of 8 x 8 greys, from the UCI "Optical Recognition of
Handwritten Digits" test set; they come with the package, nothing is downloaded). A scene is a pure
function of (seed, split, index), and no handwritten digit is in both splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from jepa_fast.data import counter
from jepa_fast.data.batch import UNKNOWN, Batch
from jepa_fast.data.extras import require

Rule = Literal["independent", "progression", "rows", "theme"]
Label = Literal["first", "step", "first_step"]
CaptionKind = Literal["rule", "corner", "row", "column", "cell"]

_NUMBER = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PLURAL = tuple("sixes" if word == "six" else f"{word}s" for word in _NUMBER)
_A_DIGIT = tuple(f"an {word}" if word == "eight" else f"a {word}" for word in _NUMBER)
_CORNERS = ("top left corner", "top right corner", "bottom left corner", "bottom right corner")
_CORNER_FORMS = ("{} in the {}", "the {1} shows {0}", "there is {} in the {}")
_LINE_FORMS = ("{} holds {}", "{} has {}", "in {} there is {}")

# Keys that keep the draws of one scene apart.
_STEP, _START, _CELL, _CLASS, _IMAGE, _EMPTY, _SHIFT, _BACKGROUND = range(8)
_CONTRAST, _NOISE, _FORM, _SILENT = range(8, 12)


class DigitScenes:
    """`length` scenes of `rows x cols` handwritten digits.

    length: number of scenes; one more costs no memory, scenes are drawn when asked for.
    split: "train" or "val": disjoint sets of handwritten digits (and disjoint scenes).
    grid: (rows, cols) of digits.
    rule: how a scene's digits hang together.
        "independent": each digit uniform on its own: a hidden one cannot be guessed.
        "progression": in reading order the digits are start + i * step mod 10.
        "rows": every row repeats one digit.
        "theme": `classes` digits a scene, the first in more than half of the cells.
    steps: the steps that a progression draws from.
    classes: different digits a "theme" scene has.
    label: the scene's label: "first", the digit in the top left cell (under "theme" the most
        frequent one), "step", the index in `steps` ("progression" only), or "first_step",
        first * len(steps) + step.
    empty: share of cells left blank.
    uncaptioned: share of scenes without captions, as in real data: there only the picture tells.
    cell: pixels a side of a cell.
    margin: blank pixels around a digit in its cell; the digit gets the rest, and is resized
        bilinearly if that is not its 8 pixels.
    shift: each digit moves by up to so many pixels, and is cut at the edge of its cell.
    background, contrast: ranges, within [0, 1], of a scene's background and of what ink adds to it.
    noise: size of uniform pixel noise, in [0, 1].
    patch: pixels a side of a patch, a divisor of `cell`, for per-patch labels; None for none.
    captions: which kinds of caption, see `CaptionKind`.

    Raises ValueError naming the argument if a value is out of range.
    """

    def __init__(
        self,
        length: int,
        *,
        split: Literal["train", "val"] = "train",
        grid: tuple[int, int] = (4, 4),
        rule: Rule = "progression",
        steps: Sequence[int] = (1, 2, 3),
        classes: int = 2,
        label: Label = "first",
        empty: float = 0.0,
        uncaptioned: float = 0.0,
        cell: int = 8,
        margin: int = 0,
        shift: int = 0,
        background: tuple[float, float] = (0.0, 0.2),
        contrast: tuple[float, float] = (0.5, 0.8),
        noise: float = 0.0,
        patch: int | None = 4,
        captions: Sequence[CaptionKind] = ("rule", "corner", "row", "column"),
        seed: int = 0,
    ) -> None:
        _check_choice("split", split, ("train", "val"))
        _check_choice("rule", rule, get_args(Rule))
        _check_choice("label", label, get_args(Label))
        for kind in captions:
            _check_choice("captions", kind, get_args(CaptionKind))
        if label != "first" and rule != "progression":
            raise ValueError(f'label={label!r} needs rule="progression", got rule={rule!r}')
        if length < 1 or min(grid) < 1:
            raise ValueError(f"length and grid must be at least 1, got {length} and {grid}")
        if margin < 0 or shift < 0 or cell - 2 * margin < 2:
            raise ValueError(
                "cell must leave a digit of at least 2 pixels, margin and shift be at least 0, got "
                f"cell={cell}, margin={margin}, shift={shift}"
            )
        if not 1 <= classes <= 10 or not steps:
            raise ValueError(
                f"classes must be in 1..10 and steps non-empty, got {classes}, {steps}"
            )
        if not 0 <= empty < 1:
            raise ValueError(f"empty must be in [0, 1), got {empty}")
        for argument, share in (("uncaptioned", uncaptioned), ("noise", noise)):
            if not 0 <= share <= 1:
                raise ValueError(f"{argument} must be in [0, 1], got {share}")
        for argument, (low, high) in (("background", background), ("contrast", contrast)):
            if not 0 <= low <= high <= 1:
                raise ValueError(
                    f"{argument} must be a range (low, high) within [0, 1], got {low}, {high}"
                )
        if patch is not None and (patch < 1 or cell % patch):
            raise ValueError(
                f"patch must divide cell={cell}, so that it has one label, got {patch}"
            )
        self.length, self.split, self.grid, self.rule = length, split, grid, rule
        self.steps, self.classes, self.label, self.empty = tuple(steps), classes, label, empty
        self.uncaptioned = uncaptioned
        self.cell, self.shift, self.patch, self.seed = cell, shift, patch, seed
        self.background, self.contrast, self.noise = background, contrast, noise
        self.captions = tuple(captions)
        self.has_captions = bool(captions) and uncaptioned < 1
        # Position jitter slides a cell-sized window over the padded digit.
        self._ink, self._of_class = _digits(split, cell, margin, shift)
        self._key = (seed, int(split == "val"))

    def __len__(self) -> int:
        return self.length

    def batch(self, index: Tensor) -> Batch:
        """The scenes `index` [B] int64: images [B, 3, rows * cell, cols * cell] uint8."""
        scene = index.numpy()
        digits, steps = self._layout(scene)
        first = self._theme(scene)[:, 0] if self.rule == "theme" else self._first(scene)
        if self.label == "first":
            labels = first
        elif self.label == "step":
            labels = steps
        else:
            labels = first * len(self.steps) + steps
        return Batch(
            images=torch.from_numpy(self._draw(scene, digits)),
            labels=torch.from_numpy(labels),
            ids=index,
            captions=self._describe(scene, digits, steps),
            patch_labels=None if self.patch is None else self._patch_labels(digits),
        )

    def _first(self, scene: NDArray[np.int64]) -> NDArray[np.int64]:
        """The digit that the rule puts first, [B]."""
        return counter.integers(10, *self._key, _START, scene)

    def _theme(self, scene: NDArray[np.int64]) -> NDArray[np.int64]:
        """The digits that a "theme" scene has, [B, classes]."""
        draws = counter.bits(*self._key, _CLASS, scene[:, None], np.arange(10))
        return np.argsort(draws, axis=1)[:, : self.classes]

    def _layout(self, scene: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Digits [B, rows, cols] (-1 for a blank cell) and the index of the step [B]."""
        rows, cols = self.grid
        cells = np.arange(rows * cols)
        digits: Any
        steps = counter.integers(len(self.steps), *self._key, _STEP, scene)
        if self.rule == "independent":
            digits = counter.integers(10, *self._key, _CELL, scene[:, None], cells)
            digits[:, 0] = self._first(scene)
        elif self.rule == "progression":
            step = np.asarray(self.steps)[steps]
            digits = (self._first(scene)[:, None] + step[:, None] * cells) % 10
        elif self.rule == "rows":
            of_row = counter.integers(10, *self._key, _CELL, scene[:, None], np.arange(rows))
            of_row[:, 0] = self._first(scene)
            digits = np.repeat(of_row, cols, axis=1)
        else:
            # A shuffle of a fixed multiset, so that the first class always has the majority.
            rank = np.argsort(counter.bits(*self._key, _CELL, scene[:, None], cells), axis=1)
            others = 1 + rank % max(self.classes - 1, 1)
            member = np.where(rank <= len(cells) // 2, 0, np.minimum(others, self.classes - 1))
            digits = np.take_along_axis(self._theme(scene), member, axis=1)
        if self.empty > 0:
            blank = counter.uniform(*self._key, _EMPTY, scene[:, None], cells) < self.empty
            digits = np.where(blank, UNKNOWN, digits)
        return digits.reshape(-1, rows, cols), steps

    def _draw(self, scene: NDArray[np.int64], digits: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images [B, 3, rows * cell, cols * cell] of handwritten digits of these classes."""
        b, rows, cols = digits.shape
        at = scene[:, None, None]
        place = np.arange(rows * cols).reshape(rows, cols)
        bank, of_class = self._ink, self._of_class
        starts, counts = of_class
        which: Any = starts[digits] + counter.integers(
            counts[digits], *self._key, _IMAGE, at, place
        )
        which = np.where(digits == UNKNOWN, len(bank) - 1, which)  # the last picture is blank
        if self.shift:
            span = 2 * self.shift + 1
            offset = counter.integers(span * span, *self._key, _SHIFT, at, place)
            ys = (offset // span)[..., None, None] + np.arange(self.cell)[:, None]
            xs = (offset % span)[..., None, None] + np.arange(self.cell)
            ink = bank[which[..., None, None], ys, xs]
        else:
            ink = bank[which]
        ink = ink.transpose(0, 1, 3, 2, 4).reshape(b, rows * self.cell, cols * self.cell)
        low, high = self.background
        background = low + (high - low) * counter.uniform(*self._key, _BACKGROUND, at)
        low, high = self.contrast
        contrast = low + (high - low) * counter.uniform(*self._key, _CONTRAST, at)
        grey = background.astype(np.float32) + contrast.astype(np.float32) * ink
        if self.noise > 0:
            pixel = np.arange(grey[0].size).reshape(grey.shape[1:])
            draw = counter.uniform(*self._key, _NOISE, at, pixel).astype(np.float32)
            grey += self.noise * (2 * draw - 1)
        levels = (grey.clip(0, 1) * 255 + 0.5).astype(np.uint8)
        return np.repeat(levels[:, None], 3, axis=1)

    def _patch_labels(self, digits: NDArray[np.int64]) -> Tensor:
        """The digit of every patch's cell, [B, N] in raster order."""
        times = self.cell // (self.patch or self.cell)
        labels = np.repeat(np.repeat(digits, times, axis=1), times, axis=2)
        return torch.from_numpy(labels.reshape(len(digits), -1))

    def _describe(
        self, scene: NDArray[np.int64], digits: NDArray[np.int64], steps: NDArray[np.int64]
    ) -> list[list[str]]:
        """Captions of every scene. A blank cell is not spoken of."""
        silent = (counter.uniform(*self._key, _SILENT, scene) < self.uncaptioned).tolist()
        forms = counter.integers(len(_LINE_FORMS), *self._key, _FORM, scene).tolist()
        layouts, step_of = digits.tolist(), steps.tolist()
        writers = [getattr(self, f"_caption_{kind}") for kind in self.captions]
        return [
            [] if mute else [text for write in writers for text in write(layout, step, form)]
            for layout, step, form, mute in zip(layouts, step_of, forms, silent, strict=True)
        ]

    def _caption_rule(self, layout: list[list[int]], step: int, form: int) -> list[str]:
        present = {digit for line in layout for digit in line if digit != UNKNOWN}
        if not present:
            return ["an empty scene"]
        if self.rule == "progression" and layout[0][0] != UNKNOWN:
            by, start = self.steps[step], _NUMBER[layout[0][0]]
            way = "up" if by >= 0 else "down"
            return [f"digits that count {way} by {_count(abs(by))} from {start}"]
        if self.rule == "rows":
            return ["every row repeats one digit"]
        if self.rule == "theme":
            return ["a scene of " + _listed([_PLURAL[digit] for digit in sorted(present)])]
        return []

    def _caption_corner(self, layout: list[list[int]], step: int, form: int) -> list[str]:
        corners = (layout[0][0], layout[0][-1], layout[-1][0], layout[-1][-1])
        return [
            _CORNER_FORMS[form].format(_A_DIGIT[digit], name)
            for digit, name in zip(corners, _CORNERS, strict=True)
            if digit != UNKNOWN
        ]

    def _caption_row(self, layout: list[list[int]], step: int, form: int) -> list[str]:
        return [_line("row", i, tuple(line), form) for i, line in enumerate(layout)]

    def _caption_column(self, layout: list[list[int]], step: int, form: int) -> list[str]:
        columns = zip(*layout, strict=True)
        return [_line("column", i, line, form) for i, line in enumerate(columns)]

    def _caption_cell(self, layout: list[list[int]], step: int, form: int) -> list[str]:
        return [
            f"row {_count(i + 1)} column {_count(j + 1)} is {_A_DIGIT[digit]}"
            for i, line in enumerate(layout)
            for j, digit in enumerate(line)
            if digit != UNKNOWN
        ]


@lru_cache(maxsize=65536)
def _line(kind: str, place: int, digits: tuple[int, ...], form: int) -> str:
    """What a row or column holds, as a sentence."""
    name = f"{kind} {_count(place + 1)}"
    held = [_A_DIGIT[digit] for digit in digits if digit != UNKNOWN]
    return _LINE_FORMS[form].format(name, _listed(held)) if held else f"{name} is empty"


def _listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _count(number: int) -> str:
    return _NUMBER[number] if number < 10 else str(number)


@lru_cache(maxsize=8)
def _digits(
    split: str, cell: int, margin: int, shift: int
) -> tuple[NDArray[np.float32], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Handwritten digits of one split, sorted by class, ink in [0, 1], and one blank at the end.

    Returns the pictures [n + 1, cell + 2 * shift, cell + 2 * shift] and, of each class, the index
    of the first one and their number.
    """
    load: Any = require("sklearn.datasets", "DigitScenes").load_digits()
    ink, classes = load.images.astype(np.float32) / 16, load.target.astype(np.int64)
    # One fifth is held out: one split for ever, whatever the seed of the scenes.
    draw = counter.permutation(len(ink), 0)
    held_out = draw[::5]
    chosen = held_out if split == "val" else np.setdiff1d(draw, held_out)
    chosen = chosen[np.argsort(classes[chosen], kind="stable")]
    pictures = torch.from_numpy(ink[chosen])[:, None]
    if cell - 2 * margin != 8:
        size = (cell - 2 * margin,) * 2
        pictures = F.interpolate(pictures, size, mode="bilinear", antialias=True).clamp(0, 1)
    pictures = F.pad(pictures[:, 0], (margin + shift,) * 4)
    bank = torch.cat([pictures, torch.zeros_like(pictures[:1])]).numpy()
    counts = np.bincount(classes[chosen], minlength=10).astype(np.int64)
    return bank, (np.cumsum(counts) - counts, counts)


def _check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {tuple(choices)}, got {value!r}")
