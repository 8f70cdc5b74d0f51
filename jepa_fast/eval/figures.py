"""Pictures of a report as data URIs: curves, ranks, masks over images, patch-word similarity."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from jepa_fast.data.extras import require

# Colours that tell apart with any colour vision (Okabe and Ito).
_LINES = {
    "light": ("#0072b2", "#d98c00", "#009e73", "#b85c93"),
    "dark": ("#56b4e9", "#e69f00", "#2cc79b", "#e09bc1"),
}
_LIMIT = "#d55e00"
_BLOCKS = ("#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
_INK = {"light": "#475569", "dark": "#a8b3c4"}
_GRID = {"light": "#e2e8f0", "dark": "#2b3443"}
_PICTURE_PIXELS = 240


@dataclass(frozen=True)
class MaskExample:
    """An image with the patches of its context and of its target blocks.

    image: [3, H, W] in [0, 1]; context: [Kc] patch numbers; targets: [M, Kt]; grid: (rows, cols).
    """

    image: Tensor
    context: Tensor
    targets: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class WordMap:
    """How well each patch of an image fits each word of a caption.

    image: [3, H, W] in [0, 1]; words: S of them; similarity: [N, S], N patches in raster order of
    grid (rows, cols).
    """

    image: Tensor
    words: Sequence[str]
    similarity: Tensor
    grid: tuple[int, int]
    caption: str = ""

    def __post_init__(self) -> None:
        expected = (self.grid[0] * self.grid[1], len(self.words))
        if tuple(self.similarity.shape) != expected:
            raise ValueError(
                f"similarity must be [patches, words] = {list(expected)}, got "
                f"{list(self.similarity.shape)}"
            )


def curve(
    rows: Sequence[Mapping[str, float | None]],
    names: Mapping[str, str],
    theme: str,
    limit: float | None = None,
) -> str:
    """A line chart over the steps: one line for each key of `names`, labelled with its value.

    limit: a level to draw as a dashed line.
    """
    ticker = require("matplotlib.ticker", "The report")
    figure, axes = _chart(theme)
    for (key, label), colour in zip(names.items(), _LINES[theme], strict=False):
        steps = [row["step"] for row in rows if key in row]
        values = [_number(row[key]) for row in rows if key in row]
        marker = "o" if len(values) < 12 else None
        axes.plot(steps, values, color=colour, label=label, linewidth=1.7, marker=marker, ms=3)
    if limit is not None:
        axes.axhline(limit, color=_LIMIT, linewidth=1.4, linestyle="--", label="limit")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.set_xlabel("step", color=_INK[theme], fontsize=8)
    if len(names) > 1 or limit is not None:
        above = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": 2}
        axes.legend(frameon=False, labelcolor=_INK[theme], fontsize=8, borderpad=0, **above)
    return _png(figure)


def ranks(shares: Sequence[float], theme: str) -> str:
    """A histogram of ranks from 0 on, over the line of equal shares."""
    figure, axes = _chart(theme)
    count = len(shares)
    edges = [i / count for i in range(count + 1)]
    axes.stairs([count * share for share in shares], edges, color=_LINES[theme][0], linewidth=1.7)
    axes.axhline(1, color=_INK[theme], linewidth=1, linestyle="--")
    axes.set_ylim(0, None)
    axes.set_xlabel("rank", color=_INK[theme], fontsize=8)
    return _png(figure)


def masked_image(example: MaskExample) -> str:
    """What the encoder sees of the image in colour, the rest dimmed, each target block outlined."""
    rows, cols = example.grid
    seen = np.zeros(rows * cols, dtype=bool)
    seen[example.context.cpu().numpy()] = True
    pixels = _pixels(example.image)
    dim = 0.82 + 0.12 * pixels.mean(2, keepdims=True)
    shown = np.where(_over(seen.reshape(rows, cols), pixels)[..., None], pixels, dim)
    figure, axes = _canvas(shown, example.grid)
    for block, colour in zip(example.targets.cpu().tolist(), _BLOCKS, strict=False):
        inside = np.zeros(rows * cols, dtype=bool)
        inside[block] = True
        _outline(axes, inside.reshape(rows, cols), colour)
    return _png(figure)


def plain_image(image: Tensor) -> str:
    """The image itself, its pixels kept sharp."""
    figure, _ = _canvas(_pixels(image), (1, 1))
    return _png(figure)


def word_image(example: WordMap, word: int) -> str:
    """Similarity of every patch to one word, over the image in grey; one scale for all words."""
    grey = np.repeat(_pixels(example.image).mean(2, keepdims=True), 3, axis=2)
    figure, axes = _canvas(grey, example.grid)
    rows, cols = example.grid
    low, high = similarity_range(example)
    axes.imshow(
        example.similarity[:, word].float().cpu().numpy().reshape(rows, cols),
        cmap="inferno",
        vmin=low,
        vmax=high,
        alpha=0.65,
        extent=(0, cols, rows, 0),
        interpolation="nearest",
    )
    return _png(figure)


def similarity_range(example: WordMap) -> tuple[float, float]:
    """The values that the darkest and the brightest colour stand for."""
    low, high = example.similarity.float().aminmax()
    return float(low), float(high)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _pixels(image: Tensor) -> NDArray[np.float32]:
    """[3, H, W] in [0, 1] to [H, W, 3]."""
    return image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()


def _over(patches: NDArray[np.bool_], pixels: NDArray[np.float32]) -> NDArray[np.bool_]:
    """A value a patch, repeated over the pixels of the patch."""
    rows = np.arange(pixels.shape[0]) * patches.shape[0] // pixels.shape[0]
    cols = np.arange(pixels.shape[1]) * patches.shape[1] // pixels.shape[1]
    return patches[rows][:, cols]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Figure itself rather than pyplot, which keeps global state and may look for a display.
    figure = require("matplotlib.figure", "The report").Figure((width, height), layout="tight")
    return figure, figure.add_subplot()


def _chart(theme: str) -> tuple[Any, Any]:
    """Empty axes in the colours of a theme."""
    figure, axes = _figure(4.2, 2.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID[theme])
    axes.grid(axis="y", color=_GRID[theme], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK[theme], labelsize=8, length=0)
    return figure, axes


def _canvas(pixels: NDArray[np.float32], grid: tuple[int, int]) -> tuple[Any, Any]:
    """A figure that is this image from edge to edge, in units of patches."""
    rows, cols = grid
    height, width = pixels.shape[:2]
    scale = _PICTURE_PIXELS / 100 / max(height, width)
    make = require("matplotlib.figure", "The report").Figure
    figure = make((width * scale, height * scale), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(pixels, extent=(0, cols, rows, 0), interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    return figure, axes


def _outline(axes: Any, inside: NDArray[np.bool_], colour: str) -> None:
    """Tints the patches `inside` and draws a line around them."""
    rows, cols = inside.shape
    colours = require("matplotlib.colors", "The report")
    tint = np.zeros((rows, cols, 4))
    tint[inside] = (*colours.to_rgb(colour), 0.3)
    axes.imshow(tint, extent=(0, cols, rows, 0), interpolation="nearest", aspect="auto")
    edge = np.pad(inside, 1)
    lines = []
    for y, x in zip(*np.nonzero(inside), strict=True):
        top, left = edge[y, x + 1], edge[y + 1, x]
        bottom, right = edge[y + 2, x + 1], edge[y + 1, x + 2]
        lines += [] if top else [((x, y), (x + 1, y))]
        lines += [] if bottom else [((x, y + 1), (x + 1, y + 1))]
        lines += [] if left else [((x, y), (x, y + 1))]
        lines += [] if right else [((x + 1, y), (x + 1, y + 1))]
    collections = require("matplotlib.collections", "The report")
    axes.add_collection(
        collections.LineCollection(lines, colors=colour, linewidths=3, capstyle="projecting")
    )
    axes.set_xlim(0, cols)
    axes.set_ylim(rows, 0)


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi * 1.6, transparent=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
