"""Results as a picture: time against size, and how close to the machine's ceilings."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jepa_fast.perf.errors import PerfError
from jepa_fast.perf.files import write_bytes
from jepa_fast.perf.results import Record, Results

_MARKERS = "os^Dv<>P"


def draw(results: Results, path: Path) -> None:
    """Writes the picture of a machine's results, in one step.

    Raises:
        PerfError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = new_figure((13, 5.5))
    left, right = figure.subplots(1, 2)
    records = [record for record in results["records"] if _moved(record)]
    operators = sorted({record["operator"] for record in records})
    colours = {name: f"C{i % 10}" for i, name in enumerate(operators)}
    _times(left, records, colours)
    _roofline(right, results["runs"], records, colours)
    figure.suptitle(results["machine"]["name"])
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7, frameon=False)
    save(figure, path)


def new_figure(inches: tuple[float, float]) -> Any:
    """An empty matplotlib figure.

    Raises:
        PerfError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PerfError('no picture without matplotlib: pip install "jepa-fast[bench]"') from error
    return Figure(figsize=inches, layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Writes a figure as PNG, in one step.

    Raises:
        OSError: the file cannot be written.
    """
    from PIL import Image  # which matplotlib needs itself

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    # A third of the size, and without matplotlib's version the same results give the same file.
    Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, "png")
    write_bytes(path, small.getvalue())


def _times(axes: Any, records: list[Record], colours: dict[str, str]) -> None:
    """A line an operator: ours solid, the best of the others dashed."""
    for place, (operator, colour) in enumerate(colours.items()):
        mine = [each for each in records if each["operator"] == operator]
        mine.sort(key=_moved)
        style: dict[str, Any] = {"color": colour, "marker": _marker(place), "markersize": 4}
        axes.plot(
            [_moved(each) / 1e6 for each in mine],
            [each["providers"]["ours"]["milliseconds"] for each in mine],
            label=operator,
            **style,
        )
        beaten = [each for each in mine if each["headline"]]
        axes.plot(
            [_moved(each) / 1e6 for each in beaten],
            [each["providers"][each["headline"]["against"]]["milliseconds"] for each in beaten],
            linestyle="--",
            alpha=0.5,
            **style,
        )
    axes.set(
        xlabel="MB that have to be read and written",
        ylabel="ms a call",
        title="ours (solid) and the best of the others (dashed)",
    )
    _logarithmic(axes, records)


def _roofline(axes: Any, runs: list[Any], records: list[Record], colours: dict[str, str]) -> None:
    """The measured ceilings of the last run, and each case below them."""
    if not runs:
        return
    ceilings = runs[-1]["ceilings"]
    bandwidth, peaks = ceilings["gigabytes_per_second"] * 1e9, ceilings["teraflops"]
    computing = [_intensity(each) for each in records if each["cost"]["flops"]]
    ridges = [1e12 * peak / bandwidth for peak in peaks.values()]
    edge = min([*computing, 1.0]) / 4
    end = 4 * max([*computing, *ridges, 1.0])
    for dtype, peak in sorted(peaks.items()):
        ridge = 1e12 * peak / bandwidth
        axes.plot([min(ridge, end), end], [peak, peak], color="0.4", linewidth=1)
        axes.annotate(dtype, (end, peak), ha="right", va="bottom", fontsize=7, color="0.4")
    slope_end = max([*ridges, edge])
    slope = [edge, slope_end]
    axes.plot(slope, [x * bandwidth / 1e12 for x in slope], color="0.4", linewidth=1)
    for place, (operator, colour) in enumerate(colours.items()):
        mine = [each for each in records if each["operator"] == operator]
        # Work without arithmetic has its place at the left edge, as far below the bandwidth.
        intensities = [_intensity(each) or edge for each in mine]
        speeds = [
            intensity * each["gigabytes_per_second"] / 1e3
            for intensity, each in zip(intensities, mine, strict=True)
        ]
        axes.scatter(intensities, speeds, s=18, color=colour, marker=_marker(place))
    axes.set(
        xlabel="floating-point operations a byte (left edge: copies alone)",
        ylabel="TFLOP/s",
        title="ours below the ceilings measured here",
    )
    _logarithmic(axes, runs)


def _logarithmic(axes: Any, drawn: Sequence[object]) -> None:
    """Both axes, where something is drawn: of nothing there is no logarithm."""
    if drawn:
        axes.set(xscale="log", yscale="log")
    axes.grid(True, which="major", alpha=0.3)


def _marker(place: int) -> str:
    return _MARKERS[place // 10 % len(_MARKERS)]


def _moved(record: Record) -> int:
    return record["cost"]["read"] + record["cost"]["written"]


def _intensity(record: Record) -> float:
    return record["cost"]["flops"] / _moved(record)
